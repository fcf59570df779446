# SPDX-License-Identifier: Apache-2.0
"""QEMU with -accel kvm: unmodified VMs are checkpointed, killed, restarted, and run on as if nothing had been.

Guests boot slowly where KVM emulates their kernel mode, so a Linux guest is booted once for each way to configure it,
checkpointed, and ended; each test then restarts it from that one image.

    VMCKPT_TEST_KVM_NATIVE=1            boots every guest without vmckpt too: where that fails, look at the guest
    VMCKPT_TEST_KVM_GENERATIONS=100     so many lives in a row, instead of 5
    VMCKPT_TEST_KVM_STORM=500           so many checkpoints of a running VM in a row, instead of 20
"""

import contextlib
import dataclasses
import os
import pathlib
import re
import secrets
import shutil
import tempfile
import time

import pytest

from guest import Tick, run_checked
from kvm_guest import (GRUB_MODULES, KVM_USERS, MEMTEST, U_BOOT_ROM, LinuxGuest, build_kvm_guest, emulation_failure,
                       grub, has_an_apic_of_its_own, memtest, sea_bios, u_boot, why_no_kvm)
from test_qemu_tcg import (assert_console_answers, assert_counts_on, assert_every_processor_runs,
                           assert_network_works, assert_qmp_answers, assert_random_numbers_flow,
                           close_and_check_disks)
from vmckpt_harness import VMCKPT, wait_until

GENERATIONS = int(os.environ.get("VMCKPT_TEST_KVM_GENERATIONS", "5"))
STORM_CHECKPOINTS = int(os.environ.get("VMCKPT_TEST_KVM_STORM", "20"))
EVERY_GUEST_NATIVE = os.environ.get("VMCKPT_TEST_KVM_NATIVE", "") not in ("", "0")

needs_vmckpt = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK),
                                  reason=f"{VMCKPT} is not built (meson setup build && ninja -C build)")
needs_u_boot = pytest.mark.skipif(not U_BOOT_ROM.exists(), reason=f"no {U_BOOT_ROM}; install u-boot-qemu")
needs_grub = pytest.mark.skipif(not GRUB_MODULES.exists() or shutil.which("grub-mkimage") is None,
                                reason="no GRUB for i386-pc; install grub-pc-bin and grub-common")
needs_memtest = pytest.mark.skipif(not MEMTEST.exists(), reason=f"no {MEMTEST}; install memtest86+")
# What a user may do differs at launch and restart, which other tests see to; this one is about the VM.
root_is_enough = pytest.mark.parametrize("user", KVM_USERS[:1], ids=lambda user: user.name)
image_of_root_is_enough = pytest.mark.parametrize("saved_whole", KVM_USERS[:1], ids=lambda user: user.name,
                                                  indirect=True)
native = pytest.mark.skipif(not EVERY_GUEST_NATIVE, reason="natively only with VMCKPT_TEST_KVM_NATIVE=1")


# ---- guests that end with their test, or with their image -----------------------------------------------------------

@contextlib.contextmanager
def guests_of(user, session):
    """Makes guests in directories of their own, which stay when a test failed meanwhile."""
    reason = why_no_kvm(user)
    if reason is not None:
        pytest.skip(reason)
    guests = []
    failures_before = session.testsfailed

    def make(kind, **arguments):
        if arguments.get("irqchip") == "off" and not has_an_apic_of_its_own():
            pytest.skip("this QEMU runs no VM under KVM without KVM's irqchip")
        directory = tempfile.mkdtemp(prefix="vmckpt-kvm-", dir="/tmp")
        guest = kind(directory, user=user, **arguments)
        guests.append(guest)
        if user.uid != os.getuid():
            os.chown(directory, user.uid, -1)
            for file in [VMCKPT] if os.path.exists(VMCKPT) else []:
                if run_checked([*user.prefix, "test", "-r", file], check=False).returncode != 0:
                    pytest.skip(f"the {user.name} may not read {file}; put the checkout where others can read it")
        return guest

    try:
        yield make
    finally:
        for guest in guests:
            guest.destroy()
            if session.testsfailed > failures_before:
                print(f"kept for a look: {guest.directory}")
            else:
                shutil.rmtree(guest.directory)


@pytest.fixture(params=KVM_USERS, ids=lambda user: user.name)
def user(request):
    return request.param


@pytest.fixture
def make_guest(request, user):
    with guests_of(user, request.session) as make:
        yield make


@dataclasses.dataclass(frozen=True)
class Configuration:
    """One way to run the Linux guest."""

    name: str
    guest: dict


# The first is the one for which everything is tested; the others are for what they have of their own.
WHOLE = Configuration("pc, 2 processors", {
    "machine": "pc", "processors": 2, "disks": True,
    "options": {"fill_mib": 4, "rewrite_mib_per_s": 5, "disk_period_ms": 500}})

# QEMU's own local APIC has no TSC deadline timer, but the guest sees the host's CPUID, which has.
NO_DEADLINE = ["lapic=notscdeadline"]
# The guest then lives on the interrupts of the PIT or the HPET, which Linux otherwise leaves alone once it is up.
NO_LOCAL_TIMER = [*NO_DEADLINE, "noapictimer"]

OTHERS = [
    Configuration("microvm, 1 processor", {"machine": "microvm"}),
    Configuration("microvm, 4 processors, split irqchip", {"machine": "microvm", "processors": 4, "irqchip": "split"}),
    Configuration("pc, split irqchip, PIT, graphics", {
        "machine": "pc", "irqchip": "split", "graphics": True, "kernel_options": NO_LOCAL_TIMER}),
    Configuration("pc, user-space irqchip", {"machine": "pc", "irqchip": "off", "kernel_options": NO_DEADLINE}),
    Configuration("q35, ACPI, HPET", {
        "machine": "q35", "hpet": True, "kernel_options": [*NO_LOCAL_TIMER, "clocksource=hpet"]}),
]


@dataclasses.dataclass
class SavedLinux:
    """An ended VM and its image, and what was true of it when the image was made."""

    guest: LinuxGuest
    report: dict
    configuration: Configuration
    last: Tick
    interrupts: dict
    live_lines: set  # interrupts whose counts rose while every device was used

    def restart(self):
        self.guest.put_disks_back()
        return self.guest.restart(self.report["image"])


def boot_and_save(make, configuration):
    build_kvm_guest()
    guest = make(LinuxGuest, **configuration.guest)
    guest.launch()
    before = guest.interrupts()
    use_every_device(guest)
    after = guest.interrupts()
    report = guest.checkpoint("--kill")
    guest.ended()
    guest.keep_disks()
    return SavedLinux(guest, report, configuration, guest.last_tick(), after,
                      risen(before, after))


@pytest.fixture(scope="module", params=KVM_USERS, ids=lambda user: user.name)
def saved_whole(request):
    with guests_of(request.param, request.session) as make:
        yield boot_and_save(make, WHOLE)


@pytest.fixture
def saved(saved_whole):
    """The image of the guest that has everything; whatever was restarted from it ends with the test."""
    yield saved_whole
    saved_whole.guest.destroy()


# ---- what a guest that runs rightly does ----------------------------------------------------------------------------

def risen(before, after):
    """The lines whose counts, over all processors, rose."""
    return {line for line, counts in after.items() if sum(counts) > sum(before.get(line, [0]))}


def use_every_device(guest):
    """Makes each device that the guest drives raise its interrupts."""
    assert_console_answers(guest)
    assert_random_numbers_flow(guest)
    # More than the driver has in its buffers, so that the device is asked.
    guest.console_command("dd if=/dev/hwrng of=/dev/null bs=512 count=1")
    guest.wait_for_ticks(2)
    if guest.network:
        guest.http_tick()
    if guest.disks:
        guest.console_command("for disk in vda vdb; do date > /disk/$disk/date; done; sync")


def assert_goes_on(saved, first):
    """The first tick of the new life follows the last one before, and all that the guest has works."""
    guest = saved.guest
    assert (first.nonce, first.counter) == (saved.last.nonce, saved.last.counter + 1)
    assert first.monotonic_us > saved.last.monotonic_us
    assert first.realtime_us > saved.last.realtime_us
    assert_counts_on(guest, saved.last.nonce)
    assert_qmp_answers(guest)
    assert_timers_of_processors_run(guest)
    assert_interrupts_go_on(saved)
    if guest.network:
        assert_network_works(guest, saved.last.nonce)
    assert_kernel_is_calm(guest)


def assert_timers_of_processors_run(guest):
    if "noapictimer" in guest.kernel_options:
        assert guest.console_command("nproc") == str(guest.processors)  # one timer is the whole machine's: line 0
    else:
        assert_every_processor_runs(guest)


# Interrupts from processor to processor. Which of them, and when, is up to the guest's scheduler.
BETWEEN_PROCESSORS = {"RES interrupts", "CAL interrupts", "TLB shootdowns"}


def assert_interrupts_go_on(saved):
    now = saved.guest.interrupts()
    fallen = {line: (counts, now[line]) for line, counts in saved.interrupts.items()
              if any(new < old for new, old in zip(now[line], counts))}
    assert not fallen, "interrupt counts live in guest RAM and cannot fall"
    use_every_device(saved.guest)
    live = risen(now, saved.guest.interrupts())
    assert saved.live_lines - BETWEEN_PROCESSORS - live == set(), "lines that were live and are dead"
    assert saved.guest.processors == 1 or live & BETWEEN_PROCESSORS


def assert_kernel_is_calm(guest):
    complaints = "stall|lockup|unstable|hung|BUG:|WARNING:|nobody cared|timed out"
    assert guest.console_command(f"dmesg | grep -E '{complaints}'", check=False) == ""


# ---- firmware and boot loaders --------------------------------------------------------------------------------------

@needs_vmckpt
@needs_u_boot
@pytest.mark.parametrize("irqchip", ["on", "split", "off"])
def test_u_boot_keeps_its_variables_and_memory(make_guest, irqchip):
    guest = make_guest(u_boot, irqchip=irqchip)
    guest.launch()
    nonce = secrets.token_hex(16)
    guest.command(f"setenv nonce {nonce}")
    guest.command(f"mw.l 1000000 {nonce[:8]} 8000")
    checksums = [guest.command("crc32 1000000 20000"), guest.command("crc32 fffe0000 10000")]

    guest.kill_restart(guest.checkpoint())

    assert guest.command("echo it was ${nonce}") == f"it was {nonce}"
    # RAM, and the read-only memory that the ROM is in.
    assert [guest.command("crc32 1000000 20000"), guest.command("crc32 fffe0000 10000")] == checksums
    # The timer and the clock go on, and so does checkpointing.
    guest.command("sleep 1")
    assert "Time:" in guest.command("date")
    guest.kill_restart(guest.checkpoint())
    assert guest.command("echo still ${nonce}") == f"still {nonce}"
    guest.quit()


@needs_vmckpt
@needs_u_boot
@root_is_enough
def test_a_second_processor_that_only_waits_stays_waiting(make_guest):
    """U-Boot starts it once and lets it halt."""
    guest = make_guest(u_boot, processors=2)
    guest.launch()
    guest.command("setenv nonce abc")
    guest.kill_restart(guest.checkpoint())
    assert guest.command("echo it was ${nonce}") == "it was abc"
    assert_qmp_answers(guest)
    guest.quit()


@needs_vmckpt
@needs_u_boot
def test_a_vm_that_has_not_run_its_first_instruction_boots_after_its_restart(make_guest):
    guest = make_guest(u_boot, more_arguments=["-S"], processors=2)
    guest.launch()
    assert_qmp_answers(guest, status="prelaunch")

    guest.kill_restart(guest.checkpoint())

    assert_qmp_answers(guest, status="prelaunch")
    guest.qmp("cont")
    guest.wait_for_boot()
    assert guest.command("echo up") == "up"
    guest.quit()


@needs_vmckpt
@needs_grub
def test_grub_keeps_its_variables(make_guest):
    guest = make_guest(grub)
    guest.launch()
    nonce = secrets.token_hex(16)
    guest.command(f"set nonce={nonce}")
    guest.kill_restart(guest.checkpoint())
    assert guest.command("echo it was $nonce") == f"it was {nonce}"
    guest.quit()


@needs_vmckpt
@needs_memtest
@root_is_enough
def test_the_counters_on_the_screen_of_memtest_go_on(make_guest):
    guest = make_guest(memtest)
    guest.launch()
    try:
        before = memtest_progress(guest)
    except RuntimeError as error:
        # Which of its code runs depends on the processor.
        if emulation_failure(str(error)):
            pytest.skip(f"memtest86+ does not run under this KVM: {error}")
        raise

    guest.kill_restart(guest.checkpoint())

    after = memtest_progress(guest)
    assert after >= before
    wait_until(lambda: memtest_progress(guest) > after, "progress on memtest's screen", 60)
    guest.quit()


def memtest_progress(guest):
    """Pass, percent of the pass done, number of the test: from one whole redraw of its screen, which comes by itself."""
    guest.console.expect(r"\x1b\[2;35H(?:\x1b\[[0-9;]*m)? *(\d+)%.*?#(\d+) .*?Pass: +(\d+) +Errors: (\d+)")
    percent, test, passes, errors = (int(group) for group in guest.console.match.groups())
    assert errors == 0
    return passes, percent, test


@needs_vmckpt
@pytest.mark.parametrize("machine", ["pc,hpet=off", "q35,hpet=on"])
@root_is_enough
def test_a_restarted_machine_resets_itself_again_and_again(make_guest, machine):
    """SeaBIOS finds nothing to boot, waits by its timer, and resets the machine."""
    guest = make_guest(sea_bios, machine=machine, reboot_after_ms=1000)
    guest.launch()
    guest.console.expect("No bootable device")
    guest.kill_restart(guest.checkpoint())
    for _ in range(2):
        guest.console.expect("SeaBIOS")
        guest.console.expect("No bootable device")
    guest.quit()


# ---- Linux ----------------------------------------------------------------------------------------------------------

@needs_vmckpt
@pytest.mark.parametrize("configuration", OTHERS, ids=lambda configuration: configuration.name)
@root_is_enough
def test_a_linux_vm_goes_on_from_its_checkpoint(make_guest, configuration):
    saved = boot_and_save(make_guest, configuration)
    first = saved.restart()
    assert_goes_on(saved, first)
    saved.guest.quit()


@needs_vmckpt
def test_an_smp_linux_vm_goes_on_from_its_checkpoint(saved):
    first = saved.restart()
    assert_goes_on(saved, first)
    close_and_check_disks(saved.guest)


@needs_vmckpt
@image_of_root_is_enough
def test_memory_that_both_processors_rewrite_is_of_one_moment_in_the_image(saved):
    saved.restart()
    for _ in range(2):
        assert "memory ok: 4 MiB" in saved.guest.console_command("check-memory")
        assert_counts_on(saved.guest, saved.last.nonce)
    saved.guest.quit()


@needs_vmckpt
@image_of_root_is_enough
def test_the_balloon_of_a_restarted_vm_inflates_and_deflates(saved):
    guest = saved.guest
    saved.restart()
    for wanted_mib in (guest.memory_mib - 8, guest.memory_mib):
        guest.qmp("balloon", value=wanted_mib << 20)
        wait_until(lambda wanted=wanted_mib: guest.qmp("query-balloon")["actual"] == wanted << 20,
                   f"a balloon that leaves {wanted_mib} MiB", 60)
    guest.quit()


@needs_vmckpt
@image_of_root_is_enough
def test_a_vm_paused_through_qmp_comes_back_paused_and_goes_on_when_told(saved):
    guest = saved.guest
    saved.restart()
    guest.wait_for_ticks(5)
    guest.qmp("stop")
    last = guest.last_tick()
    report = guest.checkpoint()
    guest.kill_9()

    guest.start_restart(report["image"])
    assert_qmp_answers(guest, status="paused")
    time.sleep(0.5)
    assert guest.last_tick() == last
    guest.qmp("cont")
    guest.connect_console()

    # QEMU itself sets the guest's clock back to when it was stopped: a paused VM's clock stands still.
    after = guest.wait_for_ticks(1)
    assert after.counter == last.counter + 1
    assert after.monotonic_us > last.monotonic_us
    assert_counts_on(guest, last.nonce)
    assert_every_processor_runs(guest)
    guest.quit()


@needs_vmckpt
def test_generations_of_checkpoint_kill_and_restart_lose_and_double_no_tick(saved):
    guest = saved.guest
    start = len(guest.ticks())
    first = saved.restart()
    assert first.counter == saved.last.counter + 1
    for _ in range(GENERATIONS):
        guest.wait_for_ticks(5)
        report = guest.checkpoint("--kill")
        guest.ended()
        last = guest.last_tick()
        first = guest.restart(report["image"])
        assert (first.nonce, first.counter) == (last.nonce, last.counter + 1)
        assert first.monotonic_us > last.monotonic_us
        pathlib.Path(report["image"]).unlink()  # a hundred of them would fill the disk

    counters = [tick.counter for tick in guest.ticks()[start:]]
    assert counters == list(range(saved.last.counter + 1, saved.last.counter + 1 + len(counters)))
    assert "memory ok" in guest.console_command("check-memory")
    assert_goes_on(dataclasses.replace(saved, last=last), first)
    close_and_check_disks(guest)


@needs_vmckpt
@image_of_root_is_enough
def test_a_storm_of_checkpoints_loses_no_tick(saved):
    """Up to 20 a second, each of the VM as it runs."""
    guest = saved.guest
    start = len(guest.ticks())
    saved.restart()
    image = guest.directory / "storm.ckpt"
    for _ in range(STORM_CHECKPOINTS):
        began_s = time.monotonic()
        guest.checkpoint("-o", str(image))
        time.sleep(max(0, began_s + 0.05 - time.monotonic()))
    counters = [tick.counter for tick in guest.ticks()[start:]]
    assert counters == list(range(saved.last.counter + 1, saved.last.counter + 1 + len(counters)))
    assert "memory ok" in guest.console_command("check-memory")
    assert_every_processor_runs(guest)
    assert_kernel_is_calm(guest)
    # What was written last is no worse for the hurry.
    guest.vmckpt("verify", image)
    guest.quit()


# ---- without vmckpt: where one of these fails, the guest or this host's KVM is at fault -------------------------------

@native
@needs_u_boot
@pytest.mark.parametrize("irqchip", ["on", "split", "off"])
def test_u_boot_runs_under_a_bare_qemu(make_guest, irqchip):
    guest = make_guest(u_boot, irqchip=irqchip)
    guest.start_bare()
    guest.command("setenv nonce abc")
    assert guest.command("echo it was ${nonce}") == "it was abc"
    assert guest.command("crc32 fffe0000 10000") == guest.command("crc32 fffe0000 10000")
    guest.quit()


@native
@needs_grub
def test_grub_runs_under_a_bare_qemu(make_guest):
    guest = make_guest(grub)
    guest.start_bare()
    guest.command("set nonce=abc")
    assert guest.command("echo it was $nonce") == "it was abc"
    guest.quit()


@native
@pytest.mark.parametrize("machine", ["pc,hpet=off", "q35,hpet=on"])
def test_sea_bios_resets_a_bare_qemu_again_and_again(make_guest, machine):
    guest = make_guest(sea_bios, machine=machine, reboot_after_ms=1000)
    guest.start_bare()
    for _ in range(2):
        guest.console.expect("SeaBIOS")
        guest.console.expect("No bootable device")
    guest.quit()


@native
@pytest.mark.parametrize("configuration", [WHOLE, *OTHERS], ids=lambda configuration: configuration.name)
@pytest.mark.parametrize("user", KVM_USERS[-1:], ids=lambda user: user.name)
def test_linux_runs_under_a_bare_qemu(make_guest, configuration):
    build_kvm_guest()
    guest = make_guest(LinuxGuest, **configuration.guest)
    guest.start_bare()
    before = guest.interrupts()
    use_every_device(guest)
    print(f"live interrupts: {risen(before, guest.interrupts())}")
    nonce = guest.last_tick().nonce
    assert_counts_on(guest, nonce)
    assert_qmp_answers(guest)
    assert_timers_of_processors_run(guest)
    assert_network_works(guest, nonce)
    assert_kernel_is_calm(guest)
    if guest.disks:
        assert "memory ok: 4 MiB" in guest.console_command("check-memory")
        close_and_check_disks(guest)
    else:
        guest.quit()
