# SPDX-License-Identifier: Apache-2.0
"""What surrounds a process: limits that forbid a snapshot, control groups, the screen of its terminal."""

import contextlib
import os
import pathlib
import textwrap

import pytest

from faults_helpers import fault_in_environment
from vmckpt_harness import ORDINARY_USER, ROOT, VMCKPT, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")


def end(stage, target):
    stage.go()
    wait_until(lambda: "PASS" in target.lines(), target.report)


# ---- no process more ------------------------------------------------------------------------------------------------

NO_FORK = textwrap.dedent("""\
    import os, resource, sys, time
    text = os.urandom(1 << 20)
    copy = bytes(bytearray(text))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    print("READY", flush=True)
    while not os.path.exists(sys.argv[1]):
        time.sleep(0.01)
    same = text == copy and resource.getrlimit(resource.RLIMIT_NPROC) == (0, 0)
    print("PASS" if same else "FAIL", flush=True)
    """)


def test_a_program_that_may_start_no_process_is_copied_while_it_is_stopped(make_stage):
    stage = make_stage(ORDINARY_USER)
    target = stage.launch(["/usr/bin/python3", "-c", NO_FORK, stage.go_file])
    target.wait_for_line("READY")
    report = target.checkpoint_report()
    assert any("could not be forked" in note for note in report["notes"]), report
    target.kill()
    target.restart(report["image"])
    end(stage, target)


# ---- another kernel's vdso ------------------------------------------------------------------------------------------

READS_CLOCKS = textwrap.dedent("""\
    import ctypes, os, sys, threading, time
    CLOCK_GETTIME, CLOCK_MONOTONIC = 228, 1
    libc = ctypes.CDLL(None)

    def asked_of_the_kernel():
        now = (ctypes.c_long * 2)()
        libc.syscall(CLOCK_GETTIME, CLOCK_MONOTONIC, now)
        return now[0] * 1_000_000_000 + now[1]

    def read_clocks():
        while not os.path.exists(sys.argv[1]):
            time.sleep(0.01)
        for _ in range(1000):
            before, here, after = asked_of_the_kernel(), time.monotonic_ns(), asked_of_the_kernel()
            right.append(before <= here <= after)

    def where_the_vdso_lies():
        return [line.split()[0] for line in open("/proc/self/maps") if line.rstrip().endswith("[vdso]")]

    right, old_place = [], where_the_vdso_lies()
    time.monotonic_ns()
    threads = [threading.Thread(target=read_clocks) for _ in range(3)]
    for thread in threads:
        thread.start()
    print("READY", flush=True)
    read_clocks()
    for thread in threads:
        thread.join()
    moved = where_the_vdso_lies() != old_place
    print("PASS" if all(right) and moved else f"FAIL {right.count(False)} wrong, moved: {moved}", flush=True)
    """)


def test_functions_of_another_kernels_vdso_go_on_as_this_kernels(stage):
    target = stage.launch(["/usr/bin/python3", "-c", READS_CLOCKS, stage.go_file])
    target.wait_for_line("READY")
    image = target.checkpoint()
    target.kill()
    with fault_in_environment(stage, "foreign-vdso"):  # as if the image were of another kernel
        target.restart(image)
    end(stage, target)


# ---- control groups -------------------------------------------------------------------------------------------------

@pytest.fixture
def control_group():
    """A folder in which processes can be put, and the line of /proc/PID/cgroup that shows it."""
    if os.getuid() != 0:
        pytest.skip("needs root, to make control groups")
    for line in pathlib.Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "cpuset":
            continue  # takes no process before it has been given processors
        for place in [controllers.removeprefix("name=")] if controllers else ["unified", "."]:
            group = pathlib.Path(f"/sys/fs/cgroup/{place}{path.rstrip('/')}/vmckpt-test-{os.getpid()}")
            try:
                group.mkdir()
            except OSError:
                continue
            if (group / "cgroup.procs").exists():
                yield group, f":{controllers}:{path.rstrip('/')}/{group.name}"
                # Empty when the stage has been cleaned up, which may come later: a name of its own is all that is left then.
                with contextlib.suppress(OSError):
                    group.rmdir()
                return
            group.rmdir()
    pytest.skip("no control group can be made here")


def begin_in(stage, group):
    target = stage.launch([stage.act("threads"), stage.go_file])
    target.wait_for_line("READY")
    (group / "cgroup.procs").write_text(str(target.pid))
    image = target.checkpoint()
    target.kill()
    return target, image


def test_a_process_comes_back_to_its_control_group(make_stage, control_group):
    group, line = control_group
    stage = make_stage(ROOT)
    target, image = begin_in(stage, group)
    target.restart(image)
    assert line in pathlib.Path(f"/proc/{target.pid}/cgroup").read_text()
    end(stage, target)


def test_a_control_group_that_has_gone_is_noted(make_stage, control_group):
    group, line = control_group
    stage = make_stage(ROOT)
    target, image = begin_in(stage, group)
    wait_until(lambda: not (group / "cgroup.procs").read_text(), group)
    group.rmdir()
    report = target.restart(image)
    assert any(group.name in note for note in report["notes"]), report
    assert line not in pathlib.Path(f"/proc/{target.pid}/cgroup").read_text()
    end(stage, target)


# ---- the screen -----------------------------------------------------------------------------------------------------

# As curses does it: a signal about the size leads to a new drawing when the size is another one.
FULL_SCREEN = textwrap.dedent("""\
    import os, signal, sys, time, tty
    tty.setraw(0)
    drawn = os.get_terminal_size(0)
    def look(*_):
        global drawn
        size = os.get_terminal_size(0)
        if size != drawn:
            drawn = size
            os.write(1, b"DRAWN for %d\\r\\n" % size.lines)
    signal.signal(signal.SIGWINCH, look)
    os.write(1, b"READY\\r\\n")
    while True:
        time.sleep(0.01)
    """)


def test_a_full_screen_program_draws_its_screen_anew_after_a_restart(stage):
    program = ["/usr/bin/python3", "-c", FULL_SCREEN]
    first = stage.start_on_terminal([VMCKPT, "launch", "-n", "screen", "-d", stage.images, "--", *program])
    first.expect("READY")
    stage.vmckpt_ok("checkpoint", "screen", "--kill")
    second = stage.start_on_terminal([VMCKPT, "restart", stage.images / "screen-1.ckpt"])
    second.expect("DRAWN for 23")
    second.expect("DRAWN for 24")
    assert os.get_terminal_size(second.child_fd).lines == 24
