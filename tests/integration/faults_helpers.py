# SPDX-License-Identifier: Apache-2.0
"""What the fault tests need beyond the stage: faults put into a supervisor, and a close look at the target afterwards.

A system call of the supervisor is made to fail from outside, by `strace --inject`. The target is traced by its
supervisor and not by strace, so both may be traced at the same time, each by its own tracer.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import threading

import pytest

from vmckpt_harness import VMCKPT, descendants_of, process_is_alive, processes_marked, signal_process, wait_until

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="to mount file systems, the tests must be started by root")

# A command that has not answered by then hangs: nothing here takes a second on a machine that has nothing else to do.
COMMAND_TIMEOUT_S = 30
SETTLE_S = 20

CLOCK_NANOSLEEP = "230"  # the number of the call on x86-64


# ---- the threads of a process, from outside -------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class ThreadView:
    state: str
    tracer: int
    work: int  # rises whenever the thread has run


def read_thread(pid, tid):
    folder = pathlib.Path(f"/proc/{pid}/task/{tid}")
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines() if ":\t" in line)
    times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
    switches = int(status["voluntary_ctxt_switches"]) + int(status["nonvoluntary_ctxt_switches"])
    return ThreadView(status["State"][0], int(status["TracerPid"]), switches + sum(map(int, times)))


def threads_of(pid):
    views = {}
    for tid in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            views[int(tid)] = read_thread(pid, tid)
    return views


def descriptors_of(pid):
    found = {}
    for fd in sorted(os.listdir(f"/proc/{pid}/fd"), key=int):
        with contextlib.suppress(FileNotFoundError):
            found[int(fd)] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return found


def expect_all_threads_run(pid, but=()):
    """No thread is stopped or traced, and each has got the processor once more before long."""
    assert process_is_alive(pid), "the target has died"
    before = threads_of(pid)

    def still():
        now = threads_of(pid)
        return {tid: now.get(tid) for tid, view in before.items()
                if tid not in but and (tid not in now or now[tid].work == view.work)}

    def held():
        return {tid: view for tid, view in threads_of(pid).items() if view.state in "tT" or view.tracer != 0}

    wait_until(lambda: not held(), lambda: f"no thread stopped or traced, but there are {held()}", SETTLE_S)
    wait_until(lambda: not still(), lambda: f"all threads run, but these do not: {still()}", SETTLE_S)
    assert not held(), f"threads are stopped or traced: {held()}"


def forget_ended(stage):
    """Many short commands run here: their numbers may soon be those of others, whom the stage's end must not hit."""
    stage.started = [process for process in stage.started if process.poll() is None]


# ---- faults ---------------------------------------------------------------------------------------------------------

class Injection:
    """strace on a supervisor, with faults: `calls` are all that it looks at, `faults` are arguments of -e inject=."""

    def __init__(self, stage, pid, calls, faults):
        self.stage = stage
        self.log = stage.directory / "strace.log"
        self.log.unlink(missing_ok=True)
        said = stage.directory / "strace.stderr"
        words = ["strace", "-f", "-o", self.log, "-e", f"trace={calls}"]
        for fault in faults:
            words += ["-e", f"inject={fault}"]
        with open(said, "wb") as stderr:
            self.process = stage.start([*words, "-p", pid], stderr=stderr)
        wait_until(lambda: b"attached" in said.read_bytes() or self.process.poll() is not None, "strace attached")
        assert "attached" in said.read_text(), said.read_text()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(timeout=SETTLE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(timeout=SETTLE_S)
        forget_ended(self.stage)

    def names_of_calls(self, tid=None):
        """In order, as far as the calls had begun."""
        lines = [line.split(None, 1) for line in self.log.read_text(errors="replace").splitlines()]
        return [what.partition("(")[0] for who, what in lines
                if (tid is None or int(who) == tid) and "(" in what and not what.startswith(("<", "+", "-"))]

    def injected(self):
        """Lines of the calls that were made to fail."""
        return [line for line in self.log.read_text(errors="replace").splitlines()
                if "(INJECTED)" in line and "restart_syscall" not in line]


@contextlib.contextmanager
def fault_in_environment(stage, fault):
    """What is started inside has a named fault point set: kill:PHASE or pause:PHASE."""
    stage.environment["VMCKPT_FAULT"] = fault
    try:
        yield
    finally:
        del stage.environment["VMCKPT_FAULT"]


RELEASE_PAUSE = "restart_syscall:error=EINTR"  # its sleep goes on by this call once strace has looked at it


def sleeps_in_kernel(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/syscall").read_text().split()[0] == CLOCK_NANOSLEEP
    except (OSError, IndexError):
        return False


def wait_for_pause(pid):
    """Until a process stands at its pause:PHASE. All its other sleeps last at most 200 microseconds."""

    def main_thread_sleeps_long():
        if not any(sleeps_in_kernel(f"{pid}/task/{tid}") for tid in os.listdir(f"/proc/{pid}/task")):
            return False
        before = {tid: view.work for tid, view in threads_of(pid).items()}
        for _ in range(10):
            threading.Event().wait(0.003)
            if {tid: view.work for tid, view in threads_of(pid).items()} != before:
                return False
        return any(sleeps_in_kernel(f"{pid}/task/{tid}") for tid in os.listdir(f"/proc/{pid}/task"))

    wait_until(main_thread_sleeps_long, "the fault point that pauses")


def release_pause(stage, pid):
    with Injection(stage, pid, "restart_syscall", [RELEASE_PAUSE]) as injection:
        wait_until(lambda: "(INJECTED)" in injection.log.read_text() or not process_is_alive(pid), "the pause is over")


@contextlib.contextmanager
def command_under_way(stage, *words):
    """`vmckpt WORDS` in the background; after the block its attribute `outcome` is there."""

    class Command:
        outcome = None

    command = Command()
    process = stage.start([VMCKPT, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    command.process = process
    try:
        yield command
        stdout, stderr = process.communicate(timeout=COMMAND_TIMEOUT_S)
        command.outcome = (process.returncode, stdout.decode(), stderr.decode())
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        forget_ended(stage)


def expect_refused(outcome, *parts):
    """A failed command says one sentence that has all of `parts`."""
    status, _, stderr = outcome
    assert status == 1, outcome
    lines = stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("vmckpt: ") and len(lines[0]) > len("vmckpt: checkpoint: "), outcome
    for part in parts:
        assert part in lines[0], f"the message does not name {part!r}: {lines[0]}"


# ---- the program that all this must leave alone ---------------------------------------------------------------------

class Subject:
    """The storm program: threads in every blocking call, which count interruptions, wrong returns and lost tokens."""

    def __init__(self, stage, fault=None):
        self.stage = stage
        self.judged = 0  # how many lives of it have printed their counts
        with fault_in_environment(stage, fault) if fault else contextlib.nullcontext():
            self.target = stage.launch([stage.act("storm"), stage.go_file])
            self.target.wait_for_line("READY")
        pid = self.target.pid
        # By then each thread has opened what it opens at first.
        wait_until(lambda: all(view.work > 1 for view in threads_of(pid).values()), "all threads are at work")
        self.learn()

    def learn(self):
        """Notes how things are now; afterwards they must be the same."""
        self.pid = self.target.pid
        self.supervisor = self.target.supervisor.pid
        self.descriptors = descriptors_of(self.pid)
        self.supervisor_descriptors = descriptors_of(self.supervisor)
        self.family = descendants_of([self.supervisor])
        self.threads = len(threads_of(self.pid))

    def restart(self, image, fault=None):
        with fault_in_environment(self.stage, fault) if fault else contextlib.nullcontext():
            self.target.restart(image)
        forget_ended(self.stage)
        self.learn()

    def expect_unharmed(self):
        """The program runs as before, and nothing of a checkpoint is left in it or beside it."""
        expect_all_threads_run(self.pid)
        assert descriptors_of(self.pid) == self.descriptors
        assert len(threads_of(self.pid)) == self.threads

    def expect_supervisor_unharmed(self):
        assert process_is_alive(self.supervisor), "the supervisor has died"
        wait_until(lambda: descendants_of([self.supervisor]) == self.family,
                   lambda: f"no process left over, but {descendants_of([self.supervisor]) - self.family}", SETTLE_S)
        # The connection of the last client may have been there at first and have gone since.
        wait_until(lambda: descriptors_of(self.supervisor).items() <= self.supervisor_descriptors.items(),
                   lambda: f"no descriptor left over; there are {descriptors_of(self.supervisor)}, "
                           f"there were {self.supervisor_descriptors}", SETTLE_S)

    def expect_no_process_left(self, *gone):
        """Of all that belonged to it only `gone` is missing, and nothing has come."""
        expected = self.family - set(gone)
        wait_until(lambda: processes_marked(self.stage.mark) == expected,
                   lambda: f"only {expected} left; there are {processes_marked(self.stage.mark)}", SETTLE_S)

    def counts(self):
        lines = [line for line in self.target.lines() if line.startswith("{") and line.endswith("}")]
        return json.loads(lines[self.judged]) if len(lines) > self.judged else None

    def finish(self, between_stop_and_repair=False):
        """Lets the program come to its end and judges its counts. With or without a supervisor.

        The kernel makes some calls (epoll_wait, for one) answer EINTR when their thread is stopped, and the supervisor
        repairs that at once. One that is killed between the two leaves each thread with one EINTR at most.
        """
        self.stage.go()
        counts = wait_until(self.counts, lambda: f"the counts; {self.target.report()}")
        self.judged += 1
        wait_until(lambda: not process_is_alive(self.pid), "the program has ended")
        self.target.wait_for_end()
        forget_ended(self.stage)
        allowed = self.threads if between_stop_and_repair else 0
        assert counts["interrupted"] <= allowed, f"EINTR was seen {counts['interrupted']} times"
        assert counts["wrong"] == 0, "a call returned something unexpected"
        early = {name: timeout for name, timeout in counts["timeouts"].items() if timeout["early"]}
        # What was interrupted has ended early, too.
        assert sum(t["early"] for t in early.values()) <= counts["interrupted"], f"timeouts ended early: {early}"
        assert counts["sum"] == counts["expected_sum"], "money was made or destroyed"
        assert counts["transfers"] > 0
        for name, channel in counts["channels"].items():
            assert channel["sent"] == channel["received"] > 0, f"tokens by {name}: {channel}"
        return counts

    def expect_restartable(self, image):
        """The image is whole and a program comes out of it that goes on. The program itself must have ended."""
        self.stage.vmckpt_ok("verify", image)
        pathlib.Path(self.stage.go_file).unlink(missing_ok=True)
        self.restart(image)
        self.finish()


def files_in(directory):
    return sorted(str(path.relative_to(directory)) for path in pathlib.Path(directory).rglob("*"))


# ---- file systems of one's own ---------------------------------------------------------------------------------------

def must_run(*words):
    done = subprocess.run(list(map(str, words)), capture_output=True, timeout=COMMAND_TIMEOUT_S, check=False)
    if done.returncode != 0:
        pytest.skip(f"{' '.join(map(str, words))}: {done.stderr.decode().strip()}")


@contextlib.contextmanager
def mounted(stage, kind, mebibytes):
    """A small file system on its own directory."""
    if os.getuid() != 0:
        pytest.skip("to mount file systems, the tests must be started by root")
    place = stage.directory / f"small-{kind}"
    place.mkdir()
    if kind == "tmpfs":
        must_run("mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", place)
    else:
        disk = stage.directory / f"{kind}.disk"
        with open(disk, "wb") as file:
            file.truncate(mebibytes << 20)
        must_run(f"mkfs.{kind}", "-q", disk)
        must_run("mount", "-o", "loop", disk, place)
    try:
        os.chown(place, stage.user.uid, stage.user.uid)
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], timeout=COMMAND_TIMEOUT_S, check=False)


@contextlib.contextmanager
def frozen(place):
    """Whoever writes to the file system sleeps uninterruptibly. It thaws by itself should the test be killed."""
    safety = subprocess.Popen(["sh", "-c", 'sleep 30; fsfreeze --unfreeze "$1"', "sh", place], start_new_session=True,
                              stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        must_run("fsfreeze", "--freeze", place)
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place], timeout=COMMAND_TIMEOUT_S, check=False, capture_output=True)
        for pid in descendants_of([safety.pid]):
            signal_process(pid, signal.SIGKILL)
        safety.wait()
