# SPDX-License-Identifier: Apache-2.0
"""User 0 is not the same as all rights: a program is launched, checkpointed and restarted twice, as root with the capabilities
that a container leaves, as root of a user namespace, and in sandboxes. doctor must foretell what happens."""

import json
import os
import shutil
import textwrap

import pytest

from vmckpt_harness import ORDINARY_USER, PATIENCE_S, ROOT, VMCKPT, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

# What container engines leave of root (docs.docker.com/engine/security, "Linux kernel capabilities").
CONTAINER = ["chown", "dac_override", "fsetid", "fowner", "mknod", "net_raw", "setgid", "setuid", "setfcap", "setpcap",
             "net_bind_service", "sys_chroot", "kill", "audit_write"]


def bounded(*capabilities):
    return ["setpriv", "--bounding-set", ",".join(["-all", *(f"+{name}" for name in capabilities)])]


CONFINEMENTS = {
    "plain": [],
    "a container's root": bounded(*CONTAINER),
    "a container's root that may choose numbers": bounded(*CONTAINER, "checkpoint_restore"),
    "root of a user namespace": ["unshare", "-Ur"],
    "root of a user and a PID namespace": ["unshare", "-Urmpf", "--mount-proc"],
    "bwrap": ["bwrap", "--unshare-all", "--dev-bind", "/", "/", "--proc", "/proc"],
    "bwrap with user 0": ["bwrap", "--unshare-all", "--uid", "0", "--dev-bind", "/", "/", "--proc", "/proc"],
}
OF_ROOT_ONLY = ("a container's root", "a container's root that may choose numbers")

# All of it is one process tree: a PID namespace ends with its first process.
SCRIPT = textwrap.dedent("""\
    vmckpt=$1 go=$2 images=$3; shift 3
    say() { sleep 0.02; test -e "$1" && grep -q "$2" "$1"; }
    wait_for() { n=0; until say "$1" "$2"; do n=$((n + 1)); test $n -lt $LOOKS || { cat "$1" >&2; exit 9; }; done; }
    "$vmckpt" launch -n it -d "$images" --detach -- "$@" > out 2> err || exit 2
    wait_for out READY
    for life in 1 2; do
        "$vmckpt" checkpoint it --kill > said 2>&1 || { cat said >&2; exit 3; }
        until test "$("$vmckpt" list --json)" = "[]"; do sleep 0.02; done
        "$vmckpt" restart --detach "$images/it-$life.ckpt" > said 2>&1 || { cat said >&2; exit 4; }
    done
    cat said
    touch "$go"
    wait_for out 'PASS\\|FAIL'
    cat out
    """)


def go_through(stage, confinement, program):
    """The whole way inside of it."""
    environment = {**stage.environment, "LOOKS": str(int(PATIENCE_S * 50))}
    words = [*confinement, "sh", "-c", SCRIPT, "sh", VMCKPT, stage.go_file, stage.images, *program]
    return stage.run(words, env=environment, timeout_s=PATIENCE_S * 3)


def confine(stage, name):
    confinement = CONFINEMENTS[name]
    if name in OF_ROOT_ONLY and os.getuid() != 0:
        pytest.skip("needs root, to take capabilities from it")
    if confinement and shutil.which(confinement[0]) is None:
        pytest.skip(f"{confinement[0]} is not installed")
    if confinement and stage.run([*confinement, "true"]).status != 0:
        pytest.skip(f"{' '.join(confinement)} is not allowed here")
    return confinement


CASES = [(user, name) for user in (ROOT, ORDINARY_USER) for name in CONFINEMENTS if user == ROOT or name not in OF_ROOT_ONLY]


@pytest.mark.parametrize("user, name", CASES, ids=[f"{user.name}, {name}" for user, name in CASES])
def test_launch_checkpoint_and_restart_work_where_doctor_says_so(make_stage, user, name):
    stage = make_stage(user)
    confinement = confine(stage, name)
    doctor = stage.run([*confinement, VMCKPT, "doctor", "--json", "-d", stage.images]).json
    outcome = go_through(stage, confinement, [stage.act("threads"), stage.go_file])
    assert doctor["usable"] == (outcome.status == 0), (doctor, outcome)
    if outcome.status == 0:
        assert "PASS" in outcome.stdout, outcome
        return
    # Only this may be impossible: bwrap, started by an ordinary user, leaves user 0 no capability.
    assert name == "bwrap with user 0", outcome
    assert "CAP_SETFCAP" in outcome.stderr and "another --uid" in outcome.stderr, outcome
    missing = {probe["name"]: probe for probe in doctor["probes"] if probe["required"] and probe["state"] == "missing"}
    assert "CAP_SETFCAP" in json.dumps(missing["pid-namespace"])


DROPPED = textwrap.dedent("""\
    import ctypes, os, resource, sys, time
    os.setgroups([33, 7])
    resource.setrlimit(resource.RLIMIT_NOFILE, (321, 654))
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (4096, 8192))
    os.setresgid(33, 33, 33)
    os.setresuid(34, 34, 34)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: as a program that does not mind to be traced
    def who():
        limits = [resource.getrlimit(r) for r in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK, resource.RLIMIT_CORE)]
        return os.getresuid(), os.getresgid(), sorted(os.getgroups()), limits
    before = who()
    print("READY", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    print("PASS" if who() == before else f"FAIL: {before} {who()}", flush=True)
    """)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become other users")
@pytest.mark.parametrize("capabilities", [[], ["sys_ptrace"]], ids=["without CAP_SYS_PTRACE", "with it"])
def test_a_program_that_became_another_user_in_a_container_keeps_user_groups_and_limits(make_stage, capabilities):
    stage = make_stage(ROOT)
    program = ["/usr/bin/python3", "-c", DROPPED, stage.go_file]
    outcome = go_through(stage, bounded(*CONTAINER, *capabilities), program)
    if not capabilities:
        # The kernel lets nobody else look into it.
        assert outcome.status == 3 and "CAP_SYS_PTRACE" in outcome.stderr, outcome
        stage.go()
        return
    assert "PASS" in outcome.stdout, outcome


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to take capabilities from it")
def test_capabilities_that_restart_does_not_have_are_named(make_stage):
    stage = make_stage(ROOT)
    target = stage.launch([stage.act("threads"), stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    outcome = stage.run([*bounded(*CONTAINER, "checkpoint_restore"), VMCKPT, "restart", "--detach", image])
    assert outcome.status == 0, outcome
    assert "CAP_NET_ADMIN" in outcome.stderr and "CAP_CHOWN" not in outcome.stderr, outcome
    stage.go()
    wait_until(lambda: "PASS" in target.lines(), target.report)


SECUREBITS = textwrap.dedent("""\
    import ctypes, os, sys, time
    print("READY", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    bits = ctypes.CDLL(None).prctl(27, 0, 0, 0, 0)  # PR_GET_SECUREBITS
    print("PASS" if bits == 0 else f"FAIL: {bits:#x}", flush=True)
    """)


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to set securebits")
def test_securebits_of_restart_do_not_stay_with_a_program_that_had_none(make_stage):
    stage = make_stage(ROOT)
    target = stage.launch(["/usr/bin/python3", "-c", SECUREBITS, stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    outcome = stage.run(["setpriv", "--securebits", "+no_setuid_fixup", VMCKPT, "restart", "--detach", image])
    assert outcome.status == 0, outcome
    stage.go()
    wait_until(lambda: any(line.startswith(("PASS", "FAIL")) for line in target.lines()), target.report)
    assert "PASS" in target.lines(), target.lines()
