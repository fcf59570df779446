# SPDX-License-Identifier: Apache-2.0
"""Memory runs short while an image is written: the copy of the target's memory goes, the target stays."""

import contextlib
import os
import pathlib
import textwrap
import uuid

import pytest

from faults_helpers import (command_under_way, expect_refused, fault_in_environment, files_in, needs_strace, release_pause,
                            wait_for_pause)
from vmckpt_harness import VMCKPT, descendants_of, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

MEBIBYTES = 96
LIMIT = 160 << 20

PROGRAM = f"""
    import mmap, os, time
    memory = mmap.mmap(-1, {MEBIBYTES} << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    def write(byte):
        for at in range(0, len(memory), 4096):
            memory[at] = byte
    write(1)
    print("READY", flush=True)
    while not os.path.exists("rewrite"):
        time.sleep(0.01)
    write(2)
    print("REWRITTEN", all(memory[at] == 2 for at in range(0, len(memory), 4096)), flush=True)
    while not os.path.exists("end"):
        time.sleep(0.01)
"""


@contextlib.contextmanager
def cgroup_with_memory(limit):
    """A memory control group of version 1 or 2 below the root of its hierarchy."""
    name = f"vmckpt-test-{uuid.uuid4().hex}"
    if os.getuid() != 0:
        pytest.skip("to make control groups, the tests must be started by root")
    for line in pathlib.Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        root = pathlib.Path(place)
        if kind == "cgroup" and "memory" in options.split(","):
            limits = {"memory.limit_in_bytes": limit, "memory.memsw.limit_in_bytes": limit}
        elif kind == "cgroup2" and "memory" in (root / "cgroup.subtree_control").read_text().split():
            limits = {"memory.max": limit, "memory.swap.max": 0}
        else:
            continue
        group = root / name
        try:
            group.mkdir()
        except OSError as error:
            pytest.skip(f"a memory control group cannot be made: {error}")
        try:
            for file, value in limits.items():
                # Swap is limited only where the kernel accounts for it.
                if (group / file).exists():
                    (group / file).write_text(str(value))
            yield group
        finally:
            wait_until(lambda: not (group / "cgroup.procs").read_text(), "the control group is empty")
            group.rmdir()
        return
    pytest.skip("there is no memory controller")


@needs_strace
def test_when_memory_runs_short_the_copy_is_killed_and_not_the_target(make_stage, user):
    stage = make_stage(user)
    with cgroup_with_memory(LIMIT) as group:
        try:
            stage.file("program.py", textwrap.dedent(PROGRAM))
            with fault_in_environment(stage, "pause:resume"):
                target = stage.launch(["/usr/bin/python3", "program.py"],
                                      preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())))
            target.wait_for_line("READY")
            with command_under_way(stage, "checkpoint", "target") as command:
                wait_for_pause(target.supervisor.pid)
                copies = [pid for pid in descendants_of([target.supervisor.pid])
                          if pathlib.Path(f"/proc/{pid}/oom_score_adj").read_text().strip() == "1000"]
                assert len(copies) == 1
                stage.file("rewrite")
                assert target.wait_for_line("REWRITTEN") == "REWRITTEN True"
                release_pause(stage, target.supervisor.pid)
            expect_refused(command.outcome)
            assert files_in(stage.images) == []
            stage.file("end")
            assert target.wait_for_end() == 0
        finally:
            stage.clean_up()
