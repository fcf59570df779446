# SPDX-License-Identifier: Apache-2.0
"""Whatever fails before an image is committed, the target runs on as if nothing had happened, no half image is left
under the final name, and the message says why.

The program is the one of the checkpoint storm: it would notice an EINTR, a wrong return, a lost token. After every
fault each of its threads must get the processor again, untraced; in the end it is asked what it has counted.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import pytest

from faults_helpers import (COMMAND_TIMEOUT_S, RELEASE_PAUSE, Injection, Subject, command_under_way,
                            expect_all_threads_run, expect_refused, fault_in_environment, files_in, frozen, mounted,
                            needs_root, needs_strace, release_pause, threads_of, wait_for_pause)
from vmckpt_harness import (ORDINARY_USER, VMCKPT, descendants_of, process_is_alive, processes_marked, signal_process,
                            wait_until)

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

# Repeat a random choice with VMCKPT_TEST_SEED=N.
SEED = int(os.environ.get("VMCKPT_TEST_SEED", random.SystemRandom().randrange(1 << 32)))
# VMCKPT_TEST_STEPS=100000 tries every single call, which takes long.
STEPS = int(os.environ.get("VMCKPT_TEST_STEPS", 5))
# How often something is killed at a random time or call.
ATTEMPTS = int(os.environ.get("VMCKPT_TEST_ATTEMPTS", 8))

CHECKPOINT_PHASES = ["prepare", "quiesce", "freeze", "drain", "save", "snapshot", "resume", "write", "seal"]
RESTART_PHASES = ["restart-create", "restart-rebuild", "restart-play"]


@pytest.fixture
def chance(request):
    """Random numbers of this test alone, the same whichever tests run beside it."""
    print(f"VMCKPT_TEST_SEED={SEED}")
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture
def fast_images(own_stage):
    """A directory for images where syncing costs nothing, if there is one."""
    if not os.access("/dev/shm", os.W_OK):
        yield own_stage.images
        return
    directory = pathlib.Path(tempfile.mkdtemp(prefix="vmckpt-test-", dir="/dev/shm"))
    os.chown(directory, own_stage.user.uid, own_stage.user.uid)
    yield directory
    shutil.rmtree(directory)


def checkpoint(stage, *options):
    done = stage.vmckpt("checkpoint", "target", *options, timeout_s=COMMAND_TIMEOUT_S)
    return done.status, done.stdout, done.stderr


def set_limit(stage, pid, name, value):
    """Sets the soft limit only, so that it can be raised again."""
    value = "unlimited" if value == resource.RLIM_INFINITY else value
    done = stage.run(["prlimit", "--pid", pid, f"--{name}={value}:"])
    assert done.status == 0, done


def expect_no_process(stage):
    wait_until(lambda: processes_marked(stage.mark) == set(),
               lambda: f"no process left, but there are {processes_marked(stage.mark)}", COMMAND_TIMEOUT_S)


def expect_whole_or_nothing(stage, outcome, image):
    """A checkpoint that was disturbed: committed and good, or refused with a reason and without a trace."""
    if outcome[0] == 0:
        assert files_in(image.parent) == [image.name]
        stage.vmckpt_ok("verify", image)
        image.unlink()
    else:
        expect_refused(outcome)
        assert files_in(image.parent) == []


# ---- the nth system call fails --------------------------------------------------------------------------------------

# What the main thread of a supervisor calls, up to the resuming of the target.
CALLS_OF_THE_PAUSE = [
    ("openat", "EMFILE"),
    ("read", "EIO"),
    ("pread64", "EIO"),
    ("getdents64", "ENOMEM"),
    ("newfstatat", "EIO"),
    ("fstatfs", "EIO"),
    ("readlink", "ENOMEM"),
    ("readlinkat", "ENOMEM"),
    ("fcntl", "EPERM"),
    ("ioctl", "EIO"),
    ("ptrace", "EIO"),
    ("ptrace", "ESRCH"),
    ("waitid", "EINTR"),
    ("wait4", "EINTR"),
    ("process_vm_readv", "EPERM"),
    ("process_vm_writev", "ENOMEM"),
    ("pidfd_open", "ENOMEM"),
    ("pidfd_getfd", "EPERM"),
    ("kcmp", "EPERM"),
    ("get_robust_list", "EPERM"),
    ("prlimit64", "EPERM"),
    ("getsockopt", "ENOMEM"),
    ("socket", "EMFILE"),
    ("getrandom", "EIO"),
    ("fchmod", "EPERM"),
    ("accept4", "EMFILE"),
    ("mmap", "ENOMEM"),
    ("clone,clone3", "EAGAIN"),
]

# What its writing thread calls.
CALLS_OF_THE_WRITING = [
    ("openat", "EMFILE"),
    ("pread64", "EIO"),
    ("process_vm_readv", "EPERM"),
    ("pwrite64", "ENOSPC"),
    ("pwrite64", "EIO"),
    ("ftruncate", "ENOSPC"),
    ("fdatasync", "EIO"),
    ("fsync", "EIO"),
    ("newfstatat", "EIO"),
    ("linkat", "EPERM"),
    ("renameat2,rename", "EIO"),
    ("mmap", "ENOMEM"),
]


# brk knows no errors: a break that did not move is one (brk(2), C library/kernel differences). It says so at 0, too.
NO_BREAK = "retval=0"


def call_numbers(count, chance):
    """Which calls of `count` to make fail: the first, the last, one too many, and some between."""
    numbers = set(range(1, count + 2))
    if len(numbers) > STEPS:
        edges = {1, 2, count - 1, count}
        numbers = edges | set(chance.sample(sorted(numbers - edges), max(0, STEPS - len(edges))))
    return sorted(numbers)


@needs_strace
@pytest.mark.parametrize("calls, error", CALLS_OF_THE_PAUSE)
def test_whichever_system_call_of_the_pause_fails_the_target_runs_on(own_stage, fast_images, chance, calls, error):
    subject = Subject(own_stage)
    image = fast_images / "image.ckpt"
    with Injection(own_stage, subject.supervisor, calls, []) as counting:
        expect_whole_or_nothing(own_stage, checkpoint(own_stage, "-o", image), image)
    numbers = call_numbers(len(counting.names_of_calls(subject.supervisor)), chance)
    for number in numbers:
        print(f"call {number} of {calls} fails with {error}")
        with Injection(own_stage, subject.supervisor, calls, [f"{calls}:error={error}:when={number}"]) as injection:
            outcome = checkpoint(own_stage, "-o", image)
        print(*injection.injected(), outcome, sep="\n")
        assert injection.injected() or outcome[0] == 0
        expect_whole_or_nothing(own_stage, outcome, image)
        subject.expect_unharmed()
        subject.expect_supervisor_unharmed()
    own_stage.vmckpt_ok("checkpoint", "target", "-o", image)
    subject.finish()
    subject.expect_restartable(image)


@needs_strace
@pytest.mark.parametrize("calls, error", CALLS_OF_THE_WRITING)
def test_whichever_system_call_of_the_writing_fails_the_target_runs_on(own_stage, fast_images, chance, calls, error):
    # The writing thread is there only after the pause: strace comes at the fault point before it and ends the waiting.
    subject = Subject(own_stage, fault="pause:resume")
    image = fast_images / "image.ckpt"

    def checkpoint_with(*faults):
        with command_under_way(own_stage, "checkpoint", "target", "-o", image) as command:
            wait_for_pause(subject.supervisor)
            injection = Injection(own_stage, subject.supervisor, f"restart_syscall,{calls}", [RELEASE_PAUSE, *faults])
        with injection:
            pass
        return command.outcome, injection

    outcome, counting = checkpoint_with()
    expect_whole_or_nothing(own_stage, outcome, image)
    count = len(counting.names_of_calls()) - len(counting.names_of_calls(subject.supervisor))
    for number in call_numbers(count, chance):
        print(f"call {number} of {calls} fails with {error}")
        outcome, injection = checkpoint_with(f"{calls}:error={error}:when={number}")
        print(*injection.injected(), outcome, sep="\n")
        assert injection.injected() or outcome[0] == 0
        expect_whole_or_nothing(own_stage, outcome, image)
        subject.expect_unharmed()
        subject.expect_supervisor_unharmed()
    outcome, _ = checkpoint_with()
    assert outcome[0] == 0, outcome
    own_stage.vmckpt_ok("verify", image)
    subject.finish()
    subject.expect_restartable(image)


@needs_strace
@pytest.mark.parametrize("from_call", [1, 2, 3])
def test_a_supervisor_that_gets_no_more_memory_does_not_harm_the_target(own_stage, fast_images, from_call):
    # It may say so or die of it, as the out-of-memory killer would have it.
    subject = Subject(own_stage)
    image = fast_images / "image.ckpt"
    faults = [f"brk:{NO_BREAK}:when={from_call}+", f"mmap:error=ENOMEM:when={from_call}+"]
    with Injection(own_stage, subject.supervisor, "brk,mmap", faults):
        outcome = checkpoint(own_stage, "-o", image)
    expect_whole_or_nothing(own_stage, outcome, image)
    subject.expect_unharmed()
    subject.finish()


def test_a_user_who_may_have_no_more_processes_is_told_so_or_the_target_stands_still_longer(make_stage):
    stage = make_stage(ORDINARY_USER)
    subject = Subject(stage)
    before = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    set_limit(stage, subject.supervisor, "nproc", 1)  # no thread for the writing
    expect_refused(checkpoint(stage), "Resource temporarily unavailable")
    assert files_in(stage.images) == []
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    set_limit(stage, subject.supervisor, "nproc", before)
    set_limit(stage, subject.pid, "nproc", 1)  # no snapshot: the memory is copied while the target is stopped
    assert "could not be forked" in stage.vmckpt_ok("checkpoint", "target").stderr
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    set_limit(stage, subject.pid, "nproc", before)
    image = subject.target.checkpoint()
    subject.finish()
    subject.expect_restartable(image)


# ---- SIGKILL of the supervisor --------------------------------------------------------------------------------------

def expect_survives_supervisor(subject, outcome, older, image, **judging):
    stage = subject.stage
    wait_until(lambda: not process_is_alive(subject.supervisor), "the supervisor is gone")
    expect_refused(outcome)
    assert not image.exists()
    assert files_in(image.parent) in ([], [older.name]), "a temporary file is left over"
    subject.expect_no_process_left(subject.supervisor)
    subject.expect_unharmed()
    assert stage.list() == []
    subject.finish(**judging)


@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_a_supervisor_that_is_killed_in_a_phase_leaves_the_target_running_and_older_images_whole(stage, phase):
    subject = Subject(stage)
    older, image = stage.images / "older.ckpt", stage.images / "image.ckpt"
    stage.vmckpt_ok("checkpoint", "target", "-o", older)
    digest = hashlib.sha256(older.read_bytes()).digest()
    subject.target.kill()
    subject.restart(older, fault=f"kill:{phase}")
    outcome = checkpoint(stage, "-o", image)
    expect_survives_supervisor(subject, outcome, older, image)
    assert hashlib.sha256(older.read_bytes()).digest() == digest
    subject.expect_restartable(older)


@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_a_supervisor_that_is_killed_while_it_replaces_an_image_leaves_the_old_one(own_stage, phase):
    stage = own_stage
    subject = Subject(stage)
    image = stage.images / "image.ckpt"
    stage.vmckpt_ok("checkpoint", "target", "-o", image)
    digest = hashlib.sha256(image.read_bytes()).digest()
    subject.target.kill()
    subject.restart(image, fault=f"kill:{phase}")
    expect_refused(checkpoint(stage, "-o", image))
    assert files_in(stage.images) == [image.name]
    assert hashlib.sha256(image.read_bytes()).digest() == digest
    subject.expect_unharmed()
    subject.finish()


@needs_strace
@pytest.mark.parametrize("attempt", range(ATTEMPTS))
def test_a_supervisor_that_is_killed_at_any_system_call_of_the_pause_leaves_the_target_running(
        own_stage, fast_images, chance, attempt):
    del attempt  # each has its own random numbers
    subject = Subject(own_stage)
    image = fast_images / "image.ckpt"
    with Injection(own_stage, subject.supervisor, "all", []) as counting:
        expect_whole_or_nothing(own_stage, checkpoint(own_stage, "-o", image), image)
    calls = counting.names_of_calls(subject.supervisor)
    # The first thread that it starts looks at descriptors, the last one writes: then the target runs again.
    pause = range(calls.index("pidfd_open"), len(calls) - 1 - calls[::-1].index("clone3"))
    for _ in range(10):
        at = chance.choice(pause)
        # strace counts each call by itself.
        name, number = calls[at], calls[:at + 1].count(calls[at])
        print(f"to be killed at call {at - pause.start} of {len(pause)}, {name} number {number}")
        with Injection(own_stage, subject.supervisor, "all", [f"{name}:signal=KILL:when={number}"]) as injection:
            outcome = checkpoint(own_stage, "-o", image)
        if outcome[0] != 0:
            break
        # A call that is not made each time: memory that is there already, waiting that was shorter.
        expect_whole_or_nothing(own_stage, outcome, image)
    print(*injection.log.read_text(errors="replace").splitlines()[-5:], sep="\n")
    expect_survives_supervisor(subject, outcome, image, image, between_stop_and_repair=True)


@pytest.mark.parametrize("attempt", range(ATTEMPTS))
def test_a_supervisor_that_is_killed_at_any_time_leaves_the_target_running(own_stage, chance, attempt):
    del attempt
    subject = Subject(own_stage)
    older, image = own_stage.images / "older.ckpt", own_stage.images / "image.ckpt"
    begin_s = time.monotonic()
    own_stage.vmckpt_ok("checkpoint", "target", "-o", older)
    delay_s = chance.uniform(0, (time.monotonic() - begin_s) * 1.2)
    print(f"killed after {delay_s * 1000:.1f} ms")
    with command_under_way(own_stage, "checkpoint", "target", "-o", image) as command:
        threading.Event().wait(delay_s)
        os.kill(subject.supervisor, signal.SIGKILL)
    wait_until(lambda: not process_is_alive(subject.supervisor), "the supervisor is gone")
    # Killed between the commit and the answer it leaves a whole image.
    assert command.outcome[0] == 0 or command.outcome[2].startswith("vmckpt: "), command.outcome
    assert set(files_in(own_stage.images)) <= {older.name, image.name}
    assert image.exists() or command.outcome[0] == 1
    subject.expect_no_process_left(subject.supervisor)
    subject.expect_unharmed()
    subject.finish(between_stop_and_repair=True)
    for whole in filter(pathlib.Path.exists, [older, image]):
        own_stage.vmckpt_ok("verify", whole)
    subject.expect_restartable(older)


# ---- SIGKILL of the snapshot, of the target, of the client -----------------------------------------------------------

def snapshot_of(subject):
    """The child of the supervisor that holds the copy of the target's memory."""
    extra = descendants_of([subject.supervisor]) - subject.family
    assert len(extra) == 1, extra
    return extra.pop()


@needs_strace
def test_a_snapshot_that_is_killed_before_it_is_written_fails_the_checkpoint_only(stage):
    subject = Subject(stage, fault="pause:resume")
    image = stage.images / "image.ckpt"
    with command_under_way(stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(subject.supervisor)
        os.kill(snapshot_of(subject), signal.SIGKILL)
        release_pause(stage, subject.supervisor)
    expect_refused(command.outcome)
    assert files_in(stage.images) == []
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    with command_under_way(stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(subject.supervisor)
        release_pause(stage, subject.supervisor)
    assert command.outcome[0] == 0, command.outcome
    subject.finish()
    subject.expect_restartable(image)


@needs_strace
def test_a_snapshot_that_is_killed_after_it_was_written_is_not_missed(stage):
    subject = Subject(stage, fault="pause:write")
    image = stage.images / "image.ckpt"
    with command_under_way(stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(subject.supervisor)
        os.kill(snapshot_of(subject), signal.SIGKILL)
        release_pause(stage, subject.supervisor)
    assert command.outcome[0] == 0, command.outcome
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    subject.finish()
    subject.expect_restartable(image)


@needs_strace
@pytest.mark.parametrize("phase", CHECKPOINT_PHASES)
def test_a_target_that_is_killed_in_a_phase_leaves_a_whole_image_or_none(stage, phase):
    subject = Subject(stage, fault=f"pause:{phase}")
    image = stage.images / "image.ckpt"
    with command_under_way(stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(subject.supervisor)
        os.kill(subject.pid, signal.SIGKILL)
        release_pause(stage, subject.supervisor)
    assert subject.target.wait_for_end(COMMAND_TIMEOUT_S) == 128 + signal.SIGKILL
    expect_no_process(stage)
    print(command.outcome)
    assert command.outcome[0] == 0 or phase not in ("resume", "write"), command.outcome
    if command.outcome[0] == 0:
        subject.expect_restartable(image)
    else:
        expect_refused(command.outcome)
        assert files_in(stage.images) == []


@pytest.mark.parametrize("attempt", range(ATTEMPTS))
def test_a_target_that_is_killed_at_any_time_leaves_a_whole_image_or_none(own_stage, chance, attempt):
    del attempt
    subject = Subject(own_stage)
    older, image = own_stage.images / "older.ckpt", own_stage.images / "image.ckpt"
    own_stage.vmckpt_ok("checkpoint", "target", "-o", older)
    delay_s = chance.uniform(0, 0.08)
    print(f"killed after {delay_s * 1000:.1f} ms")
    with command_under_way(own_stage, "checkpoint", "target", "-o", image) as command:
        threading.Event().wait(delay_s)
        os.kill(subject.pid, signal.SIGKILL)
    print(command.outcome)
    assert subject.target.wait_for_end(COMMAND_TIMEOUT_S) == 128 + signal.SIGKILL
    expect_no_process(own_stage)
    if command.outcome[0] != 0:
        expect_refused(command.outcome)
    assert files_in(own_stage.images) == ([image.name] if command.outcome[0] == 0 else []) + [older.name]
    for whole in files_in(own_stage.images):
        subject.expect_restartable(own_stage.images / whole)


@needs_strace
def test_a_checkpoint_whose_client_is_killed_is_given_up(stage):
    subject = Subject(stage, fault="pause:write")
    image = stage.images / "image.ckpt"
    with command_under_way(stage, "checkpoint", "target", "-o", image) as command:
        wait_for_pause(subject.supervisor)
        command.process.kill()
        command.process.wait()
        release_pause(stage, subject.supervisor)
    wait_until(lambda: [entry["state"] for entry in stage.list()] == ["running"], "the checkpoint has been given up")
    assert not image.exists()
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    subject.finish()


# ---- faults of a restart ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("phase", RESTART_PHASES)
def test_a_restart_that_is_killed_leaves_no_process_and_the_image_whole(stage, phase):
    subject = Subject(stage)
    image = subject.target.checkpoint()
    subject.target.kill()
    digest = hashlib.sha256(image.read_bytes()).digest()
    with fault_in_environment(stage, f"kill:{phase}"):
        restart = stage.start([VMCKPT, "restart", image])
    assert restart.wait(timeout=COMMAND_TIMEOUT_S) == -signal.SIGKILL
    expect_no_process(stage)
    assert hashlib.sha256(image.read_bytes()).digest() == digest
    subject.expect_restartable(image)


@needs_strace
@pytest.mark.parametrize("phase", RESTART_PHASES)
def test_a_restart_whose_new_process_is_killed_says_so_and_leaves_nothing(stage, phase):
    subject = Subject(stage)
    image = subject.target.checkpoint()
    subject.target.kill()
    with fault_in_environment(stage, f"pause:{phase}"):
        with command_under_way(stage, "restart", image) as command:
            wait_for_pause(command.process.pid)
            for pid in descendants_of([command.process.pid]) - {command.process.pid}:
                signal_process(pid, signal.SIGKILL)
            release_pause(stage, command.process.pid)
    expect_refused(command.outcome)
    expect_no_process(stage)
    subject.expect_restartable(image)


# ---- one checkpoint soon after another ------------------------------------------------------------------------------

def test_an_image_taken_while_calls_that_the_last_checkpoint_interrupted_still_wait_restarts_undisturbed(own_stage):
    # Not a fault itself, but what every repeated checkpoint after a refused one does.
    subject = Subject(own_stage)
    for number in range(3):
        own_stage.vmckpt_ok("checkpoint", "target", "-o", own_stage.images / f"{number}.ckpt")
    subject.target.kill()
    subject.restart(own_stage.images / "2.ckpt")
    subject.finish()


# ---- places where no image can be ------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["tmpfs", "ext4"])
def test_a_full_disk_fails_the_checkpoint_and_leaves_the_old_image_valid(own_stage, kind):
    subject = Subject(own_stage)
    with mounted(own_stage, kind, 16) as place:
        before = files_in(place)
        image, filler = place / "image.ckpt", place / "filler"
        own_stage.vmckpt_ok("checkpoint", "target", "-o", image)
        digest = hashlib.sha256(image.read_bytes()).digest()
        for left_kib in (0, 4, 64, 256, 448):
            with open(filler, "wb", buffering=0) as file, contextlib.suppress(OSError):
                while True:
                    file.write(bytes(4096))
            os.truncate(filler, max(0, filler.stat().st_size - left_kib * 1024))
            os.sync()
            for name in ("image.ckpt", "other.ckpt"):  # in the place of the old one, and beside it
                expect_refused(checkpoint(own_stage, "-o", place / name), "No space left on device", str(place))
                assert files_in(place) == sorted([*before, "filler", "image.ckpt"])
            subject.expect_unharmed()
            subject.expect_supervisor_unharmed()
            filler.unlink()
        assert hashlib.sha256(image.read_bytes()).digest() == digest
        own_stage.vmckpt_ok("verify", image)
        own_stage.vmckpt_ok("checkpoint", "target", "-o", place / "other.ckpt")
        subject.finish()
        subject.expect_restartable(image)
        subject.expect_restartable(place / "other.ckpt")


def test_a_file_size_limit_fails_the_checkpoint_and_leaves_the_old_image_valid(stage):
    subject = Subject(stage)
    image = stage.images / "image.ckpt"
    stage.vmckpt_ok("checkpoint", "target", "-o", image)
    digest = hashlib.sha256(image.read_bytes()).digest()
    for limit_bytes in (0, 4096, 65536, 262144):
        set_limit(stage, subject.supervisor, "fsize", limit_bytes)
        expect_refused(checkpoint(stage, "-o", image), "File too large", "ulimit -f")
        assert files_in(stage.images) == [image.name]
        subject.expect_unharmed()
        subject.expect_supervisor_unharmed()
    assert hashlib.sha256(image.read_bytes()).digest() == digest
    set_limit(stage, subject.supervisor, "fsize", resource.RLIM_INFINITY)
    stage.vmckpt_ok("checkpoint", "target", "-o", image)
    subject.finish()
    subject.expect_restartable(image)


def test_a_program_launched_with_a_small_file_size_limit_is_told_about_it_at_the_checkpoint(stage):
    target = stage.launch([stage.act("hash_chain"), stage.go_file], preexec_fn=lambda: resource.setrlimit(
        resource.RLIMIT_FSIZE, (65536, 65536)))
    target.wait_for_line("READY")
    expect_refused(checkpoint(stage), "File too large", "ulimit -f")
    assert files_in(stage.images) == []
    expect_all_threads_run(target.pid)
    stage.go()
    assert target.wait_for_end() == 0, target.report()


def test_a_missing_directory_fails_the_checkpoint(stage):
    subject = Subject(stage)
    missing = stage.images / "missing"
    expect_refused(checkpoint(stage, "-o", missing / "image.ckpt"), str(missing), "No such file or directory")
    assert files_in(stage.images) == []
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    stage.vmckpt_ok("checkpoint", "target")
    subject.finish()


def test_a_directory_that_the_user_may_not_write_to_fails_the_checkpoint(make_stage):
    stage = make_stage(ORDINARY_USER)
    subject = Subject(stage)
    stage.images.chmod(0o555)
    expect_refused(checkpoint(stage), str(stage.images), "Permission denied")
    assert files_in(stage.images) == []
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    stage.images.chmod(0o755)
    stage.vmckpt_ok("checkpoint", "target")
    subject.finish()


def test_a_read_only_file_system_fails_the_checkpoint_and_its_old_image_stays_valid(own_stage):
    subject = Subject(own_stage)
    with mounted(own_stage, "tmpfs", 16) as place:
        image = place / "image.ckpt"
        own_stage.vmckpt_ok("checkpoint", "target", "-o", image)
        own_stage.run(["mount", "-o", "remount,ro", place])
        for name in ("image.ckpt", "other.ckpt"):
            expect_refused(checkpoint(own_stage, "-o", place / name), str(place), "Read-only file system")
        assert files_in(place) == ["image.ckpt"]
        subject.expect_unharmed()
        subject.expect_supervisor_unharmed()
        subject.finish()
        subject.expect_restartable(image)


@needs_strace
@pytest.mark.parametrize("phase", ["prepare", "write"])
def test_an_image_directory_that_goes_away_meanwhile_fails_the_checkpoint(stage, phase):
    subject = Subject(stage, fault=f"pause:{phase}")
    stage.images.rmdir()
    stage.images.mkdir()
    os.chown(stage.images, stage.user.uid, stage.user.uid)
    with command_under_way(stage, "checkpoint", "target") as command:
        wait_for_pause(subject.supervisor)
        stage.images.rmdir()
        release_pause(stage, subject.supervisor)
    expect_refused(command.outcome, str(stage.images), "No such file or directory")
    assert not stage.images.exists()
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    subject.finish()


# ---- threads that will not stop --------------------------------------------------------------------------------------

@pytest.mark.parametrize("timeout_us", [1, 30, 300, 3000])
def test_threads_that_take_too_long_to_stop_are_let_go_of_undisturbed(own_stage, timeout_us):
    subject = Subject(own_stage)
    image = own_stage.images / "image.ckpt"
    for _ in range(5):
        outcome = checkpoint(own_stage, "--freeze-timeout", timeout_us / 1e6, "-o", image)
        print(outcome)
        expect_whole_or_nothing(own_stage, outcome, image)
        subject.expect_unharmed()
        subject.expect_supervisor_unharmed()
    own_stage.vmckpt_ok("checkpoint", "target", "-o", image)
    subject.finish()
    subject.expect_restartable(image)


WRITER_TO_A_FILE = """
import os, sys, threading, time
def write_again_and_again():
    file = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT)
    while True:
        os.pwrite(file, b"x", 0)
        time.sleep(0.002)
threading.Thread(target=write_again_and_again, daemon=True).start()
print("READY", flush=True)
while not os.path.exists(sys.argv[2]):
    time.sleep(0.002)
print("PASS", flush=True)
os._exit(0)
"""


@needs_root
def test_a_thread_in_an_uninterruptible_sleep_refuses_the_checkpoint_and_is_left_alone(own_stage):
    program = own_stage.file("writer.py", WRITER_TO_A_FILE)
    image = own_stage.images / "image.ckpt"
    with mounted(own_stage, "ext4", 16) as place:
        target = own_stage.launch(["/usr/bin/python3", program, place / "file", own_stage.go_file])
        target.wait_for_line("READY")
        pid = target.pid
        with frozen(place):
            asleep = wait_until(lambda: [tid for tid, view in threads_of(pid).items() if view.state == "D"],
                                "a thread sleeps uninterruptibly")
            begin_s = time.monotonic()
            outcome = checkpoint(own_stage, "--freeze-timeout", "0.5", "-o", image)
            assert time.monotonic() - begin_s < 10
            expect_refused(outcome, f"thread {asleep[0]}")
            assert files_in(own_stage.images) == []
            # The others go on at once. That one cannot be let go of before it wakes.
            running = {tid: view for tid, view in threads_of(pid).items() if tid not in asleep}
            assert all(view.state not in "tT" and view.tracer == 0 for view in running.values()), running
            wait_until(lambda: all(threads_of(pid)[tid].work > view.work for tid, view in running.items()),
                       "the other threads run")
        expect_all_threads_run(pid)
        own_stage.vmckpt_ok("checkpoint", "target", "-o", image)
        own_stage.vmckpt_ok("verify", image)
        own_stage.go()
        assert target.wait_for_end() == 0, target.report()
        assert target.lines() == ["READY", "PASS"]


# ---- a checkpoint that waits is no deaf supervisor -------------------------------------------------------------------

@contextlib.contextmanager
def a_thread_that_does_not_stop(stage):
    """A target of which one thread sleeps uninterruptibly until the block ends."""
    program = stage.file("writer.py", WRITER_TO_A_FILE)
    with mounted(stage, "ext4", 16) as place:
        target = stage.launch(["/usr/bin/python3", program, place / "file", stage.go_file])
        target.wait_for_line("READY")
        with frozen(place):
            wait_until(lambda: [tid for tid, view in threads_of(target.pid).items() if view.state == "D"],
                       "a thread sleeps uninterruptibly")
            yield target
        expect_all_threads_run(target.pid)
        stage.go()
        assert target.wait_for_end() == 0, target.report()


def is_checkpointing(stage):
    targets = json.loads(stage.vmckpt_ok("list", "--json").stdout)
    return [target["state"] for target in targets] == ["checkpointing"]


def expect_threads_run_again(target):
    """All but the one that sleeps."""
    def runs():
        views = threads_of(target.pid).values()
        return all(view.state == "D" or (view.state not in "tT" and view.tracer == 0) for view in views)
    wait_until(runs, "the threads that had been stopped run again")


@needs_root
def test_list_is_answered_while_a_freeze_waits_and_a_client_that_goes_away_ends_it(own_stage):
    with a_thread_that_does_not_stop(own_stage) as target:
        with command_under_way(own_stage, "checkpoint", "target", "--freeze-timeout", "300") as command:
            wait_until(lambda: is_checkpointing(own_stage), "the checkpoint is under way")
            begin_s = time.monotonic()
            assert is_checkpointing(own_stage)
            assert time.monotonic() - begin_s < 10
            command.process.send_signal(signal.SIGINT)
        wait_until(lambda: not is_checkpointing(own_stage), "the checkpoint is given up")
        expect_threads_run_again(target)
        assert files_in(own_stage.images) == []


@needs_root
def test_a_checkpoint_that_takes_longer_than_its_timeout_is_given_up(own_stage):
    with a_thread_that_does_not_stop(own_stage) as target:
        begin_s = time.monotonic()
        outcome = checkpoint(own_stage, "--freeze-timeout", "300", "--timeout", "0.5")
        assert time.monotonic() - begin_s < 30
        expect_refused(outcome, "took longer than 0.5 s", "--timeout")
        expect_threads_run_again(target)
        assert files_in(own_stage.images) == []


def test_a_second_checkpoint_waits_for_the_first_and_is_made_after_it(stage):
    subject = Subject(stage, fault="pause:write")
    with command_under_way(stage, "checkpoint", "target", "-o", stage.images / "first.ckpt") as first:
        wait_for_pause(subject.supervisor)
        with command_under_way(stage, "checkpoint", "target", "-o", stage.images / "second.ckpt") as second:
            assert is_checkpointing(stage)
            release_pause(stage, subject.supervisor)
            wait_for_pause(subject.supervisor)
            release_pause(stage, subject.supervisor)
    assert first.outcome[0] == 0 and second.outcome[0] == 0, (first.outcome, second.outcome)
    assert files_in(stage.images) == ["first.ckpt", "second.ckpt"]
    subject.finish()


@pytest.mark.parametrize("phase", ["quiesce", "drain", "seal"])
def test_a_client_that_goes_away_in_a_phase_leaves_the_target_running_and_no_image(stage, phase):
    subject = Subject(stage, fault=f"pause:{phase}")
    with command_under_way(stage, "checkpoint", "target") as command:
        wait_for_pause(subject.supervisor)
        command.process.kill()
        command.process.wait()
        release_pause(stage, subject.supervisor)
    wait_until(lambda: not is_checkpointing(stage), "the checkpoint is given up")
    subject.expect_unharmed()
    subject.expect_supervisor_unharmed()
    assert files_in(stage.images) == []
    subject.finish()


@pytest.mark.parametrize("option", ["--timeout", "--freeze-timeout"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e300"])
def test_a_limit_that_is_no_number_of_seconds_is_refused(stage, option, value):
    outcome = stage.vmckpt("checkpoint", "target", f"{option}={value}")
    assert outcome.status == 2 and f"{option} must be a number of seconds" in outcome.stderr, outcome


# ---- a debugger was faster -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["strace", "strace on one thread", "gdb"])
def test_a_target_under_a_debugger_is_refused_and_the_debugger_named(stage, name):
    tool = name.split()[0]
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed")
    target = stage.launch([stage.act("hash_chain"), stage.go_file])
    target.wait_for_line("READY")
    pid = target.pid
    traced = max(threads_of(pid)) if name == "strace on one thread" else pid
    words = {
        "strace": ["strace", "-f", "-q", "-o", "/dev/null", "-p", pid],
        "strace on one thread": ["strace", "-q", "-o", "/dev/null", "-p", traced],
        "gdb": ["gdb", "-q", "-nx", "-p", pid],
    }[name]
    debugger = stage.start(words, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: threads_of(pid)[traced].tracer == debugger.pid, "the debugger is attached")
    expect_refused(checkpoint(stage), f"{debugger.pid} ({tool})")
    assert files_in(stage.images) == []
    tracers = {view.tracer for view in threads_of(pid).values()}
    assert tracers <= {0, debugger.pid}, "threads that the debugger does not have are left alone"
    if tool == "gdb":
        debugger.communicate(b"detach\nquit\n", timeout=COMMAND_TIMEOUT_S)
    else:
        debugger.terminate()
        debugger.wait(timeout=COMMAND_TIMEOUT_S)
    expect_all_threads_run(pid)
    stage.vmckpt_ok("checkpoint", "target")
    stage.go()
    assert target.wait_for_end() == 0, target.report()
