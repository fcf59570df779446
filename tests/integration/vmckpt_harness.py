# SPDX-License-Identifier: Apache-2.0
"""A stage on which programs are launched under vmckpt, checkpointed, killed, restarted, and cleaned up after.

    stage = Stage(user)
    target = stage.launch([stage.act("registers"), stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    stage.go()
    assert target.wait_for_end() == 0

Nothing here sleeps for a fixed time and hopes: every wait has a condition and a deadline.
"""

import dataclasses
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import uuid

import pexpect

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
VMCKPT = os.environ.get("VMCKPT", str(REPOSITORY / "build" / "vmckpt"))
ACTS = pathlib.Path(os.environ.get("VMCKPT_ACTS", REPOSITORY / "build" / "tests" / "guests"))

# No step of a test takes longer, unless it hangs; busy hosts are slow, so this is generous.
PATIENCE_S = float(os.environ.get("VMCKPT_TEST_PATIENCE_S", "30"))

# Stands in the environment of all that a stage starts, so that whatever is left over can be found and ended.
MARK = "VMCKPT_TEST_STAGE"


# ---- who runs it ----------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class User:
    name: str
    uid: int

    @property
    def prefix(self):
        """Words before a command that make it run as this user."""
        if self.uid == os.getuid():
            return []
        return ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups", "--"]


ROOT = User("root", 0)
# A number without an entry in /etc/passwd: nothing may depend on one. Whoever is not root is an ordinary user already.
ORDINARY_USER = User("ordinary user", 4242 if os.getuid() == 0 else os.getuid())


# ---- small helpers --------------------------------------------------------------------------------------------------

def wait_until(condition, what, timeout_s=PATIENCE_S):
    """Returns the first true value of `condition()`."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what() if callable(what) else what}"
        time.sleep(0.003)


def process_is_alive(pid):
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def signal_process(pid, number):
    assert pid > 1  # 0 and -1 mean many processes to kill(2)
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass


def descendants_of(pids):
    """All processes below `pids`, these included."""
    children = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            stat = pathlib.Path(f"/proc/{entry}/stat").read_text()
        except OSError:
            continue
        children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry))
    found = set()
    left = list(pids)
    while left:
        pid = left.pop()
        if pid not in found:
            found.add(pid)
            left += children.get(pid, [])
    return found


def processes_marked(mark):
    word = f"{MARK}={mark}".encode()
    found = set()
    for entry in os.listdir("/proc"):
        if not entry.isdigit() or int(entry) == os.getpid():
            continue
        try:
            environment = pathlib.Path(f"/proc/{entry}/environ").read_bytes()
        except OSError:
            continue
        if word in environment.split(b"\0"):
            found.add(int(entry))
    return found


@dataclasses.dataclass
class Outcome:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def json(self):
        return json.loads(self.stdout)


# ---- the stage ------------------------------------------------------------------------------------------------------

class Stage:
    """A private directory (files, images, vmckpt's sockets) and all processes started from it, of one user."""

    def __init__(self, user=ROOT):
        self.user = user
        self.directory = pathlib.Path(tempfile.mkdtemp(prefix="vmckpt-test-", dir="/tmp"))
        self.directory.chmod(0o755)
        self.mark = uuid.uuid4().hex
        self.history = []  # command lines, for whoever wants to replay a failure by hand
        self.started = []  # Popen and pexpect objects
        self.targets = []
        self.images = self._own_directory("images")
        self.work = self._own_directory("work")
        self.runtime = self._own_directory("runtime", 0o700)
        if user.uid != os.getuid():
            os.chown(self.directory, user.uid, user.uid)
        self.go_file = str(self.directory / "go")
        self.environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.work),
            "LC_ALL": "C.UTF-8",
            "TERM": "xterm",
            "VMCKPT_RUNTIME_DIR": str(self.runtime),
            MARK: self.mark,
        }

    def _own_directory(self, name, mode=0o755):
        path = self.directory / name
        path.mkdir()
        path.chmod(mode)
        if self.user.uid != os.getuid():
            os.chown(path, self.user.uid, self.user.uid)
        return path

    def file(self, name, content=""):
        """A file in the working directory that belongs to the user."""
        path = self.work / name
        path.write_text(content)
        if self.user.uid != os.getuid():
            os.chown(path, self.user.uid, self.user.uid)
        return path

    def act(self, name):
        return str(ACTS / f"act_{name}")

    def go(self):
        """Lets the programs begin their third act."""
        pathlib.Path(self.go_file).touch()

    def _note(self, words):
        self.history.append(" ".join(shlex.quote(str(word)) for word in words))

    # -- commands that end by themselves

    def run(self, words, user=None, timeout_s=PATIENCE_S, **options):
        words = [*(user or self.user).prefix, *map(str, words)]
        self._note(words)
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("cwd", self.work)
        options.setdefault("env", self.environment)
        done = subprocess.run(words, capture_output=True, timeout=timeout_s, check=False, **options)
        return Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))

    def vmckpt(self, *words, **options):
        return self.run([VMCKPT, *words], **options)

    def vmckpt_ok(self, *words, **options):
        outcome = self.vmckpt(*words, **options)
        assert outcome.status == 0, f"vmckpt {' '.join(map(str, words))}: {outcome.stderr or outcome}"
        return outcome

    def list(self, user=None):
        return self.vmckpt_ok("list", "--json", user=user).json

    # -- commands that stay

    def start(self, words, **options):
        words = [*self.user.prefix, *map(str, words)]
        self._note(words)
        options.setdefault("stdin", subprocess.DEVNULL)
        options.setdefault("cwd", self.work)
        options.setdefault("env", self.environment)
        options.setdefault("start_new_session", True)
        process = subprocess.Popen(words, **options)
        self.started.append(process)
        return process

    def start_on_terminal(self, words, rows=24, columns=80):
        """The same on a terminal of its own: a pexpect object."""
        words = [*self.user.prefix, *map(str, words)]
        self._note(words)
        child = pexpect.spawn(words[0], words[1:], cwd=str(self.work), env=self.environment, dimensions=(rows, columns),
                              timeout=PATIENCE_S, encoding="utf-8", codec_errors="replace")
        child.delaybeforesend = None
        self.started.append(child)
        return child

    def launch(self, words, name="target", native=False, daemonises=False, **options):
        """A program in the foreground of `vmckpt launch` (or alone), its output in files."""
        target = Target(self, name, daemonises)
        prefix = [] if native else [VMCKPT, "launch", "-n", name, "-d", self.images, "--"]
        target.begin([*prefix, *words], **options)
        return target

    def clean_up(self):
        """Ends all that was started here, whoever may have adopted it, then removes the directory."""
        # One that was waited for has given its number away.
        pids = {process.pid for process in self.started
                if (process.poll() is None if isinstance(process, subprocess.Popen) else process.isalive())}
        everything = descendants_of(pids) - {os.getpid()}
        for _ in range(5):
            for pid in everything:
                signal_process(pid, signal.SIGKILL)
            everything = processes_marked(self.mark)
            if not everything:
                break
        for process in self.started:
            if isinstance(process, subprocess.Popen):
                process.wait(timeout=PATIENCE_S)
            else:
                process.close(force=True)

    def remove(self):
        shutil.rmtree(self.directory, ignore_errors=True)


class Target:
    """A program and its supervisor, through several lives. Output goes to files opened for appending."""

    def __init__(self, stage, name, daemonises=False):
        self.stage = stage
        self.name = name
        self.daemonises = daemonises  # the launched process ends early; a child of it, adopted, is what counts
        self.supervisor = None  # the foreground `vmckpt launch` or `vmckpt restart`; the program itself when native
        self.stdout = stage.file(f"{name}.stdout")
        self.stderr = stage.file(f"{name}.stderr")
        self.restarts = 0
        stage.targets.append(self)

    def begin(self, words, **options):
        with open(self.stdout, "ab") as stdout, open(self.stderr, "ab") as stderr:
            self.supervisor = self.stage.start(words, stdout=stdout, stderr=stderr, **options)

    # -- what it says

    def text(self):
        return self.stdout.read_text(errors="replace")

    def lines(self):
        return self.text().splitlines()

    def report(self):
        """All that was said, for messages of failed checks."""
        said = [f"{self.name} says:", self.text(), "and on stderr:", self.stderr.read_text(errors="replace")]
        for file in sorted(self.stage.work.glob(f"{self.name}.restart-*")):
            said += [f"{file.name}:", file.read_text(errors="replace")]
        return "\n".join(said)

    def wait_for_line(self, *starts, timeout_s=PATIENCE_S):
        """The first line that begins with one of `starts`."""

        def find():
            for line in self.lines():
                if line.startswith(starts):
                    return line
            return None

        def find_or_end():
            if self.daemonises or self.supervisor.poll() is None:
                return find()
            return find() or "(ended)"

        wanted = " or ".join(starts)
        line = wait_until(find_or_end, lambda: f"a line {wanted}; {self.report()}", timeout_s)
        assert line != "(ended)", f"ended with {self.supervisor.returncode} before {wanted}; {self.report()}"
        return line

    # -- what is done to it

    @property
    def pid(self):
        """Its pid as this process sees it."""
        for entry in self.stage.list():
            if entry["name"] == self.name:
                assert entry["pid"] > 1, f"no pid to send a signal to: {entry}"
                return entry["pid"]
        raise AssertionError(f"vmckpt list does not show {self.name}; {self.report()}")

    def checkpoint(self, *options):
        """Path of the image."""
        return pathlib.Path(self.checkpoint_report(*options)["image"])

    def checkpoint_report(self, *options):
        outcome = self.stage.vmckpt("checkpoint", self.name, "--json", *options)
        assert outcome.status == 0, f"checkpoint: {outcome.stderr or outcome}; {self.report()}"
        return outcome.json

    def kill(self):
        """As a crash would end it. Its supervisor follows."""
        os.kill(self.pid, signal.SIGKILL)
        status = self.wait_for_end()
        assert self.daemonises or status == 128 + signal.SIGKILL, f"ended with {status}; {self.report()}"

    def restart(self, image, name=None, options=()):
        self.name = name or self.name
        self.restarts += 1
        stdout = self.stage.file(f"{self.name}.restart-{self.restarts}.stdout")
        stderr = self.stage.file(f"{self.name}.restart-{self.restarts}.stderr")
        words = [VMCKPT, "restart", image, "-n", self.name, "--json", *options]
        with open(stdout, "ab") as out, open(stderr, "ab") as err:
            self.supervisor = self.stage.start(words, stdout=out, stderr=err)

        def report_line():
            for line in stderr.read_text(errors="replace").splitlines():
                if line.startswith("{") and line.endswith("}"):
                    return json.loads(line)
            return None

        wait_until(lambda: report_line() or self.supervisor.poll() is not None,
                   lambda: f"restart has not reported; {self.report()}")
        report = report_line()
        assert report is not None, f"restart ended with {self.supervisor.returncode}; {self.report()}"
        return report

    def wait_for_end(self, timeout_s=PATIENCE_S):
        """Status of the foreground command, as a shell would see it."""
        try:
            status = self.supervisor.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} has not ended within {timeout_s} s; {self.report()}") from None
        return 128 - status if status < 0 else status
