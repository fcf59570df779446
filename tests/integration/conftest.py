# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the integration tests: stages, as root and as an ordinary user."""

import os

import pytest

from vmckpt_harness import ORDINARY_USER, ROOT, VMCKPT, Stage

# What the engine is known not to do yet (docs/limits.md); a test that passes all the same is reported as such.
KNOWN_LIMITS = {
    "restarted-sysv_shm": "a System V segment comes back as shared memory that shmdt does not know",
    "restarted twice-sysv_shm": "a System V segment comes back as shared memory that shmdt does not know",
    "restarted-interval_timers": "the virtual interval timer comes back with too much or no time left",
    "restarted twice-interval_timers": "the virtual interval timer comes back with too much or no time left",
    "test_control_z_stops_the_program_and_fg_continues_it": "a supervisor stopped by Ctrl-Z answers no `list`",
    "test_faults.py": "the fault sweep is new: its findings have not been worked through",
    "test_checkpoint_storm.py": "timeouts that end early under 20 checkpoints per second have not been worked through",
    "test_ten_generations_of_checkpoint_kill_and_restart_lose_and_double_no_tick": "not yet reliable on a loaded machine",
}


def pytest_collection_modifyitems(items):
    for item in items:
        for part, reason in KNOWN_LIMITS.items():
            if part in item.nodeid:
                # The sweep leaves faulted supervisors behind while its findings stand: it is run by naming its file alone.
                run = part != "test_faults.py" or len(items) == sum(part in i.nodeid for i in items)
                item.add_marker(pytest.mark.xfail(reason=reason, strict=False, run=run))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failed test keeps its directory and says how to do it again by hand."""
    outcome = yield
    report = outcome.get_result()
    if not report.failed:
        return
    for stage in getattr(item, "stages", []):
        item.keep_stages = True
        replay = [f"cd {stage.work}", f"export VMCKPT_RUNTIME_DIR={stage.runtime}", *stage.history]
        report.sections.append(("how to replay; all files are still there", "\n".join(replay)))


@pytest.fixture
def make_stage(request):
    """Makes stages; all that runs on them ends with the test."""
    request.node.stages = []

    def make(user):
        if user.uid != os.getuid() and os.getuid() != 0:
            pytest.skip(f"to run as {user.name}, the tests must be started by root")
        stage = Stage(user)
        request.node.stages.append(stage)
        if user.uid != os.getuid() and stage.run(["test", "-x", VMCKPT]).status != 0 and os.path.exists(VMCKPT):
            pytest.skip(f"the {user.name} may not run {VMCKPT}; put the checkout where others can read it")
        return stage

    yield make
    for stage in request.node.stages:
        stage.clean_up()
        if not getattr(request.node, "keep_stages", False):
            stage.remove()


@pytest.fixture(params=[ROOT, ORDINARY_USER], ids=lambda user: user.name)
def user(request):
    return request.param


@pytest.fixture
def stage(make_stage, user):
    """One stage; the test runs as root and as an ordinary user."""
    return make_stage(user)


@pytest.fixture
def own_stage(make_stage):
    """One stage of whoever runs the tests."""
    return make_stage(ROOT if os.getuid() == 0 else ORDINARY_USER)
