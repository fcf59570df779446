# SPDX-License-Identifier: Apache-2.0
"""bench/overhead: what it costs to run under `vmckpt launch` while nobody checkpoints.

Bare, launched and bare once more take short turns, the order rotating, and ratios are taken within a round: the host's
speed drifts by more than what is looked for, and runs next to each other drift least. "Bare once more" over bare is
what this host makes of no difference at all; a difference below that cannot be told. CPU time, which other work on the
host disturbs less than wall time, stands beside it, and so does the best launched run over the best bare one,
since disturbances only ever add.
"""

import os
import socket
import subprocess
import time

import guest
import summary
from peers.peer import PeerFailed, kill_and_wait
from peers.vmckpt import VMCKPT, Vmckpt, environment, launch_detached

HERE = os.path.dirname(os.path.realpath(__file__))
PROMPT = b"guest# "

# What the guest does: its kernel's CPU work (chacha), its shell's, system calls, processes; about 0.3 s each under TCG.
GUEST_WORK = {
    "random numbers": "dd if=/dev/urandom of=/dev/null bs=1M count=20 2>/dev/null",
    "shell loop": "i=0; while [ $i -lt 15000 ]; do i=$((i+1)); done",
    "system calls": "dd if=/dev/zero of=/dev/null bs=1 count=120000 2>/dev/null",
    "fork and exec": "i=0; while [ $i -lt 50 ]; do /bin/true; i=$((i+1)); done",
}


def run(options, report):
    reason = Vmckpt.why_not()
    if reason:
        report.progress(f"overhead: {reason}; only bare against bare is measured")
    kinds = ("bare", "again") if reason else ("bare", "launched", "again")

    for what, measure in (("program", measure_program), ("guest", measure_guest)):
        explanation = (
            f"overhead of a {what}: time under vmckpt launch over bare time, round by round; min median max.\n"
            "noise: bare once more over bare. best: shortest launched run over shortest bare one.")
        try:
            rounds = measure(options, report, kinds)
        except (subprocess.CalledProcessError, PeerFailed, OSError) as error:
            report.section(explanation, f"failed: {error}\n", **{f"overhead_{what}": {"failure": str(error)}})
            continue
        report.section(explanation, table(rounds),
                       **{f"overhead_{what}": {name: one.as_json() for name, one in rounds.items()}})


class Rounds:
    """The times of one thing, round after round; each a pair of wall and CPU time."""

    def __init__(self):
        self._wall_ns = {}
        self._cpu_ns = {}

    def add(self, by_kind):
        for kind, (wall_ns, cpu_ns) in by_kind.items():
            self._wall_ns.setdefault(kind, []).append(wall_ns)
            self._cpu_ns.setdefault(kind, []).append(cpu_ns)

    @property
    def bare_ns(self):
        return summary.Samples(self._wall_ns["bare"])

    def ratio(self, kind, clock):
        times = self._wall_ns if clock == "wall" else self._cpu_ns
        return summary.Samples(one / bare for one, bare in zip(times.get(kind, ()), times["bare"]) if bare)

    def best(self, kind):
        times = self._cpu_ns
        return min(times[kind]) / min(times["bare"]) if kind in times and min(times["bare"]) else None

    def as_json(self):
        return {"wall_ns": self._wall_ns, "cpu_ns": self._cpu_ns,
                **{f"{clock}_ratio_{kind}": samples.as_json() for clock in ("wall", "cpu")
                   for kind in ("launched", "again") if (samples := self.ratio(kind, clock))}}


def table(rounds):
    headings = ["what", "bare, each", "rounds", "launched: wall", "CPU", "best CPU", "noise: wall", "CPU", "best CPU"]
    rows = []
    for name, one in rounds.items():
        row = [name, duration(one.bare_ns.median), str(len(one.bare_ns.values))]
        for kind in ("launched", "again"):
            best = one.best(kind)
            row += [one.ratio(kind, "wall").text(1, 3), one.ratio(kind, "cpu").text(1, 3),
                    "-" if best is None else f"{best:.4f}"]
        rows.append(row)
    return summary.table(headings, rows)


def duration(ns):
    for unit, size in (("s", 1e9), ("ms", 1e6), ("us", 1e3)):
        if ns >= size:
            return f"{ns / size:.2f} {unit}"
    return f"{ns:.1f} ns"


def rotated(kinds, turn):
    """What always comes first would always meet the same host: just idle, or just busy."""
    turn %= len(kinds)
    return kinds[turn:] + kinds[:turn]


# ---- a program on the host ------------------------------------------------------------------------------------------


def measure_program(options, report, kinds):
    binary = os.path.join(options.dir, "overhead-load")
    subprocess.run([os.environ.get("CC", "cc"), "-O2", "-pthread", "-o", binary,
                    os.path.join(HERE, "overhead_load.c")], check=True)
    command = [binary, "30" if options.quick else "60"]     # milliseconds for each thing it does
    launch = [VMCKPT, "launch", "-n", "load", "-d", options.dir, "--"]
    env = environment(options.dir)

    rounds = {}
    report.progress("overhead: a program")
    for turn in range((2 if options.quick else 6) * options.repetitions):
        results = {}
        for kind in rotated(kinds, turn):
            output = subprocess.run((launch if kind == "launched" else []) + command, env=env, check=True,
                                    stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True).stdout
            results[kind] = {name: (float(wall), float(cpu)) for name, wall, cpu in map(str.split, output.splitlines())}
        for name in results["bare"]:
            rounds.setdefault(name, Rounds()).add({kind: results[kind][name] for kind in kinds})
    return rounds


# ---- a guest --------------------------------------------------------------------------------------------------------


def measure_guest(options, report, kinds):
    """All guests are up at once and work in turns; the others idle meanwhile, ticking once in ten seconds.

    Two QEMU processes differ a little by chance (where their memory came to lie), and go on differing, so every
    repetition boots them anew and takes a few rounds.
    """
    rounds = {}
    for repetition in range(2 if options.quick else options.repetitions):
        report.progress(f"overhead: guests, boot {repetition + 1}")
        guests = {}
        try:
            for kind in rotated(kinds, repetition):
                guests[kind] = WorkingGuest(options.dir, kind)
            rounds.setdefault("boot to prompt", Rounds()).add({kind: guests[kind].boot_ns for kind in kinds})
            for kind in kinds:
                for work in GUEST_WORK.values():
                    guests[kind].do(work)   # translates the code, which is not what is measured
            for turn in range(2 if options.quick else 6):
                for name, work in GUEST_WORK.items():
                    results = {kind: guests[kind].do(work) for kind in rotated(kinds, turn)}
                    rounds.setdefault(name, Rounds()).add(results)
        finally:
            for one in guests.values():
                one.close()
    return rounds


class WorkingGuest:
    """A guest whose root shell on the console is told what to do."""

    def __init__(self, guest_directory, kind):
        directory = os.path.join(guest_directory, kind)
        os.makedirs(directory, exist_ok=True)
        console = os.path.join(directory, "console")
        spec = guest.GuestSpec(256, "idle", tick_ms=10000)
        command = guest.qemu_command(guest_directory, spec, "null,id=tick", os.path.join(directory, "qmp"),
                                     serial=f"unix:{console},server=on,wait=off")
        started_ns = time.monotonic_ns()
        if kind == "launched":
            self._process = None
            self.pid = launch_detached(command, "guest", directory, os.path.join(directory, "log"))
        else:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            self.pid = self._process.pid
        self._console = None
        self._received = b""
        try:
            self._console = connect_when_there(console)
            self._wait(PROMPT)
        except OSError:
            self.close()
            raise
        self.boot_ns = (time.monotonic_ns() - started_ns, self._cpu_ns())

    def do(self, work):
        """Wall time and the VMM's CPU time of one piece of work, in ns."""
        # The shell's echo of the line must not look like the answer, hence the quotes inside the word.
        cpu_from_ns, started_ns = self._cpu_ns(), time.monotonic_ns()
        self._console.sendall(f"{work}; echo do''ne\n".encode())
        self._wait(b"\ndone")
        wall_ns, cpu_ns = time.monotonic_ns() - started_ns, self._cpu_ns() - cpu_from_ns
        self._wait(PROMPT)
        return wall_ns, cpu_ns

    def close(self):
        if self._console:
            self._console.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        else:
            kill_and_wait(self.pid)

    def _cpu_ns(self):
        # The CPU clock of a whole other process, as clock_getcpuclockid(3) makes it (linux: CPUCLOCK_SCHED = 2).
        return time.clock_gettime_ns((~self.pid << 3) | 2)

    def _wait(self, text):
        while text not in self._received:
            chunk = self._console.recv(65536)
            if not chunk:
                raise ConnectionError("the guest's console was closed")
            self._received += chunk
        self._received = self._received.partition(text)[2]


def connect_when_there(path, timeout_s=120):
    deadline = time.monotonic() + timeout_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(path)
            connection.settimeout(timeout_s)
            return connection
        except (FileNotFoundError, ConnectionRefusedError):
            connection.close()
            if time.monotonic() > deadline:
                raise
            time.sleep(0.001)
