#!/usr/bin/python3
# SPDX-License-Identifier: Apache-2.0
"""How fast restart reads a program's memory, next to `cat` of the cached image to memory with all processors.

    tests/bench/memory.py [--mib 1024] [-n 5] [VMCKPT ...]      several binaries are measured in turn, in one run
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.realpath(__file__))
DEFAULT = os.environ.get("VMCKPT", os.path.join(HERE, "..", "..", "build", "vmckpt"))


def ending_option(vmckpt):
    """Older binaries call it --stop."""
    help_text = subprocess.run([vmckpt, "checkpoint", "--help"], stdout=subprocess.PIPE, text=True, check=True).stdout
    return "--kill" if "--kill" in help_text else "--stop"
PROGRAM = "import os, sys, time\nparts = [os.urandom(1 << 20) for _ in range({0})]\nblock = b''.join(parts)\nprint('READY', flush=True)\ntime.sleep(100000)"


def run(vmckpt, environment, *arguments):
    output = subprocess.run([vmckpt, *arguments], env=environment, check=True, capture_output=True, text=True).stdout
    return json.loads(output) if "--json" in arguments else output


def cat_us(image, copies):
    """All processors at once, each a part of the image, into files that lie in memory."""
    part = -(-os.path.getsize(image) // copies)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        started = time.monotonic()
        parts = [subprocess.Popen(["dd", f"if={image}", f"of={memory}/{i}", "bs=1M", f"skip={i * part}", f"count={part}",
                                   "iflag=skip_bytes,count_bytes", "status=none"]) for i in range(copies)]
        for process in parts:
            process.wait()
        return (time.monotonic() - started) * 1e6


def measure(vmckpt, options):
    """(bytes, [us of the phase that reads], [us of cat]) of one program, checkpointed once and restarted often."""
    with tempfile.TemporaryDirectory(prefix="vmckpt-bench-", dir=options.dir) as place:
        environment = {**os.environ, "VMCKPT_RUNTIME_DIR": place}
        with subprocess.Popen([vmckpt, "launch", "-n", "memory", "-d", place, "--", sys.executable, "-c",
                               PROGRAM.format(options.mib // 2)], env=environment, stdout=subprocess.PIPE, text=True) as target:
            target.stdout.readline()
            image = run(vmckpt, environment, "checkpoint", "memory", ending_option(vmckpt), "--json")["image"]
        plays, cats = [], []
        for _ in range(options.repetitions):
            cats.append(cat_us(image, len(os.sched_getaffinity(0))))
            restarted = run(vmckpt, environment, "restart", image, "--detach", "--json")
            plays.append(restarted["phases_us"]["play"])
            os.kill(restarted["pid"], 9)
            while run(vmckpt, environment, "list", "--json") not in ([], "[]"):
                time.sleep(0.01)
        return os.path.getsize(image), plays, cats


def main():
    parser = argparse.ArgumentParser(description="restart's reading of memory, next to cat")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("-n", "--repetitions", type=int, default=5)
    parser.add_argument("--dir", default="/var/tmp")
    parser.add_argument("vmckpt", nargs="*", default=[DEFAULT])
    options = parser.parse_args()
    for vmckpt in options.vmckpt:
        size, plays, cats = measure(os.path.realpath(vmckpt), options)
        play, cat = statistics.median(plays), statistics.median(cats)
        print(f"{vmckpt}: {size / 1e6:.0f} MB; play {min(plays) / 1000:.0f} {play / 1000:.0f} {max(plays) / 1000:.0f} ms, {size / play / 1000:.2f} GB/s; "
              f"cat {min(cats) / 1000:.0f} {cat / 1000:.0f} {max(cats) / 1000:.0f} ms, {size / cat / 1000:.2f} GB/s; {100 * cat / play:.0f} % of cat")


if __name__ == "__main__":
    main()
