#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""vmckpt's benchmarks: ours and its peers side by side, in one run, on one host. See README.md.

They report and never judge: the exit status says only whether the run itself worked.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.realpath(__file__)))

import cells            # noqa: E402
import guest            # noqa: E402
import host_facts       # noqa: E402
import overhead         # noqa: E402
import pause            # noqa: E402
import peers            # noqa: E402
import restart          # noqa: E402
import write            # noqa: E402
from peers.vmckpt import VMCKPT     # noqa: E402

GUEST_PARTS = {"pause": pause, "write": write, "restart": restart}


class Report:
    """Tables to standard output as they are finished, progress to standard error, everything into the JSON file."""

    def __init__(self, facts, json_path):
        self._started_s = time.monotonic()
        self._json_path = json_path
        self._stored = {"host": facts}
        sys.stdout.write(host_facts.as_text(facts))
        sys.stdout.flush()

    def progress(self, text):
        print(f"[{time.monotonic() - self._started_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    def section(self, explanation, text, **stored):
        sys.stdout.write(f"\n{explanation}\n\n{text}")
        sys.stdout.flush()
        self.store(**stored)

    def store(self, **stored):
        """Rewrites the file after every cell: a run of an hour that is interrupted keeps what it has."""
        self._stored.update(stored)
        if self._json_path:
            with open(self._json_path, "w", encoding="utf-8") as file:
                json.dump(self._stored, file, indent=1)
                file.write("\n")


def parse_arguments():
    parser = argparse.ArgumentParser(description="vmckpt's benchmarks, side by side with its peers")
    parser.add_argument("benchmark", choices=[*GUEST_PARTS, "guests", "overhead", "all"],
                        help="guests: pause, write and restart; all: overhead too")
    parser.add_argument("--quick", action="store_true",
                        help="256 MiB and 1 GiB, idle and full, warm cache, 3 repetitions and fewer peers")
    parser.add_argument("--accel", nargs="+", choices=guest.SOURCES, default=["tcg"],
                        help="QEMU's accelerators to measure guests under (default tcg)")
    parser.add_argument("-n", "--repetitions", type=int, help="samples per cell (default 5; 3 with --quick)")
    parser.add_argument("--memory-mib", type=int, nargs="+", metavar="MIB", help="guest sizes (default 256 1024 4096)")
    parser.add_argument("--states", nargs="+", choices=guest.STATES, help="what the guest does (default: all)")
    parser.add_argument("--peers", nargs="+", metavar="WORD", help="only peers whose name contains one of the words")
    parser.add_argument("--cache", choices=("warm", "cold", "both"), help="restart: page cache (default both)")
    parser.add_argument("--tick-ms", type=int, help="time between two ticks of the guest (default 1; 20 under KVM)")
    parser.add_argument("--rewrite", default="max", metavar="MIB/S",
                        help="rate of the guests that rewrite their memory (default max)")
    parser.add_argument("--dir", default="/var/tmp", help="where images go; its file system is what is measured")
    parser.add_argument("--json", metavar="FILE", help="also write everything, every sample included, to FILE")
    options = parser.parse_args()
    quick = options.quick
    options.repetitions = options.repetitions or (3 if quick else 5)
    options.memory_mib = options.memory_mib or ([256, 1024] if quick else [256, 1024, 4096])
    options.states = options.states or (["idle", "full"] if quick else list(guest.STATES))
    cache = options.cache or ("warm" if quick else "both")
    options.caches = ["warm", "cold"] if cache == "both" else [cache]
    for accelerator in options.accel:
        reason = guest.why_not(accelerator)
        if reason:
            parser.error(f"no guests under {accelerator}: {reason}")
    options.peers = [peer for peer in peers.ALL if wanted(peer, options)]
    return options


def wanted(peer, options):
    if options.peers:
        return any(word.lower() in peer.name.lower() for word in options.peers)
    return not (options.quick and peer.left_out_when_quick)


def run_guests(parts, options, report):
    """Every guest under every peer. Peers of one guest follow each other, so that they meet the host in one mood."""
    specs = [guest.GuestSpec(size, state, accelerator, options.tick_ms or guest.TICK_MS[accelerator], options.rewrite)
             for accelerator in options.accel for size in options.memory_mib for state in options.states]
    found = []
    try:
        for spec in specs:
            for peer in options.peers:
                report.progress(f"{spec.name}, {peer.name}")
                found.append(cells.run(peer, spec, parts, options))
                report.store(guests=[cell.as_json() for cell in found])
    finally:
        for name in parts:
            report.section(*GUEST_PARTS[name].show(found, options))


def main():
    options = parse_arguments()
    # Ended from outside, it must take its guests and images with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    options.dir = tempfile.mkdtemp(prefix="vmckpt-bench-", dir=options.dir)
    try:
        for accelerator in {*options.accel, "tcg"} if options.benchmark in ("overhead", "all") else options.accel:
            guest.prepare(options.dir, accelerator)
        facts = host_facts.collect(options.dir, guest.QEMU, VMCKPT)
        ticks = ", ".join(f"{name} with a tick in {options.tick_ms or guest.TICK_MS[name]} ms" for name in options.accel)
        facts["guests"] = f"1 vCPU, {ticks}, rewriting at {options.rewrite} MiB/s"
        report = Report(facts, options.json)
        parts = [name for name in GUEST_PARTS if options.benchmark in (name, "guests", "all")]
        if parts:
            run_guests(parts, options, report)
        if options.benchmark in ("overhead", "all"):
            overhead.run(options, report)
    finally:
        shutil.rmtree(options.dir, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
