# SPDX-License-Identifier: Apache-2.0
"""The guest's TICK lines with the host's time of their arrival: how a pause looks from outside the VM.

A guest's own clock cannot tell this, because some peers stop it during the pause and others do not.
"""

import ctypes
import os
import select
import socket
import threading
import time
from collections import namedtuple

# arrival_ns is CLOCK_MONOTONIC of the host; counter and nonce are the guest's (tests/guests/linux/README.md).
Tick = namedtuple("Tick", "arrival_ns counter nonce")

IN_MODIFY = 0x2  # linux/inotify.h


class NoTick(Exception):
    """The guest said nothing in the time it was given."""


class TickStream:
    """Collects ticks in a thread of its own until closed. Subclasses say where the bytes come from."""

    def __init__(self):
        self.ticks = []
        self._arrived = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self):
        self._closing = True
        self._thread.join()

    def last(self):
        with self._arrived:
            return self.ticks[-1] if self.ticks else None

    def wait_tick_after(self, time_ns, timeout_s):
        """The first tick that arrived after `time_ns`; waits for it if need be."""
        deadline = time.monotonic() + timeout_s
        with self._arrived:
            while not self.ticks or self.ticks[-1].arrival_ns <= time_ns:
                if not self._arrived.wait(max(0.0, deadline - time.monotonic())):
                    raise NoTick(f"no tick from the guest in {timeout_s} s")
            return next(tick for tick in self.ticks if tick.arrival_ns > time_ns)

    def gaps_us(self, from_ns, to_ns):
        """Times between successive arrivals, of the pairs that overlap the interval."""
        with self._arrived:
            arrivals = [tick.arrival_ns for tick in self.ticks]
        return [(after - before) / 1000 for before, after in zip(arrivals, arrivals[1:])
                if after > from_ns and before < to_ns]

    def _chunks(self):
        raise NotImplementedError

    def _run(self):
        rest = b""
        for chunk in self._chunks():
            arrival_ns = time.monotonic_ns()
            *lines, rest = (rest + chunk).split(b"\n")
            found = [self._parse(line, arrival_ns) for line in lines]
            with self._arrived:
                self.ticks += [tick for tick in found if tick]
                self._arrived.notify_all()

    @staticmethod
    def _parse(line, arrival_ns):
        # A reader that connects between two bytes sees the end of a line first; such a rest is no tick.
        words = line.split()
        if len(words) != 5 or words[0] != b"TICK" or not words[1].isdigit():
            return None
        return Tick(arrival_ns, int(words[1]), words[2].decode())


class SocketTicks(TickStream):
    """From a listening Unix socket of the VMM; connects as soon as it is there."""

    def __init__(self, path):
        self._path = path
        super().__init__()

    def _chunks(self):
        while not self._closing:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.connect(self._path)
            except (FileNotFoundError, ConnectionRefusedError):
                connection.close()
                # Not there yet. Half a millisecond is the resolution of "restart to next tick".
                time.sleep(0.0005)
                continue
            yield from self._from_connection(connection)
            connection.close()

    def _from_connection(self, connection):
        while not self._closing:
            if not select.select([connection], [], [], 0.1)[0]:
                continue
            try:
                chunk = connection.recv(65536)
            except ConnectionResetError:
                return
            if not chunk:
                return
            yield chunk


class FileTicks(TickStream):
    """From a file that the VMM appends to, for peers that cannot bring a socket back. Starts at its present end."""

    def __init__(self, path):
        self._file = open(path, "ab+", buffering=0)  # made here if the VMM has not made it yet
        self._file.seek(0, os.SEEK_END)
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._inotify = self._libc.inotify_init1(os.O_CLOEXEC)
        if self._libc.inotify_add_watch(self._inotify, path.encode(), IN_MODIFY) < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", path)
        super().__init__()

    def close(self):
        super().close()
        os.close(self._inotify)
        self._file.close()

    def rewind(self, size):
        """After the file was cut to `size` while nobody writes to it."""
        self._file.seek(size)

    def _chunks(self):
        while not self._closing:
            if select.select([self._inotify], [], [], 0.1)[0]:
                os.read(self._inotify, 65536)
                chunk = self._file.read(1 << 20)
                if chunk:
                    yield chunk
