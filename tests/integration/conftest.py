# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the integration tests: stages, as root and as an ordinary user."""

import os

import pytest

from vmckpt_harness import ORDINARY_USER, ROOT, VMCKPT, Stage


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
