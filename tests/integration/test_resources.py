# SPDX-License-Identifier: Apache-2.0
"""Each resource of a process, as a program of three acts (tests/guests/acts/act.h), in four variants:

native            act one, act three: the program itself is right
resumed           checkpointed between the acts, and running on
restarted         checkpointed, killed with SIGKILL, restarted from the image
restarted twice   the same again with the restarted one: what a restart builds can be checkpointed
"""

import contextlib
import dataclasses
import os
import socket
import threading

import pytest

from vmckpt_harness import ORDINARY_USER, ROOT, VMCKPT, processes_marked


@dataclasses.dataclass(frozen=True)
class Act:
    name: str
    argument: str = ""
    daemonises: bool = False  # the launched process ends early, a child of it is the target
    may_be_refused: str = ""  # a word of the refusal; then the program must run on undisturbed

    @property
    def id(self):
        return f"{self.name} {self.argument}".strip()


PROCESS_ACTS = [
    Act("registers"),
    Act("amx"),
    Act("threads"),
    Act("rseq"),
    Act("robust_mutex"),
    Act("signal_state"),
    Act("signals_pending"),
    Act("full_signal_queue"),
    Act("single_step"),
    Act("dispatched_calls"),
    Act("altstack"),
    Act("scheduling"),
    Act("identity"),
    Act("capabilities"),
    Act("prctls"),
    Act("membarrier"),
    Act("seccomp", "prctl"),
    Act("seccomp", "syscall"),
    Act("seccomp", "tsync"),
    # An ordinary user cannot read filters, and the recorder does not see all.
    Act("seccomp", "no-spawn", may_be_refused="seccomp"),
    Act("seccomp", "raw", may_be_refused="seccomp"),
    Act("locked_in", "own prctl", may_be_refused="seccomp"),
    Act("locked_in", "checkpoint prctl"),
    Act("locked_in", "checkpoint syscall"),
    Act("strict_mode"),
    Act("spawn"),
    Act("exec_self", "execv"),
    Act("exec_self", "clean"),
    Act("exec_self", "fexecve"),
    Act("exec_self", "thread"),
    Act("exec_self", "twice"),
    Act("exec_self", "child", daemonises=True),
    Act("cpp_runtime"),
    Act("vdso"),
    Act("clocks"),
    Act("blocked_calls"),
    Act("partial_transfers"),
    Act("other_entries"),
    Act("hash_chain"),
]

MEMORY_ACTS = [
    Act("anon_memory"),
    Act("vm_flags"),
    Act("memory_rules", "read-implies-exec"),
    Act("memory_rules", "deny-write-execute"),
    Act("fork_advice"),
    Act("stack"),
    Act("brk"),
    Act("locked_memory"),
    Act("shared_anon"),
    Act("memfd"),
    Act("sysv_shm"),
    Act("posix_shm"),
    Act("private_file_mapping"),
    Act("shared_file_mapping"),
    Act("deleted_file_mapping"),
    Act("huge_pages"),
    Act("big_memory"),
    Act("zero_pages"),
    Act("discarded_memory"),
    Act("discarded_memory", "guest-ram"),
    Act("moved_memory"),
    Act("moved_memory", "guest-ram"),
    Act("shared_pages"),
    Act("guard_regions"),
    Act("droppable"),
    Act("reservation"),
    Act("private_object_mapping"),
    Act("mapped_program"),
]

DESCRIPTOR_ACTS = [
    Act("regular_files"),
    Act("high_descriptor"),
    Act("file_locks"),
    Act("deleted_file"),
    Act("aio"),
    Act("directory"),
    Act("pipe"),
    Act("fifo"),
    Act("eventfd"),
    Act("signalfd"),
    Act("timerfd"),
    Act("epoll"),
    Act("inotify"),
    Act("pidfd"),
    Act("socketpair"),
    Act("unix_listener"),
    Act("unix_dgram"),
    Act("tcp_listener"),
    Act("udp_socket"),
    Act("netlink_socket"),
    Act("inside_connection"),
    Act("pty_pair"),
    Act("pty_content"),
    Act("devices"),
    Act("posix_timers"),
    Act("interval_timers"),
    Act("alarm"),
    Act("kvm_state"),
]

VARIANTS = ["native", "resumed", "restarted", "restarted twice"]

needs_vmckpt = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")
variants = pytest.mark.parametrize("variant", [
    pytest.param(variant, marks=[] if variant == "native" else needs_vmckpt) for variant in VARIANTS
])


def each(acts):
    return pytest.mark.parametrize("act", acts, ids=lambda act: act.id)


def begin(stage, name, *arguments, **options):
    """Act one."""
    target = stage.launch([stage.act(name), stage.go_file, *arguments], **options)
    line = target.wait_for_line("READY", "SKIP: ")
    if line.startswith("SKIP: "):
        pytest.skip(line.removeprefix("SKIP: "))
    return target


def intermission(stage, target, variant):
    """What happens between the acts. The reports of all checkpoints."""
    reports = []
    lives = {"native": 0, "resumed": 0, "restarted": 1, "restarted twice": 2}[variant]
    if variant == "resumed":
        reports.append(target.checkpoint_report())
    for _ in range(lives):
        reports.append(target.checkpoint_report())
        target.kill()
        target.restart(reports[-1]["image"])
    return reports


def end(stage, target):
    """Act three: the program says PASS, and its own status comes through."""
    stage.go()
    target.wait_for_line("PASS", "FAIL")
    status = target.wait_for_end()
    if "FAIL" in target.text() or not (target.daemonises or status == 0):
        pytest.fail(f"ended with {status}; {target.report()}", pytrace=False)


def play(stage, act, variant):
    target = begin(stage, act.name, *act.argument.split(), native=variant == "native", daemonises=act.daemonises)
    reports = []
    if variant == "native" or not (act.may_be_refused and is_refused(stage, target, act.may_be_refused)):
        reports = intermission(stage, target, variant)
    end(stage, target)
    return reports


def is_refused(stage, target, word):
    outcome = stage.vmckpt("checkpoint", target.name)
    assert outcome.status == 0 or (outcome.stderr.startswith("vmckpt: ") and word in outcome.stderr), outcome
    return outcome.status != 0


# ---- the acts -------------------------------------------------------------------------------------------------------

@each(PROCESS_ACTS)
@variants
def test_a_process_is_what_it_was(stage, act, variant):
    play(stage, act, variant)


@each(MEMORY_ACTS)
@variants
def test_memory_is_what_it_was(stage, act, variant):
    play(stage, act, variant)


@each(DESCRIPTOR_ACTS)
@variants
def test_a_descriptor_or_timer_is_what_it_was(stage, act, variant):
    play(stage, act, variant)


@needs_vmckpt
def test_absent_and_zero_pages_cost_nothing_in_the_image(stage):
    (report,) = play(stage, Act("zero_pages"), "restarted")
    assert report["image_bytes"] < 8 << 20
    assert report["memory_bytes_saved"] < 8 << 20


# ---- connections to somebody outside --------------------------------------------------------------------------------

@contextlib.contextmanager
def echo_server(stage, kind):
    """Yields what the program is told to connect to."""
    if kind == "tcp":
        listener = socket.create_server(("127.0.0.1", 0))
        address = str(listener.getsockname()[1])
    else:
        listener = socket.socket(socket.AF_UNIX)
        address = str(stage.work / "echo")
        listener.bind(address)
        os.chmod(address, 0o777)
        listener.listen()

    def echo(connection):
        with connection, contextlib.suppress(OSError):
            while data := connection.recv(4096):
                connection.sendall(data)

    def serve():
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=echo, args=[listener.accept()[0]], daemon=True).start()

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield address
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(timeout=10)


@pytest.mark.parametrize("kind", ["tcp", "unix"])
@variants
def test_a_connection_to_the_outside_lives_on_or_comes_back_closed(stage, kind, variant):
    with echo_server(stage, kind) as address:
        target = begin(stage, "outside_peer", kind, address, native=variant == "native")
        intermission(stage, target, variant)
        end(stage, target)
        assert ("ALIVE" if variant in ("native", "resumed") else "CLOSED") in target.lines()


# ---- files that changed since the checkpoint ------------------------------------------------------------------------

def checkpoint_and_kill(stage, act):
    target = begin(stage, act)
    image = target.checkpoint()
    target.kill()
    return target, image


def expect_refusal(stage, image, *names):
    """Restart says what is wrong with each of these files before anything runs."""
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1
    assert outcome.stderr.startswith("vmckpt: ")
    for name in names:
        assert name in outcome.stderr
    assert stage.list() == []


@needs_vmckpt
def test_missing_files_are_all_reported_before_anything_starts_and_restart_works_once_they_are_back(stage):
    target, image = checkpoint_and_kill(stage, "regular_files")
    for name in ("readable", "log"):
        (stage.work / name).rename(stage.work / f"{name}.away")
    (stage.work / "log").mkdir()  # a small file that was being written would only be made again
    expect_refusal(stage, image, "readable", "log")
    (stage.work / "log").rmdir()
    for name in ("readable", "log"):
        (stage.work / f"{name}.away").rename(stage.work / name)
    target.restart(image)
    end(stage, target)


@needs_vmckpt
def test_a_file_that_changed_under_a_mapping_is_reported_before_anything_starts(stage):
    _, image = checkpoint_and_kill(stage, "private_file_mapping")
    (stage.work / "mapped file").write_text("something else")
    expect_refusal(stage, image, "mapped file")


@needs_vmckpt
def test_a_missing_working_directory_is_reported_before_anything_starts(stage):
    _, image = checkpoint_and_kill(stage, "identity")
    (stage.work / "a working directory").rmdir()
    expect_refusal(stage, image, "a working directory")


@needs_vmckpt
def test_a_port_that_somebody_else_took_is_reported(stage):
    """The listeners have SO_REUSEADDR, but another listener on the same port is one too many."""
    target, image = checkpoint_and_kill(stage, "tcp_listener")
    port = target.wait_for_line("PORT ").split()[1]
    with socket.create_server(("127.0.0.1", int(port))):
        outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1
    assert port in outcome.stderr
    assert stage.list() == []


# ---- what is refused ------------------------------------------------------------------------------------------------

REFUSED = ["netlink", "packet-socket", "userfaultfd", "fanotify", "message-queue", "perf-event", "own-descriptor-table",
           "own-directory", "landlock", "landlock-before-exec", "descriptor-in-flight", "child", "detached-mount"]
REFUSED_OR_HANDLED = ["directory-removed", "huge-page", "not-dumpable"]


def expect_clear_refusal(stage, outcome):
    assert outcome.status == 1
    assert outcome.stderr.startswith("vmckpt: ")
    assert len(outcome.stderr.splitlines()) <= 2
    assert list(stage.images.iterdir()) == []


@needs_vmckpt
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_is_refused_and_the_program_runs_on(stage, kind):
    target = begin(stage, "unsupported", kind)
    expect_clear_refusal(stage, stage.vmckpt("checkpoint", target.name))
    end(stage, target)


@needs_vmckpt
@pytest.mark.parametrize("kind", REFUSED_OR_HANDLED)
def test_what_may_be_refused_is_refused_clearly_or_survives_a_restart(stage, kind):
    target = begin(stage, "unsupported", kind)
    outcome = stage.vmckpt("checkpoint", target.name, "--json")
    if outcome.status == 0:
        target.kill()
        target.restart(outcome.json["image"])
    else:
        expect_clear_refusal(stage, outcome)
    end(stage, target)


@needs_vmckpt
@pytest.mark.parametrize("kind, note", [
    ("semaphore", "with SEM_UNDO"),
    ("directory", "no signals about the directory"),
    ("pressure", "has no trigger on it"),
])
def test_what_the_kernel_shows_to_nobody_is_noted(stage, kind, note):
    target = begin(stage, "hidden_state", kind)
    (report,) = intermission(stage, target, "restarted")
    assert [text for text in report["notes"] if note in text] != []
    end(stage, target)


@needs_vmckpt
def test_a_semaphore_set_that_is_gone_is_not_noted(stage):
    target = begin(stage, "hidden_state", "removed-semaphore")
    (report,) = intermission(stage, target, "resumed")
    assert report["notes"] == []
    end(stage, target)


@needs_vmckpt
def test_io_uring_and_aio_that_nobody_counts_are_denied_so_that_programs_fall_back(stage):
    target = begin(stage, "denied")
    for line in ("io_uring_setup: Function not implemented", "raw io_setup: Function not implemented", "io_setup: allowed"):
        assert line in target.lines()
    intermission(stage, target, "restarted")
    end(stage, target)


# ---- users ----------------------------------------------------------------------------------------------------------

@needs_vmckpt
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_an_ordinary_users_image_never_runs_with_roots_rights(make_stage):
    """An image is a program: root restarting somebody else's would be root running somebody else's program."""
    stage = make_stage(ORDINARY_USER)
    target = begin(stage, "identity")
    image = target.checkpoint()
    target.kill()
    runtime_of_root = stage.directory / "runtime of root"
    runtime_of_root.mkdir(mode=0o700)
    environment = {**stage.environment, "VMCKPT_RUNTIME_DIR": str(runtime_of_root)}
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused", user=ROOT, env=environment)
    assert outcome.status == 1
    assert "belongs to user" in outcome.stderr
    # Nothing else was looked into: checks open files and bind addresses as the image says.
    assert len(outcome.stderr.splitlines()) == 2, outcome.stderr
    assert processes_marked(stage.mark) == set()
