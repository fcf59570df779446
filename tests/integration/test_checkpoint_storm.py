# SPDX-License-Identifier: Apache-2.0
"""Two hundred checkpoints in a row, one every 50 ms, of a busy multi-threaded program that counts what went wrong."""

import json
import os
import pathlib
import time

import pytest

from vmckpt_harness import VMCKPT, descendants_of

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

CHECKPOINTS = 200
PERIOD_S = 0.05
WARM_UP = 20  # what a process allocates once, it has allocated by then

# The kernel continues most calls where they were stopped. Some it lets fail with EINTR, even without a signal
# (man 7 signal), and tells nobody how much of their timeout was over. epoll_wait, the heart of every event loop, must
# come to its end all the same; these may begin anew with each checkpoint.
BEGIN_ANEW = {"sigtimedwait", "recv with SO_RCVTIMEO"}


def resources_of(pid):
    status = dict(line.split(":\t", 1) for line in pathlib.Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "descriptors": sorted(os.listdir(f"/proc/{pid}/fd"), key=int),
        "mappings": len(pathlib.Path(f"/proc/{pid}/maps").read_text().splitlines()),
        "threads": int(status["Threads"]),
        "resident_kb": int(status["VmRSS"].split()[0]),
    }


def expect_nothing_leaked(what, before, after, slack_kb):
    assert after["descriptors"] == before["descriptors"], f"descriptors of the {what}"
    assert after["threads"] == before["threads"], f"threads of the {what}"
    assert after["mappings"] <= before["mappings"] + 2, f"mappings of the {what}"  # the heap may grow beside itself
    assert after["resident_kb"] <= before["resident_kb"] + slack_kb, f"memory of the {what}"


def storm(stage, target, count):
    """Takes `count` checkpoints. The next is due 50 ms after the last was, or at once when that took longer."""
    pauses_us = []
    due = time.monotonic()
    for number in range(count):
        image = stage.images / f"storm-{number}.ckpt"
        report = target.checkpoint_report("-o", image)
        pauses_us.append(report["pause_us"])
        image.unlink()
        due = max(due + PERIOD_S, time.monotonic())
        time.sleep(max(0, due - time.monotonic()))
    return pauses_us


def expect_undisturbed(counts):
    assert counts["interrupted"] == 0, "EINTR was seen"
    assert counts["wrong"] == 0, "a call returned something unexpected"
    assert counts["sum"] == counts["expected_sum"], "money was made or destroyed"
    assert counts["transfers"] > 1000
    for name, channel in counts["channels"].items():
        assert channel["sent"] == channel["received"] > 100, name
    elapsed_ms = counts["elapsed_ms"]
    ticked_ms = counts["timerfd_ticks"] * counts["timerfd_period_ms"]
    assert elapsed_ms - 500 <= ticked_ms <= elapsed_ms + 10, "ticks were lost or doubled"
    for name, timeout in counts["timeouts"].items():
        assert timeout["early"] == 0, f"{name} ended early: {timeout}"
        if name not in BEGIN_ANEW:
            assert timeout["ended"] >= elapsed_ms / timeout["ms"] / 2, f"{name} was stretched"


def finish(stage, target):
    stage.go()
    counts = json.loads(target.wait_for_line("{"))
    assert target.wait_for_end() == 0, target.report()
    return counts


def test_two_hundred_checkpoints_in_a_row_disturb_nothing_and_leak_nothing(stage):
    target = stage.launch([stage.act("storm"), stage.go_file])
    target.wait_for_line("READY")
    pid, supervisor = target.pid, target.supervisor.pid
    storm(stage, target, WARM_UP)
    target_before, supervisor_before = resources_of(pid), resources_of(supervisor)
    pauses_us = storm(stage, target, CHECKPOINTS - WARM_UP)
    target_after, supervisor_after = resources_of(pid), resources_of(supervisor)

    expect_nothing_leaked("target", target_before, target_after, slack_kb=1024)
    expect_nothing_leaked("supervisor", supervisor_before, supervisor_after, slack_kb=2048)
    assert descendants_of([supervisor]) == {supervisor, pid}, "a snapshot is left over"
    assert list(stage.images.iterdir()) == []
    expect_undisturbed(finish(stage, target))
    assert len(pauses_us) == CHECKPOINTS - WARM_UP


def test_a_restarted_program_is_as_undisturbed_by_checkpoints(stage):
    target = stage.launch([stage.act("storm"), stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    storm(stage, target, 40)
    expect_undisturbed(finish(stage, target))
