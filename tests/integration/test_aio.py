# SPDX-License-Identifier: Apache-2.0
"""Linux AIO and io_uring: programs and VMMs that use the first are checkpointed under load, those that want the second are told."""

import os
import shutil

import pytest

from guest import GUEST_DIRECTORY, QEMU, build_guest
from test_qemu_tcg import assert_copies_survive_a_crash, close_and_check_disks, make_guest  # noqa: F401 (a fixture)
from vmckpt_harness import VMCKPT, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

needs_qemu = pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"{QEMU} is not installed")


def begin(stage, *arguments):
    target = stage.launch([stage.act("aio"), stage.go_file, *arguments])
    line = target.wait_for_line("READY", "SKIP: ")
    if line.startswith("SKIP: "):
        pytest.skip(line.removeprefix("SKIP: "))
    return target


def expect_pass(stage, target):
    stage.go()
    assert target.wait_for_line("PASS", "FAIL") == "PASS", target.report()
    assert target.wait_for_end() == 0


def test_requests_in_flight_end_before_the_image_is_made(stage):
    target = begin(stage, "load")
    for _ in range(20):
        image = target.checkpoint()
    target.kill()
    target.restart(image)
    for _ in range(5):
        image = target.checkpoint()
    target.kill()
    target.restart(image)
    expect_pass(stage, target)


def test_a_request_that_does_not_end_refuses_the_checkpoint_and_goes_on(stage):
    target = begin(stage, "poll")
    outcome = stage.vmckpt("checkpoint", target.name, "--freeze-timeout", "0.2")
    assert outcome.status == 1 and "1 asynchronous I/O requests in flight" in outcome.stderr, outcome
    expect_pass(stage, target)


def test_contexts_that_are_not_counted_are_refused_with_the_way_out(stage):
    target = stage.start([VMCKPT, "launch", "-n", "uncounted", "--allow-io-uring", "--", stage.act("aio"), stage.go_file],
                         stdout=open(stage.file("uncounted.out"), "wb"))
    wait_until(lambda: "READY" in (stage.work / "uncounted.out").read_text(), "READY")
    outcome = stage.vmckpt("checkpoint", "uncounted")
    assert outcome.status == 1 and "without --allow-io-uring" in outcome.stderr, outcome
    stage.go()
    assert target.wait() == 0


def test_whoever_asks_for_io_uring_is_told_what_to_use(stage):
    outcome = stage.vmckpt("launch", "--", "sh", "-c", "exit 3", "sh", "-drive", "file=disk,aio=io_uring")
    assert outcome.status == 3
    assert "io_uring" in outcome.stderr and "aio=threads or aio=native" in outcome.stderr, outcome


@needs_qemu
@pytest.mark.parametrize("processors", [2])
def test_a_vm_with_native_aio_is_checkpointed_while_it_writes_its_disks(make_guest, user, processors):  # noqa: F811
    build_guest()
    assert GUEST_DIRECTORY.is_dir()
    guest = make_guest(user, processors=processors, disks=True, drive_options=",aio=native,cache.direct=on")
    guest.launch()
    nonce = guest.wait_for_ticks(20).nonce
    assert "/[aio]" in open(f"/proc/{guest.pid()}/maps", encoding="utf-8").read()
    for _ in range(5):
        guest.checkpoint()
        guest.wait_for_ticks(2)
    for _ in range(2):
        report = guest.checkpoint("--kill")
        guest.ended()
        last = guest.last_tick()
        assert_copies_survive_a_crash(guest)
        first = guest.restart(report["image"])
        assert (first.counter, first.nonce) == (last.counter + 1, nonce)
        assert "/[aio]" in open(f"/proc/{guest.pid()}/maps", encoding="utf-8").read()
        guest.wait_for_ticks(20)
    close_and_check_disks(guest)
