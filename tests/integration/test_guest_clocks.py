# SPDX-License-Identifier: Apache-2.0
"""The clocks of a KVM guest that was away: they go on from where they stood, or, when asked to, after the gap.

The guest is busy: a scheduler whose clock jumps charges the gap to the task that ran, and lets it wait for as long.
"""

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time

import pytest

from guest import Tick, run_checked
from kvm_guest import KVM_USERS, LinuxGuest, build_kvm_guest, why_no_kvm
from vmckpt_harness import VMCKPT

AWAY_S = 10

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")


@dataclasses.dataclass
class SavedGuest:
    """A guest that has ended, and what its clocks said last."""

    guest: LinuxGuest
    image: str
    last: Tick
    stopped_at_s: float  # host's CLOCK_REALTIME

    def restart_after_the_gap(self, *options):
        """Returns the first tick of the new life, and how long the guest was away at least, in seconds."""
        time.sleep(max(0, self.stopped_at_s + AWAY_S - time.time()))
        away_s = time.time() - self.stopped_at_s
        return self.guest.restart(self.image, *options), away_s


@contextlib.contextmanager
def busy_guest(user):
    reason = why_no_kvm(user)
    if reason is not None:
        pytest.skip(reason)
    build_kvm_guest()
    directory = tempfile.mkdtemp(prefix="vmckpt-clock-", dir="/tmp")
    guest = LinuxGuest(directory, user=user, machine="microvm", network=False)
    if user.uid != os.getuid():
        os.chown(directory, user.uid, -1)
        if run_checked([*user.prefix, "test", "-r", VMCKPT], check=False).returncode != 0:
            pytest.skip(f"the {user.name} may not read {VMCKPT}; put the checkout where others can read it")
    try:
        guest.launch()
        for _ in range(2):
            guest.console_command("{ (while :; do :; done) & }")
        guest.wait_for_ticks(5)
        report = guest.checkpoint("--kill")
        guest.ended()
        yield SavedGuest(guest, report["image"], guest.last_tick(), time.time())
    finally:
        guest.destroy()
        shutil.rmtree(directory)


@pytest.fixture(scope="module", params=KVM_USERS, ids=lambda user: user.name)
def saved_guest(request):
    with busy_guest(request.param) as saved:
        yield saved


@pytest.fixture
def saved(saved_guest):
    yield saved_guest
    saved_guest.guest.destroy()


def realtime_error_s(guest):
    """How far the guest's CLOCK_REALTIME is from the host's. Ticks come late at times, and never early."""
    return max(guest.wait_for_ticks(1).realtime_us / 1e6 - time.time() for _ in range(5))


def kernel_complaints(guest):
    return guest.console_command("dmesg | grep -E 'stall|lockup|unstable|hung|BUG:|WARNING:'", check=False)


def test_a_busy_guest_goes_on_at_once_and_its_clocks_do_not_show_the_gap(saved):
    first, away_s = saved.restart_after_the_gap()
    ticks = [saved.last, first]
    for _ in range(20):
        ticks.append(saved.guest.wait_for_ticks(1))
    # By the guest's own clock: neither the gap nor a task that starves because it was charged for it.
    for before, after in zip(ticks, ticks[1:]):
        assert 0 < after.monotonic_us - before.monotonic_us < away_s * 1e6 / 2
    assert realtime_error_s(saved.guest) < -away_s / 2, "the guest's wall clock is behind, until somebody sets it right"
    assert kernel_complaints(saved.guest) == ""
    saved.guest.quit()


def test_asked_to_advance_the_clocks_of_the_guest_go_forward_by_the_gap(saved):
    first, away_s = saved.restart_after_the_gap("--guest-clock=advance")
    assert first.monotonic_us - saved.last.monotonic_us > away_s * 1e6
    assert abs(realtime_error_s(saved.guest)) < away_s / 4
    assert kernel_complaints(saved.guest) == ""
    saved.guest.quit()
