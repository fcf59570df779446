# SPDX-License-Identifier: Apache-2.0
"""Guest RAM after a restart: it lies on the image, and must be anonymous memory to whoever gives parts of it back.

QEMU's balloon and free-page reporting discard guest RAM. What the guest is given back it can use, and what it kept is whole.
"""

import pathlib
import re

import pytest

from test_qemu_tcg import linux_guest, make_guest, needs_vmckpt  # noqa: F401  (fixtures)
from test_resources import begin, end
from guest import PATIENCE_S
from vmckpt_harness import wait_until

MEMORY_MIB = 256
FILLED_MIB = 64


def maps_of(pid):
    return pathlib.Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines()


def image_backed_bytes(pid, image):
    bounds = [line.split()[0].split("-") for line in maps_of(pid) if line.endswith(f" {image}")]
    return sum(int(stop, 16) - int(start, 16) for start, stop in bounds)


def resident_mib(pid):
    status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE).group(1)) // 1024


@needs_vmckpt
@pytest.mark.parametrize("generations", [1, 2])
def test_memory_that_a_vmm_made_for_its_guest_is_mapped_from_the_image(stage, generations):
    """Without this the acts with "guest-ram" would prove nothing."""
    target = begin(stage, "discarded_memory", "guest-ram")
    for _ in range(generations):
        image = target.checkpoint()
        target.kill()
        target.restart(image)
        (listed,) = stage.list()
        assert image_backed_bytes(listed["pid"], image) > 64 << 20
    end(stage, target)


@needs_vmckpt
def test_no_other_memory_is_mapped_from_the_image(stage):
    target = begin(stage, "discarded_memory")
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    (listed,) = stage.list()
    assert image_backed_bytes(listed["pid"], image) == 0
    end(stage, target)


def set_balloon(guest, mib):
    guest.qmp("balloon", value=mib << 20)
    # A busy guest gives what it can, a page at a time.
    wait_until(lambda: abs(guest.qmp("query-balloon")["actual"] - (mib << 20)) <= 4 << 20, f"a guest of {mib} MiB", PATIENCE_S)


def use_memory(guest, mib):
    """Lets the guest write to that much memory and read it back."""
    make = f"dd if=/dev/urandom of=/run/used bs=1M count={mib} 2>/dev/null"
    guest.console_command(f"{make} && md5sum /run/used > /run/sum && cp /run/used /run/copy && cmp /run/used /run/copy "
                          "&& md5sum -c /run/sum && rm /run/used /run/copy")


def assert_memory_is_whole(guest):
    assert f"memory ok: {FILLED_MIB} MiB" in guest.console_command("check-memory")


@needs_vmckpt
@pytest.mark.parametrize("generations", [1, 2])
def test_a_balloon_and_free_page_reporting_give_memory_back_after_a_restart(make_guest, generations):  # noqa: F811
    guest = make_guest(memory_mib=MEMORY_MIB, network=False, options={"fill_mib": FILLED_MIB},
                       qemu_arguments=["-device", "virtio-balloon-pci,free-page-reporting=on"])
    guest.launch()
    use_memory(guest, 48)
    for _ in range(generations):
        report = guest.checkpoint()
        guest.kill_9()
        guest.restart(report["image"])
        assert image_backed_bytes(guest.pid(), report["image"]) > FILLED_MIB << 20
        assert_memory_is_whole(guest)

    # Memory that the guest frees is reported free, and the host has it back.
    guest.console_command("dd if=/dev/urandom of=/run/big bs=1M count=80 2>/dev/null")
    full_mib = resident_mib(guest.pid())
    guest.console_command("rm /run/big")
    wait_until(lambda: resident_mib(guest.pid()) < full_mib - 40, "the reported pages to be given back", PATIENCE_S)
    assert_memory_is_whole(guest)
    use_memory(guest, 48)

    set_balloon(guest, 176)
    assert_memory_is_whole(guest)
    set_balloon(guest, MEMORY_MIB)
    use_memory(guest, 48)  # twice that: more than the 36 MiB that the balloon had left free, less than the guest has now
    assert_memory_is_whole(guest)
    guest.quit()
