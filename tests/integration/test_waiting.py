# SPDX-License-Identifier: Apache-2.0
"""Waits and races: a restart that hangs can be ended and ends by itself, numbers and names that somebody else takes at the wrong
moment, processes that come and go while a target is frozen, and what `list` says meanwhile."""

import contextlib
import os
import pathlib
import signal
import subprocess
import textwrap
import threading

import pytest

from vmckpt_harness import ROOT, VMCKPT, process_is_alive, processes_marked, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")


def begin(stage, act="threads", environment=(), **options):
    target = stage.launch([stage.act(act), stage.go_file], env={**stage.environment, **dict(environment)}, **options)
    target.wait_for_line("READY")
    return target


def end(stage, target):
    stage.go()
    wait_until(lambda: "PASS" in target.lines(), target.report)


# ---- a restart that waits -------------------------------------------------------------------------------------------

HOLDER = textwrap.dedent("""\
    import fcntl, os, signal, sys, time
    signal.signal(signal.SIGIO, lambda *_: os.write(1, b"ASKED\\n"))  # print must not interrupt print
    file = os.open(sys.argv[1], os.O_RDWR)
    fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    print("HELD", flush=True)
    while True:
        time.sleep(1)
    """)

READER = textwrap.dedent("""\
    import os, sys, time
    file = open("leased")
    print("READY", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    print("PASS", flush=True)
    """)


@contextlib.contextmanager
def restart_that_waits(stage, environment=(), options=(), ignored=""):
    """Yields a restart that waits for a file on which another process has a lease: opening it lasts until that one gives way."""
    stage.file("leased", "content")
    target = stage.launch(["/usr/bin/python3", "-c", READER, stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    holder = stage.start(["/usr/bin/python3", "-c", HOLDER, stage.work / "leased"], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"HELD\n"
    words = ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh"] if ignored else []
    restart = stage.start([*words, VMCKPT, "restart", *options, image], stderr=subprocess.PIPE, env={**stage.environment, **dict(environment)})
    assert holder.stdout.readline() == b"ASKED\n"
    yield restart
    holder.kill()
    holder.wait()


def nothing_is_left(stage):
    wait_until(lambda: processes_marked(stage.mark) == set(), lambda: processes_marked(stage.mark))
    assert stage.list() == []


@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "detached"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_restart_that_waits_ends_at_once_when_it_is_told_to(stage, number, options):
    with restart_that_waits(stage, options=options) as restart:
        restart.send_signal(number)  # to the command, and to nobody else
        _, said = restart.communicate(timeout=20)  # the kernel breaks a lease after 45 s
        assert restart.returncode == -number, (restart.returncode, said)
        assert b"nothing is left of it" in said
    nothing_is_left(stage)


@pytest.mark.parametrize("options", [[], ["--detach"]], ids=["foreground", "detached"])
def test_a_restart_goes_on_when_its_caller_ignores_the_signal(stage, options):
    """As under nohup."""
    with restart_that_waits(stage, options=options, ignored="HUP") as restart:
        restart.send_signal(signal.SIGHUP)
        with pytest.raises(subprocess.TimeoutExpired):
            restart.wait(timeout=1)
        restart.send_signal(signal.SIGTERM)
        restart.communicate(timeout=20)
        assert restart.returncode == -signal.SIGTERM
    nothing_is_left(stage)


def test_a_restart_in_which_nothing_moves_gives_up_and_says_so(stage):
    with restart_that_waits(stage, {"VMCKPT_RESTART_PATIENCE_S": "1"}.items()) as restart:
        _, said = restart.communicate(timeout=20)
        assert restart.returncode == 1
        assert b"has not moved for 1 s" in said, said
    nothing_is_left(stage)


def test_a_restart_that_waits_is_listed_and_can_be_killed(stage):
    with restart_that_waits(stage) as restart:
        (shown,) = stage.list()
        assert (shown["name"], shown["state"]) == ("target", "restarting")
        stage.vmckpt_ok("kill", "target")
        _, said = restart.communicate(timeout=20)
        assert restart.returncode == 1
        assert b"ended by vmckpt kill" in said, said
    nothing_is_left(stage)


def test_a_checkpoint_asked_for_during_a_restart_is_made_when_the_target_runs(stage):
    with restart_that_waits(stage) as restart:
        checkpoint = stage.start([VMCKPT, "checkpoint", "target"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        wait_until(lambda: stage.list()[0]["state"] == "restarting", "the restart waits")
        with pytest.raises(subprocess.TimeoutExpired):
            checkpoint.wait(timeout=1)
    image, _ = checkpoint.communicate(timeout=60)
    assert checkpoint.returncode == 0
    stage.vmckpt_ok("verify", image.decode().strip())
    stage.go()
    assert restart.wait(timeout=60) == 0


# ---- numbers --------------------------------------------------------------------------------------------------------

def take_number(number):
    """A process with that number, whoever's."""
    started = []
    while not os.path.exists(f"/proc/{number}"):
        pathlib.Path("/proc/sys/kernel/ns_last_pid").write_text(str(number - 1))
        started.append(subprocess.Popen(["sleep", "60"]))
    return started


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to choose process numbers")
@pytest.mark.parametrize("moment", ["restart-create", "restart-rebuild"])
def test_a_thread_number_that_is_taken_in_the_midst_of_a_restart_leads_to_a_namespace(make_stage, moment):
    stage = make_stage(ROOT)
    target = begin(stage)
    tids = sorted(int(tid) for tid in os.listdir(f"/proc/{target.pid}/task"))
    pid = target.pid
    image = target.checkpoint()
    target.kill()
    go = stage.directory / "go on"
    environment = {**stage.environment, "VMCKPT_FAULT": f"wait:{moment}", "VMCKPT_FAULT_GO": str(go)}
    said = stage.work / "restart.stderr"
    with said.open("wb") as stderr:
        stage.start([VMCKPT, "restart", image, "-n", "again"], stderr=stderr, env=environment)
    wait_until(lambda: "fault point" in said.read_text(), said.read_text)
    takers = take_number(tids[-1])
    try:
        go.touch()
        wait_until(lambda: [each for each in stage.list() if each["state"] == "running"], said.read_text)
        assert stage.list()[0]["pid"] != pid  # as seen from here: inside of the namespace it has its number
        end(stage, target)
    finally:
        for taker in takers:
            taker.kill()
            taker.wait()


# ---- names ----------------------------------------------------------------------------------------------------------

def test_of_many_launches_of_one_name_one_gets_it_and_can_be_reached(own_stage):
    for _ in range(4):
        outcomes = []
        words = ["launch", "-n", "contested", "-d", own_stage.images, "--detach", "--", "sleep", "60"]
        threads = [threading.Thread(target=lambda: outcomes.append(own_stage.vmckpt(*words))) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [outcome for outcome in outcomes if outcome.status == 0]
        assert len(winners) == 1, outcomes
        (shown,) = own_stage.list()
        assert shown["pid"] == int(winners[0].stdout.split()[1])
        os.kill(shown["pid"], signal.SIGKILL)
        wait_until(lambda: own_stage.list() == [], own_stage.list)


# ---- processes that come and go -------------------------------------------------------------------------------------

SPAWNER = textwrap.dedent("""\
    import os, subprocess, sys, time
    child = subprocess.Popen(["sleep", "1"])
    print("READY", flush=True)
    child.wait()
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    print("PASS", flush=True)
    """)


def test_a_checkpoint_waits_for_a_child_that_has_just_been_started(stage):
    target = stage.launch(["/usr/bin/python3", "-c", SPAWNER, stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    end(stage, target)


DOUBLE_FORKER = textwrap.dedent("""\
    import os, sys, time
    print("READY", flush=True)
    while not os.path.exists("fork"):
        time.sleep(0.01)
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            while not os.path.exists(sys.argv[1]):
                time.sleep(0.01)
        os._exit(0)
    os.waitpid(middle, 0)
    print("FORKED", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    print("PASS", flush=True)
    """)


def test_an_orphan_that_a_double_fork_has_just_left_is_not_overlooked(own_stage):
    stage = own_stage
    go = stage.directory / "go on"
    environment = {**stage.environment, "VMCKPT_FAULT": "wait:prepare", "VMCKPT_FAULT_GO": str(go)}
    target = stage.launch(["/usr/bin/python3", "-c", DOUBLE_FORKER, stage.go_file], env=environment)
    target.wait_for_line("READY")
    checkpoint = stage.start([VMCKPT, "checkpoint", "target"], stderr=subprocess.PIPE)
    wait_until(lambda: "fault point prepare" in target.stderr.read_text(), target.report)
    stage.file("fork")
    target.wait_for_line("FORKED")
    go.touch()
    _, said = checkpoint.communicate(timeout=60)
    assert checkpoint.returncode == 1 and (b"has 2 processes" in said or b"just started another" in said), said
    end(stage, target)


# ---- what becomes of the target ---------------------------------------------------------------------------------------

COUNTER = textwrap.dedent("""\
    import mmap, os, sys, threading
    count = mmap.mmap(os.open(sys.argv[2], os.O_RDWR), 8)
    def work():
        while True:
            count[:8] = (int.from_bytes(count[:8], "little") + 1).to_bytes(8, "little")
    threading.Thread(target=work, daemon=True).start()
    print("READY", flush=True)
    while not os.path.exists(sys.argv[1]):
        pass
    print("PASS", flush=True)
    os._exit(0)
    """)


def test_a_target_is_left_stopped_at_the_moment_of_its_image(stage):
    count = stage.file("count", "\0" * 8)
    target = stage.launch(["/usr/bin/python3", "-c", COUNTER, stage.go_file, count])
    target.wait_for_line("READY")
    target.checkpoint("--stop", "--shared-files", "all")
    after = count.read_bytes()
    (shown,) = stage.list()
    assert shown["state"] == "stopped"
    threading.Event().wait(0.3)
    assert count.read_bytes() == after, "it does nothing beyond what is in the image"
    os.kill(target.pid, signal.SIGCONT)
    wait_until(lambda: count.read_bytes() != after, "it goes on when it may")
    end(stage, target)
    assert target.wait_for_end() == 0


def test_stop_and_kill_exclude_each_other(stage):
    outcome = stage.vmckpt("checkpoint", "target", "--stop", "--kill")
    assert outcome.status == 2 and "--stop and --kill are mutually exclusive" in outcome.stderr, outcome


# ---- what list says meanwhile ---------------------------------------------------------------------------------------

def test_a_target_is_listed_while_a_checkpoint_freezes_it(stage):
    go = stage.directory / "go on"
    target = begin(stage, environment={"VMCKPT_FAULT": "wait:freeze", "VMCKPT_FAULT_GO": str(go)}.items())
    pid = target.pid
    checkpoint = stage.start([VMCKPT, "checkpoint", "target"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: "fault point freeze" in target.stderr.read_text(), target.report)
    (shown,) = stage.list()
    assert (shown["name"], shown["pid"], shown["state"]) == ("target", pid, "checkpointing")
    go.touch()
    assert checkpoint.wait(timeout=60) == 0
    assert process_is_alive(pid)
    end(stage, target)
