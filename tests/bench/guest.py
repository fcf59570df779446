# SPDX-License-Identifier: Apache-2.0
"""The benchmark's guests: sizes, what they are doing, and the QEMU command line that all peers share."""

import os
import shutil
import subprocess
from dataclasses import dataclass

REPOSITORY = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")

# Random data per guest size. The rest is left to the guest's kernel (1.6 % of RAM for its page table of pages alone)
# and its programs; more, and the guest runs out of memory while it fills.
FILL_MIB = {256: 128, 1024: 800, 4096: 3700}

STATES = ("idle", "full", "rewritten")


@dataclass(frozen=True)
class GuestSpec:
    memory_mib: int
    state: str                  # one of STATES
    tick_ms: int = 1
    rewrite_mib_per_s: str = "max"

    @property
    def name(self):
        size = f"{self.memory_mib // 1024} GiB" if self.memory_mib >= 1024 else f"{self.memory_mib} MiB"
        return f"{size} {self.state}"

    @property
    def fill_mib(self):
        return 0 if self.state == "idle" else FILL_MIB.get(self.memory_mib, self.memory_mib * 3 // 4)

    @property
    def ready_timeout_s(self):
        """Booting and filling under TCG, on a host that has other things to do."""
        return 120 + self.fill_mib // 10


def prepare(directory):
    """Builds kernel and initramfs where they are missing or old, and puts a copy into `directory`.

    Somebody may build them anew during a long run; what is measured stays the same guest.
    """
    built = os.environ.get("VMCKPT_GUEST", os.path.join(REPOSITORY, "build", "guest"))
    script = os.path.join(REPOSITORY, "tests", "guests", "linux", "build-guest.sh")
    subprocess.run([script, built], check=True, stdout=subprocess.DEVNULL)
    for path in files(directory):
        shutil.copyfile(os.path.join(built, os.path.basename(path)), path)


def files(directory):
    return os.path.join(directory, "vmlinuz"), os.path.join(directory, "initramfs.cpio.gz")


def qemu_command(guest_directory, spec, tick_chardev, qmp_path, extra=(), serial="null"):
    """One vCPU, no disk, no network: nothing that one peer could save more cheaply than another.

    All peers get the same machine, since savevm and -incoming need the very same devices on both sides.
    """
    kernel, initramfs = files(guest_directory)
    options = {
        "console": "ttyS0",
        "quiet": None,
        "panic": "-1",
        "tick_ms": spec.tick_ms,
        "fill_mib": spec.fill_mib or None,
        "rewrite_mib_per_s": spec.rewrite_mib_per_s if spec.state == "rewritten" else None,
    }
    flags = {"quiet"}
    words = [name if name in flags else f"{name}={value}" for name, value in options.items()
             if name in flags or value is not None]
    return [
        QEMU, "-accel", "tcg", "-M", "pc", "-cpu", "max", "-smp", "1", "-m", str(spec.memory_mib),
        "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", kernel, "-initrd", initramfs,
        "-append", " ".join(words),
        "-serial", serial,
        "-device", "virtio-serial-pci",
        "-chardev", tick_chardev,
        "-device", "virtserialport,chardev=tick,name=tick",
        "-chardev", f"socket,id=qmp,path={qmp_path},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        *extra,
    ]
