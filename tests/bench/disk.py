# SPDX-License-Identifier: Apache-2.0
"""dd as the yardstick of writing, and files in and out of the page cache."""

import os
import subprocess
import time


def dd_us(source, target, size_bytes):
    """Copies the first bytes of a file that is in the page cache, to the disk: `dd bs=1M conv=fsync`. Microseconds."""
    read_into_cache(source)
    started_ns = time.monotonic_ns()
    subprocess.run(["dd", f"if={source}", f"of={target}", "bs=1M", f"count={size_bytes}",
                    "iflag=count_bytes,fullblock", "conv=fsync", "status=none"], check=True)
    elapsed_us = (time.monotonic_ns() - started_ns) / 1000
    os.unlink(target)
    return elapsed_us


def read_into_cache(path):
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def evict(path):
    """Only clean pages go, so sync first. Needs no privilege, and leaves everybody else's cache alone."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
