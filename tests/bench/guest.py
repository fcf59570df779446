# SPDX-License-Identifier: Apache-2.0
"""The benchmark's guests: sizes, what they are doing, and the QEMU command line that all peers share."""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

REPOSITORY = os.path.realpath(os.path.join(os.path.dirname(__file__), "..", ".."))
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")

GUESTS = os.path.join(REPOSITORY, "tests", "guests")
sys.path.insert(0, os.path.join(GUESTS, "kvm-linux"))
import kvm_options      # noqa: E402

# Random data per guest size. The rest is left to the guest's kernel (1.6 % of RAM for its page table of pages alone)
# and its programs; more, and the guest runs out of memory while it fills.
FILL_MIB = {256: 128, 1024: 800, 4096: 3700}

STATES = ("idle", "full", "rewritten")

# Under a KVM that emulates the guest's kernel, a tick costs milliseconds; more often, and the guest does nothing else.
TICK_MS = {"tcg": 1, "kvm": 20}


@dataclass(frozen=True)
class GuestSpec:
    memory_mib: int
    state: str                  # one of STATES
    accelerator: str = "tcg"    # or "kvm"
    tick_ms: int = 1
    rewrite_mib_per_s: str = "max"

    @property
    def name(self):
        size = f"{self.memory_mib // 1024} GiB" if self.memory_mib >= 1024 else f"{self.memory_mib} MiB"
        return f"{'KVM ' if self.accelerator == 'kvm' else ''}{size} {self.state}"

    @property
    def fill_mib(self):
        return 0 if self.state == "idle" else FILL_MIB.get(self.memory_mib, self.memory_mib * 3 // 4)

    @property
    def ready_timeout_s(self):
        """Booting and filling, with the guest's kernel translated or emulated, on a host that has other things to do."""
        if self.accelerator == "kvm":
            return 240 + self.memory_mib // 8 + self.fill_mib // 2
        return 120 + self.fill_mib // 10


# Each accelerator's guest: where it is made from, where it is built, what it consists of.
SOURCES = {"tcg": "linux", "kvm": "kvm-linux"}
BUILT = {"tcg": os.environ.get("VMCKPT_GUEST", os.path.join(REPOSITORY, "build", "guest")),
         "kvm": os.environ.get("VMCKPT_KVM_GUEST", os.path.join(REPOSITORY, "build", "kvm-guest"))}
FILES = {"tcg": ("vmlinuz", "initramfs.cpio.gz"), "kvm": ("vmlinux", "initramfs.cpio")}


def prepare(directory, accelerator):
    """Builds kernel and initramfs where they are missing or old, and puts a copy into `directory`.

    Somebody may build them anew during a long run; what is measured stays the same guest.
    """
    script = os.path.join(GUESTS, SOURCES[accelerator], "build-guest.sh")
    subprocess.run([script, BUILT[accelerator]], check=True, stdout=subprocess.DEVNULL)
    for path in files(directory, accelerator):
        shutil.copyfile(os.path.join(BUILT[accelerator], os.path.basename(path)), path)


def files(directory, accelerator):
    return [os.path.join(directory, name) for name in FILES[accelerator]]


def why_not(accelerator):
    """A sentence saying why no guest runs here under this accelerator, or None."""
    if accelerator == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is missing, or may not be opened by this user"
    return None


def qemu_command(guest_directory, spec, tick_chardev, qmp_path, extra=(), serial="null"):
    """One vCPU, no disk, no network: nothing that one peer could save more cheaply than another.

    All peers get the same machine, since savevm and -incoming need the very same devices on both sides.
    """
    kernel, initramfs = files(guest_directory, spec.accelerator)
    options = {
        "tick_ms": spec.tick_ms,
        "fill_mib": spec.fill_mib or None,
        "rewrite_mib_per_s": spec.rewrite_mib_per_s if spec.state == "rewritten" else None,
    }
    words = [f"{name}={value}" for name, value in options.items() if value is not None]
    return [
        QEMU, *machine_options(spec.accelerator), "-smp", "1", "-m", str(spec.memory_mib),
        "-nodefaults", "-display", "none", "-no-reboot",
        "-kernel", kernel, "-initrd", initramfs,
        "-append", " ".join(kernel_options(spec.accelerator) + words),
        "-serial", serial,
        "-device", "virtio-serial-pci",
        "-chardev", tick_chardev,
        "-device", "virtserialport,chardev=tick,name=tick",
        "-chardev", f"socket,id=qmp,path={qmp_path},server=on,wait=off", "-mon", "chardev=qmp,mode=control",
        *extra,
    ]


def machine_options(accelerator):
    if accelerator == "kvm":
        return ["-accel", "kvm", "-M", "pc,hpet=off", "-cpu", kvm_options.PROCESSOR, "-vga", "none"]
    return ["-accel", "tcg", "-M", "pc", "-cpu", "max"]


def kernel_options(accelerator):
    if accelerator == "kvm":
        return [*kvm_options.KERNEL_OPTIONS, "acpi=off"]
    return ["console=ttyS0", "quiet", "panic=-1"]
