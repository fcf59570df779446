# SPDX-License-Identifier: Apache-2.0
"""QEMU with -accel kvm and the guests that run where KVM emulates kernel-mode code, bare or under vmckpt.

Two kinds: `FirmwareGuest` (U-Boot, GRUB, memtest86+, SeaBIOS: Debian's packages, booted in seconds) and `LinuxGuest`
(tests/guests/kvm-linux). Both are `Guest`s, so starting, checkpointing, killing and restarting is that of guest.py.
"""

import dataclasses
import functools
import os
import pathlib
import re
import shutil
import stat
import subprocess
import sys
import time

import pexpect
import pexpect.fdpexpect
import pytest

from guest import QEMU, Guest, run_checked, run_guest_script, try_connect
from vmckpt_harness import ORDINARY_USER, REPOSITORY, ROOT, User

sys.path.insert(0, str(REPOSITORY / "tests" / "guests" / "kvm-linux"))
from kvm_options import KERNEL_OPTIONS, PROCESSOR, PROCESSOR_WITHOUT_IRQCHIP  # noqa: E402

KVM_GUEST_DIRECTORY = pathlib.Path(os.environ.get("VMCKPT_KVM_GUEST", REPOSITORY / "build" / "kvm-guest"))
KVM_GUEST_SOURCE = os.environ.get("VMCKPT_KVM_GUEST_SOURCE", "/usr/src/linux-source-6.1.tar.xz")

U_BOOT_ROM = pathlib.Path("/usr/lib/u-boot/qemu-x86/u-boot.rom")
MEMTEST = pathlib.Path("/boot/memtest86+x64.bin")
GRUB_MODULES = pathlib.Path("/usr/lib/grub/i386-pc")

# Guests boot for 10 to 30 s here, and several times longer where the host's processors are shared.
KVM_PATIENCE_S = 240



# ---- who may use KVM ------------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class KvmUser(User):
    """An ordinary user in one group: the one that /dev/kvm belongs to. No other privilege is needed."""

    group: int

    @property
    def prefix(self):
        return ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--groups", str(self.group), "--"]


def ordinary_kvm_user():
    """The ordinary user of the tests, with /dev/kvm's group where the tests may give it."""
    if os.getuid() != 0 or not os.path.exists("/dev/kvm"):
        return ORDINARY_USER
    device = os.stat("/dev/kvm")
    if device.st_gid != 0 and device.st_mode & stat.S_IWGRP:
        return KvmUser(ORDINARY_USER.name, ORDINARY_USER.uid, device.st_gid)
    return ORDINARY_USER


KVM_USERS = [ROOT, ordinary_kvm_user()]


@functools.lru_cache(maxsize=None)
def why_no_kvm(user):
    """Why this user cannot run VMs here, or None."""
    if not os.path.exists("/dev/kvm"):
        return "there is no /dev/kvm"
    if shutil.which(QEMU) is None:
        return f"there is no {QEMU}; install qemu-system-x86"
    if user.uid != os.getuid() and os.getuid() != 0:
        return f"to run as {user.name}, the tests must be started by root"
    probe = subprocess.run([*user.prefix, "/usr/bin/python3", "-c", "open('/dev/kvm', 'r+b', buffering=0)"],
                           capture_output=True, text=True, check=False)
    if probe.returncode != 0:
        return f"{user.name} may not open /dev/kvm: {probe.stderr.strip().splitlines()[-1]}"
    return None


@functools.lru_cache(maxsize=None)
def has_an_apic_of_its_own():
    """Whether this QEMU emulates the local APIC under KVM, as kernel-irqchip=off wants; that of Debian 13 does not."""
    command = [QEMU, "-accel", "kvm", "-machine", "pc,kernel-irqchip=off", "-nodefaults", "-display", "none", "-S",
               "-monitor", "stdio"]
    probe = subprocess.run(command, input="quit\n", capture_output=True, text=True, check=False)
    return "userspace APIC" not in probe.stderr


# ---- a guest that notices when it has met what the emulator lacks ---------------------------------------------------

def emulation_failure(log):
    """What QEMU says of an instruction that KVM could not emulate, shortened to a line; None if it says nothing."""
    if "KVM internal error" not in log:
        return None
    instruction_pointer = re.search(r"[RE]IP=([0-9a-f]+)", log)
    # "Code=89 e5 <9b> db e3": the byte at the instruction pointer stands in angle brackets.
    code = re.search(r"Code=.*?<([0-9a-f]{2})>((?: [0-9a-f]{2}){0,7})", log)
    where = f" at {instruction_pointer[1]}" if instruction_pointer else ""
    which = f", instruction bytes {code[1]}{code[2]}" if code else ""
    suberror = re.search(r"Suberror: (\d+)", log)
    return f"KVM internal error (suberror {suberror[1] if suberror else '?'}){where}{which}"


class WatchedConsole(pexpect.fdpexpect.fdspawn):
    """A console whose reader is told at once when the VM cannot go on, instead of waiting to the end of its patience.

    QEMU stays, paused, when KVM fails to emulate an instruction; it says so on stderr only.
    """

    def __init__(self, fd, why_stuck):
        super().__init__(fd, encoding="utf-8", codec_errors="replace", timeout=KVM_PATIENCE_S)
        self.delaybeforesend = None
        self._why_stuck = why_stuck

    def expect(self, pattern, timeout=-1, **more):
        patience_s = self.timeout if timeout == -1 else timeout
        deadline_s = time.monotonic() + patience_s
        while True:
            try:
                return super().expect(pattern, timeout=min(0.5, patience_s), **more)
            except (pexpect.TIMEOUT, pexpect.EOF) as error:
                reason = self._why_stuck()
                if reason is not None:
                    raise RuntimeError(f"{reason}, while the test waited for {pattern!r}") from error
                if isinstance(error, pexpect.EOF) or time.monotonic() >= deadline_s:
                    raise


class KvmGuest(Guest):
    """What both kinds have in common."""

    patience_s = KVM_PATIENCE_S

    def __init__(self, directory, *, machine="pc", irqchip="on", **arguments):
        super().__init__(directory, serial="socket", **arguments)
        self.machine = machine
        self.irqchip = irqchip

    def accelerator_arguments(self, machine):
        processor = PROCESSOR_WITHOUT_IRQCHIP if self.irqchip == "off" else PROCESSOR
        return ["-accel", "kvm", "-machine", f"{machine},kernel-irqchip={self.irqchip}", "-cpu", processor,
                # One core a socket: the BIOS's MP table, which guests without ACPI read, lists one processor a socket.
                "-smp", f"{self.processors},sockets={self.processors},cores=1,threads=1", "-m", str(self.memory_mib),
                "-nodefaults", "-display", "none",
                "-qmp", f"unix:{self.directory}/qmp.sock,server=on,wait=off",
                "-serial", f"unix:{self.directory}/serial.sock,server=on,wait=off"]

    def why_stuck(self):
        """Why nothing more will come, or None."""
        if not self._output_log.exists():
            return None
        said = self._output_log.read_text(encoding="utf-8", errors="replace")
        failure = emulation_failure(said)
        if failure is None and self._foreground is not None and self._foreground_has_ended():
            return f"it has ended: {said[-1000:]}"
        return failure

    def _wait_until(self, condition, what):
        def condition_or_reason():
            value = condition()
            reason = None if value else self.why_stuck()
            if reason is not None:
                raise RuntimeError(f"{reason}, while the test waited for {what}")
            return value
        return super()._wait_until(condition_or_reason, what)

    def connect_console(self):
        path = str(self.directory / "serial.sock")
        # QEMU listens again only when it has noticed that its old peer is gone, a moment after a restart.
        connection = self._wait_until(lambda: try_connect(path), f"a connection to {path}")
        self.console = WatchedConsole(connection.detach(), self.why_stuck)
        self._log_what_is_read(self.console)

    def start_bare(self):
        self._start(self.qemu_command(), is_vmckpt=False)
        self._connect_after_boot()

    def kill_restart(self, report):
        """The whole way: SIGKILL, and a new life from the image."""
        assert self.kill_9() == 128 + 9
        return self.restart(report["image"])


# ---- firmware and boot loaders --------------------------------------------------------------------------------------

class FirmwareGuest(KvmGuest):
    """A guest that is talked to over its serial port, and has no ticks."""

    def __init__(self, directory, arguments, *, prompt=None, **more):
        more.setdefault("memory_mib", 64)
        super().__init__(directory, network=False, **more)
        self.arguments = arguments
        self.prompt = prompt
        self.starts_paused = "-S" in arguments

    def qemu_command(self):
        return [QEMU, *self.accelerator_arguments(self.machine), *self.arguments, *self.qemu_arguments]

    def _connect_after_boot(self):
        self.connect_console()
        if not self.starts_paused:
            self.wait_for_boot()

    def wait_for_boot(self):
        if self.prompt is not None:
            # U-Boot and GRUB wait for a key for some seconds; a key that is not needed does no harm.
            self.console.expect("stop autoboot|" + self.prompt)
            self.console.send("\r")
            self.console.expect(self.prompt)
            self.command("echo ready")

    def restart(self, image):
        self.start_restart(image)
        self.connect_console()

    def command(self, line):
        """What the guest says to a line, without the echo of it."""
        self.console.send(line + "\r")
        # The echo first: an answer to the line before, or a prompt that came twice, is not taken for this one's.
        self.console.expect(re.escape(line) + "[\r\n]+")
        self.console.expect(self.prompt)
        return self.console.before.replace("\r", "").strip()


def u_boot(directory, *, more_arguments=(), **more):
    # Without PIT: its interrupt ends in an IRET in protected mode, which KVM's emulator lacks.
    more.setdefault("machine", "pc,hpet=off,pit=off")
    return FirmwareGuest(directory, ["-vga", "none", "-bios", str(U_BOOT_ROM), *more_arguments], prompt="(?:^|\n)=> ",
                         memory_mib=128, **more)


def grub(directory, **more):
    """GRUB's rescue shell, as a kernel that the BIOS loads: no disk is needed."""
    configuration = pathlib.Path(directory) / "grub.cfg"
    configuration.write_text("serial --unit=0 --speed=115200\nterminal_input serial\nterminal_output serial\n",
                             encoding="utf-8")
    core = pathlib.Path(directory) / "grub-core.img"
    run_checked(["grub-mkimage", "-O", "i386-pc", "-p", "/", "-c", str(configuration), "-o", str(core),
                 "serial", "terminal", "echo", "minicmd"])
    kernel = pathlib.Path(directory) / "grub.lnx"
    kernel.write_bytes((GRUB_MODULES / "lnxboot.img").read_bytes() + core.read_bytes())
    more.setdefault("machine", "pc,hpet=off")
    return FirmwareGuest(directory, ["-vga", "none", "-kernel", str(kernel)], prompt="grub rescue> ", **more)


def memtest(directory, **more):
    """memtest86+ with its one FWAIT, which the emulator lacks, made a NOP."""
    program = MEMTEST.read_bytes()
    fwait, nop = b"\x9b\xdb\xe3", b"\x90\xdb\xe3"  # FWAIT; FNINIT
    assert program.count(fwait) == 1, f"{MEMTEST} is not the program that this patch is for"
    kernel = pathlib.Path(directory) / "memtest.bin"
    kernel.write_bytes(program.replace(fwait, nop))
    more.setdefault("machine", "pc,hpet=off")
    return FirmwareGuest(directory, ["-vga", "std", "-kernel", str(kernel), "-append", "console=ttyS0,115200"], **more)


def sea_bios(directory, *, reboot_after_ms, **more):
    """The BIOS alone, with nothing to boot from, on the serial port. It starts anew after a while, for ever."""
    return FirmwareGuest(directory, ["-vga", "none", "-machine", "graphics=off", "-boot", f"reboot-timeout={reboot_after_ms}"],
                         **more)


# ---- Linux ----------------------------------------------------------------------------------------------------------

def build_kvm_guest():
    """Kernel and initramfs in KVM_GUEST_DIRECTORY; quick when they are up to date, some minutes when not.
    VMCKPT_KVM_GUEST names one that is ready."""
    if "VMCKPT_KVM_GUEST" in os.environ:
        return
    if not os.access(KVM_GUEST_SOURCE, os.R_OK):
        pytest.skip(f"no {KVM_GUEST_SOURCE}, which Debian 12 has; name another one, or a guest that is ready (VMCKPT_KVM_GUEST)")
    run_guest_script("kvm-linux", KVM_GUEST_DIRECTORY)


class LinuxGuest(KvmGuest):
    """The small Linux guest. `machine` is pc, q35 or microvm."""

    def __init__(self, directory, *, hpet=False, acpi=False, graphics=False, kernel_options=(), **more):
        more.setdefault("memory_mib", 64)
        more["options"] = {"tick_ms": 100, **more.get("options", {})}
        super().__init__(directory, **more)
        self.hpet = hpet
        self.acpi = acpi or hpet  # only ACPI tells the guest of the HPET
        self.graphics = graphics
        self.kernel_options = kernel_options

    def qemu_command(self):
        options = [*KERNEL_OPTIONS, *([] if self.acpi else ["acpi=off"]), *self.kernel_options,
                   *(f"{key}={value}" for key, value in self.options.items())]
        command = [QEMU, *self.accelerator_arguments(self._machine_with_properties()), "-no-reboot",
                   "-kernel", str(KVM_GUEST_DIRECTORY / "vmlinux"),
                   "-initrd", str(KVM_GUEST_DIRECTORY / "initramfs.cpio"),
                   "-append", " ".join(options), "-vga", "std" if self.graphics else "none"]
        bus = "device" if self.machine == "microvm" else "pci"
        command += ["-device", f"virtio-serial-{bus}", "-chardev", f"file,id=tick,path={self._tick_log},append=on",
                    "-device", "virtserialport,chardev=tick,name=tick",
                    "-device", f"virtio-rng-{bus}", "-device", f"virtio-balloon-{bus}"]
        if self.graphics:
            command += ["-device", "piix3-usb-uhci", "-device", "usb-tablet"]
        if self.disks:
            for name, file in (("raw", self.raw_disk), ("qcow2", self.qcow2_disk)):
                command += ["-drive", f"file={file},format={name},if=none,id={name}",
                            "-device", f"virtio-blk-{bus},drive={name}"]
        if self.network:
            forwarded = f"hostfwd=tcp:127.0.0.1:{self.http_port}-:80,hostfwd=tcp:127.0.0.1:{self.echo_port}-:7"
            rom = "" if self.machine == "microvm" else ",romfile="
            command += ["-netdev", f"user,id=net,{forwarded}", "-device", f"virtio-net-{bus},netdev=net{rom}"]
        return command + self.qemu_arguments

    def _machine_with_properties(self):
        if self.machine == "microvm":
            return "microvm,pit=on,pic=on,rtc=on,isa-serial=on,acpi=off"
        return f"{self.machine},hpet={'on' if self.hpet else 'off'}"

    # ---- disks of an image that is restarted more than once ---------------------------------------------------------

    def keep_disks(self):
        """Remembers the disks as they are now, for the image that was just made of a VM that has ended."""
        for disk in self._disk_files():
            run_checked(["cp", "--sparse=always", "--preserve=ownership,timestamps", str(disk), f"{disk}.kept"])

    def put_disks_back(self):
        # Written in place: an image knows the file, and not only its name.
        for disk in self._disk_files():
            run_checked(["cp", "--sparse=always", "--preserve=timestamps", f"{disk}.kept", str(disk)])

    def _disk_files(self):
        return [self.raw_disk, self.qcow2_disk] if self.disks else []

    # ---- what the guest knows ---------------------------------------------------------------------------------------

    def interrupts(self):
        """/proc/interrupts: counts of each line, one for each processor, by the line's number and name.

        Lines that have no name of their own (ERR, MIS) count for the whole machine and are left out.
        """
        text = self.console_command("cat /proc/interrupts")
        counts = {}
        for line in text.splitlines()[1:]:
            match = re.fullmatch(r"\s*(\w+):((?:\s+\d+)+)\s+(\S.*)", line)
            if match and len(match[2].split()) == self.processors:
                counts[f"{match[1]} {match[3].split()[-1]}"] = [int(count) for count in match[2].split()]
        return counts
