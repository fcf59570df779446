# SPDX-License-Identifier: Apache-2.0
"""What a benchmark asks of a way to checkpoint and restart a guest.

One object is one guest: start(), any number of checkpoint(), and after kill() any number of restart() and kill() from
the newest checkpoint. Where and how long the pause was, the caller reads off `ticks`, alike for every peer.
"""

import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field

import guest
import tick_stream


class PeerFailed(Exception):
    """This peer could not do this here; the message says why, and stands in the table instead of numbers."""


@dataclass
class Checkpoint:
    total_us: float                                 # command given until the peer calls it done and the guest runs
    durable_us: float                               # the same with an fsync of the image, for peers that do none
    image_bytes: int
    files: list                                     # the biggest first
    engine_pause_us: float = None                   # the peer's own account, where it gives one
    writing_us: float = None                        # of these, the ones that put the image on the disk
    phases_us: dict = field(default_factory=dict)


@dataclass
class Restart:
    engine_restart_us: float = None
    phases_us: dict = field(default_factory=dict)


class Peer:
    name = None
    left_out_when_quick = False
    ticks_through_file = False      # else through a Unix socket, which needs no polling

    @classmethod
    def why_not(cls):
        """A sentence saying why this peer cannot run here, or None."""
        return None

    def __init__(self, spec, directory, guest_directory):
        self.spec = spec
        self.directory = directory
        self._guest_directory = guest_directory
        self.pid = None
        self.ticks = None
        self._process = None
        os.makedirs(directory, exist_ok=True)

    # To be filled in by each peer.

    def checkpoint(self, stop=False):
        """Saves the guest. With `stop` it need not run on: the caller kills it next."""
        raise NotImplementedError

    def restart(self):
        """Returns when the peer's command has been given; the guest may still have to come up."""
        raise NotImplementedError

    def extra_qemu_options(self):
        return []

    # Common to all.

    def start(self):
        """Returns when the guest has booted, filled its memory and ticks."""
        source = tick_stream.FileTicks if self.ticks_through_file else tick_stream.SocketTicks
        self.ticks = source(self.tick_path)
        started_ns = time.monotonic_ns()
        self._launch(self.qemu_command())
        deadline = time.monotonic() + self.spec.ready_timeout_s
        while True:
            try:
                self.ticks.wait_tick_after(started_ns, timeout_s=1)
                return
            except tick_stream.NoTick:
                if not process_exists(self.pid):
                    raise PeerFailed(f"the VMM ended while the guest booted; {self.log_tail()}") from None
                if time.monotonic() > deadline:
                    raise PeerFailed(f"the guest did not boot in {self.spec.ready_timeout_s} s") from None

    def kill(self):
        """SIGKILL, and wait until the process is gone: a successor needs its locks, sockets and PID."""
        if self.pid is None:
            return
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        else:
            kill_and_wait(self.pid)
        self.pid = self._process = None

    def close(self):
        self.kill()
        if self.ticks:
            self.ticks.close()

    def qemu_command(self, *more):
        if self.ticks_through_file:
            chardev = f"file,id=tick,path={self.tick_path},append=on"
        else:
            chardev = f"socket,id=tick,path={self.tick_path},server=on,wait=off"
        extra = [*self.extra_qemu_options(), *more]
        return guest.qemu_command(self._guest_directory, self.spec, chardev, self.qmp_path, extra)

    @property
    def tick_path(self):
        return os.path.join(self.directory, "tick")

    @property
    def qmp_path(self):
        return os.path.join(self.directory, "qmp")

    def _launch(self, command):
        """A child of ours in a session of its own, with no terminal."""
        with open(self.log_path, "ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                             start_new_session=True)
        self.pid = self._process.pid

    def run_command(self, command, env=None):
        """Runs a peer's command to its end and returns its standard output."""
        result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=env)
        if result.returncode != 0:
            said = (result.stderr or result.stdout).strip().splitlines()
            raise PeerFailed(f"{os.path.basename(command[0])} ended with status {result.returncode}: "
                             f"{said[-1] if said else 'without a word'}")
        return result.stdout

    @property
    def log_path(self):
        return os.path.join(self.directory, "log")

    def log_tail(self):
        with open(self.log_path, encoding="utf-8", errors="replace") as log:
            lines = log.read().strip().splitlines()
        return f"its last words: {lines[-1]}" if lines else "it said nothing"


def kill_and_wait(pid, timeout_s=30):
    """For processes that are not our children."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        # Readable when the last thread has ended, so descriptors and locks are gone, whoever reaps the zombie.
        if not select.select([pidfd], [], [], timeout_s)[0]:
            raise PeerFailed(f"process {pid} did not end in {timeout_s} s after SIGKILL")
    except ProcessLookupError:
        pass
    finally:
        os.close(pidfd)


def process_exists(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def elapsed_us(since_ns):
    return (time.monotonic_ns() - since_ns) / 1000


def sync_file(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def used_bytes(path):
    """What the file takes on disk: holes are not written, and not counted."""
    return os.stat(path).st_blocks * 512
