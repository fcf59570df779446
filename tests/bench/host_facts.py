# SPDX-License-Identifier: Apache-2.0
"""What a reader must know of a host before believing a number measured on it."""

import datetime
import os
import platform
import subprocess


def first_line(command):
    try:
        output = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
    except OSError:
        return None
    lines = output.stdout.splitlines()
    return lines[0].strip() if lines else None


def field_of(path, name):
    """The value of the first `name : value` line of a /proc file."""
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return None


def file_system_of(directory):
    """Device, type and options of the file system that holds `directory` (the longest mount point that fits)."""
    directory = os.path.realpath(directory)
    best = ("", "unknown")
    with open("/proc/self/mounts", encoding="utf-8") as mounts:
        for line in mounts:
            device, point, kind, options = line.split()[:4]
            inside = directory == point or directory.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):
                best = (point, f"{kind} on {device} ({options})")
    return best[1]


def collect(directory, qemu, vmckpt):
    """An ordered dict of strings, printed above every table and stored with every JSON report."""
    memory_kib = int(field_of("/proc/meminfo", "MemTotal").split()[0])
    load1, load5, _ = os.getloadavg()
    thp = "/sys/kernel/mm/transparent_hugepage/enabled"
    facts = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": field_of("/proc/cpuinfo", "model name") or platform.machine(),
        "cores": str(len(os.sched_getaffinity(0))),
        "hypervisor": first_line(["systemd-detect-virt", "--vm"]) or "unknown",
        "memory": f"{memory_kib // 1024} MiB",
        "kernel": platform.release(),
        "file system": file_system_of(directory),
        "huge pages": open(thp, encoding="ascii").read().strip() if os.path.exists(thp) else "none",
        "load before": f"{load1:.2f} {load5:.2f} (1 and 5 minutes; other work on the host makes timings worse)",
        "qemu": first_line([qemu, "--version"]) or "missing",
        "criu": first_line([os.environ.get("CRIU", "criu"), "--version"]) or "missing",
        "vmckpt": (first_line([vmckpt, "--version"]) or vmckpt) if os.path.exists(vmckpt) else "missing",
        "user": "root" if os.geteuid() == 0 else "not root",
    }
    return facts


def as_text(facts):
    width = max(len(name) for name in facts)
    return "".join(f"# {name:<{width}}  {value}\n" for name, value in facts.items())
