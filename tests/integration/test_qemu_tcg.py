# SPDX-License-Identifier: Apache-2.0
"""QEMU with -accel tcg and a real Linux guest: checkpointed, killed, restarted, and running on as if nothing had been.

The guest (tests/guests/linux/README.md) counts in its RAM and signs with a nonce that it drew at boot. The same nonce
means the same guest; the counter says where it went on.
"""

import contextlib
import http.server
import os
import pathlib
import shutil
import statistics
import tempfile
import threading
import time

import pytest

from guest import GUEST_DIRECTORY, PATIENCE_S, Guest, build_guest, run_checked
from vmckpt_harness import VMCKPT, wait_until

needs_vmckpt = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK),
                                  reason=f"{VMCKPT} is not built (meson setup build && ninja -C build)")


@pytest.fixture(scope="module", autouse=True)
def linux_guest():
    build_guest()


@pytest.fixture
def make_guest(request):
    """Makes guests in directories of their own. They end with the test; a failed test's directory stays."""
    guests = []
    failures_before = request.session.testsfailed

    def make(user=None, **arguments):
        directory = tempfile.mkdtemp(prefix="vmckpt-qemu-", dir="/tmp")
        guest = Guest(directory, user=user, **arguments)
        guests.append(guest)
        if guest.user.uid != os.getuid():
            if os.getuid() != 0:
                pytest.skip(f"to run as {guest.user.name}, the tests must be started by root")
            os.chown(directory, guest.user.uid, -1)
            for file in (VMCKPT, GUEST_DIRECTORY / "vmlinuz"):
                if run_checked([*guest.user.prefix, "test", "-r", str(file)], check=False).returncode != 0:
                    pytest.skip(f"the {guest.user.name} may not read {file}; put the checkout where others can read it")
        return guest

    yield make
    failed = request.session.testsfailed > failures_before
    for guest in guests:
        guest.destroy()
        if failed:
            print(f"kept for a look: {guest.directory}")
        else:
            shutil.rmtree(guest.directory)


# ---- what a guest that runs rightly does ----------------------------------------------------------------------------

def assert_counts_on(guest, nonce):
    """Ticks keep coming, without gap, under the old nonce, at their usual pace."""
    guest.wait_for_ticks(30)
    # The log also holds ticks of earlier lives; of the newest 30, all are of this one.
    newest = guest.ticks()[-30:]
    assert {tick.nonce for tick in newest} == {nonce}
    assert [tick.counter for tick in newest] == list(range(newest[0].counter, newest[0].counter + 30))
    steps_us = [later.monotonic_us - earlier.monotonic_us for earlier, later in zip(newest, newest[1:])]
    tick_us = guest.options["tick_ms"] * 1000
    assert min(steps_us) > 0
    assert tick_us / 2 <= statistics.median(steps_us) <= tick_us * 3


def assert_clocks_went_on(before, after, host_elapsed_s):
    """Neither clock of the guest went back, nor further ahead than time went on outside."""
    allowed_us = (host_elapsed_s + 2) * 1_000_000
    assert 0 < after.monotonic_us - before.monotonic_us < allowed_us
    assert 0 < after.realtime_us - before.realtime_us < allowed_us


def assert_console_answers(guest):
    assert guest.console_command("echo it is $((6 * 7))") == "it is 42"


def assert_every_processor_runs(guest):
    assert guest.console_command("nproc") == str(guest.processors)
    for processor in range(guest.processors):
        # The interrupt count of each processor's own timer must rise, and a process bound to it must end.
        count = f"awk '/LOC:/ {{ print ${processor + 2} }}' /proc/interrupts"
        before = int(guest.console_command(count))
        guest.console_command(f"taskset {1 << processor:x} sleep 0.2")
        assert int(guest.console_command(count)) > before


def assert_qmp_answers(guest, status="running"):
    assert guest.qmp("query-status")["status"] == status
    assert len(guest.qmp("query-cpus-fast")) == guest.processors


def assert_random_numbers_flow(guest):
    read = "dd if=/dev/hwrng bs=16 count=1 2>/dev/null | xxd -p"
    first, second = guest.console_command(read), guest.console_command(read)
    assert len(first) == 32
    assert first != second


def assert_network_works(guest, nonce):
    """Both ways: the host asks the guest through a forwarded port, the guest asks a server on the host."""
    assert guest.http_tick().nonce == nonce
    with guest.connect_echo() as connection:
        connection.sendall(b"are you there?")
        assert connection.recv(100) == b"are you there?"
    with host_web_server(b"hello from the host\n") as port:
        assert guest.console_command(f"wget -q -O - http://10.0.2.2:{port}/") == "hello from the host"


@contextlib.contextmanager
def host_web_server(content):
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def assert_all_is_well(guest, nonce):
    assert_counts_on(guest, nonce)
    assert_console_answers(guest)
    assert_every_processor_runs(guest)
    assert_qmp_answers(guest)
    assert_random_numbers_flow(guest)
    if guest.network:
        assert_network_works(guest, nonce)


# ---- what disks must hold -------------------------------------------------------------------------------------------

def assert_file_system_is_clean(raw_disk):
    result = run_checked(["e2fsck", "-fn", str(raw_disk)], check=False)
    assert result.returncode == 0, result.stdout


def assert_records_are_gapless(raw_disk, at_least):
    """The writer's records are numbered from 0 and each is whole; returns how many there are."""
    text = run_checked(["debugfs", "-R", "cat /records", str(raw_disk)]).stdout
    records = text.splitlines()
    assert len(records) >= at_least
    for number, record in enumerate(records):
        assert len(record) == 63 and record.startswith(f"RECORD {number:012d} "), f"record {number} is {record!r}"
    return len(records)


def as_raw(qcow2_disk):
    raw = qcow2_disk.with_suffix(".as-raw")
    run_checked(["qemu-img", "convert", "-O", "raw", str(qcow2_disk), str(raw)])
    return raw


def assert_copies_survive_a_crash(guest):
    """The disks as they are now, with the guest's file systems mounted, are as good as after a power failure."""
    crash = guest.directory / f"crash-{time.monotonic_ns()}"
    crash.mkdir()
    raw = pathlib.Path(shutil.copy(guest.raw_disk, crash))
    qcow2 = pathlib.Path(shutil.copy(guest.qcow2_disk, crash))
    # Leaked clusters are what a crash may leave (qemu-img's status 3), errors are not.
    check = run_checked(["qemu-img", "check", str(qcow2)], check=False)
    assert check.returncode in (0, 3), check.stdout
    for disk in (raw, as_raw(qcow2)):
        run_checked(["e2fsck", "-p", "-E", "journal_only", str(disk)])
        assert_file_system_is_clean(disk)
        assert_records_are_gapless(disk, at_least=1)
    shutil.rmtree(crash)


def close_and_check_disks(guest):
    """Unmounts the guest's disks, ends it, and checks from outside what is on them."""
    said = dict(line.split()[1:] for line in guest.console_command("close-disks").splitlines() if "DISK" in line)
    guest.quit()
    assert "No errors were found" in run_checked(["qemu-img", "check", str(guest.qcow2_disk)]).stdout
    for device, disk in (("vda", guest.raw_disk), ("vdb", as_raw(guest.qcow2_disk))):
        assert_file_system_is_clean(disk)
        assert assert_records_are_gapless(disk, at_least=1) == int(said[device])


# ---- tests ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("serial", ["terminal", "socket"])
def test_the_guest_itself_works_under_a_bare_qemu(make_guest, processors, serial):
    """Nothing of vmckpt is in it: where this fails, look at the guest, not at the engine."""
    guest = make_guest(processors=processors, serial=serial, disks=True,
                       options={"fill_mib": 16, "rewrite_mib_per_s": 50})
    guest.start_bare()
    ticks = guest.ticks()
    assert ticks[0].counter == 1
    assert_all_is_well(guest, ticks[0].nonce)
    assert "memory ok: 16 MiB" in guest.console_command("check-memory")
    close_and_check_disks(guest)


@needs_vmckpt
@pytest.mark.parametrize("processors", [1, 2])
@pytest.mark.parametrize("serial", ["terminal", "socket"])
def test_a_vm_killed_with_sigkill_goes_on_from_its_checkpoint(make_guest, user, processors, serial):
    guest = make_guest(user, processors=processors, serial=serial)
    guest.launch()
    nonce = guest.last_tick().nonce
    before = guest.wait_for_ticks(10)
    checkpoint_began_s = time.monotonic()
    report = guest.checkpoint()
    after = guest.last_tick()

    # The checkpoint itself left the guest as it was.
    assert_all_is_well(guest, nonce)
    killed_at = guest.wait_for_ticks(10)
    assert guest.kill_9() == 128 + 9

    first = guest.restart(report["image"])
    assert first.nonce == nonce
    assert before.counter < first.counter <= after.counter + 1 < killed_at.counter
    assert_clocks_went_on(before, first, time.monotonic() - checkpoint_began_s)
    assert_all_is_well(guest, nonce)
    guest.quit()


@needs_vmckpt
def test_a_restarted_terminal_is_raw_so_that_ctrl_c_reaches_the_guest(make_guest, user):
    guest = make_guest(user, serial="terminal")
    guest.launch()
    report = guest.checkpoint("--kill")
    guest.restart(report["image"])

    guest.console.sendline("echo begun; sleep 1000")
    guest.console.expect("begun")
    time.sleep(0.3)  # until the shell has forked
    guest.console.sendcontrol("c")
    guest.console.expect("guest# ")

    assert_console_answers(guest)
    guest.quit()


@needs_vmckpt
@pytest.mark.parametrize("processors", [1, 2])
def test_disks_written_at_the_checkpoint_are_whole_at_once_and_after_running_on(make_guest, user, processors):
    guest = make_guest(user, processors=processors, disks=True)
    guest.launch()
    nonce = guest.wait_for_ticks(50).nonce
    stopped_from_s = time.monotonic()
    report = guest.checkpoint("--kill")
    guest.ended()
    last = guest.last_tick()

    assert_copies_survive_a_crash(guest)
    first = guest.restart(report["image"])
    assert (first.counter, first.nonce) == (last.counter + 1, nonce)
    assert_clocks_went_on(last, first, time.monotonic() - stopped_from_s)
    guest.wait_for_ticks(50)
    assert_all_is_well(guest, nonce)
    close_and_check_disks(guest)


@needs_vmckpt
def test_a_vm_paused_through_qmp_comes_back_paused_and_goes_on_when_told(make_guest, user):
    guest = make_guest(user, processors=2, disks=True)
    guest.launch()
    guest.wait_for_ticks(10)
    guest.qmp("stop")
    last = guest.last_tick()
    # A paused VM does not touch its disks any more, so they still fit the image when QEMU is killed later.
    report = guest.checkpoint()
    guest.kill_9()

    guest.start_restart(report["image"])
    assert_qmp_answers(guest, status="paused")
    time.sleep(0.5)
    assert guest.last_tick() == last
    guest.qmp("cont")
    guest.connect_console()

    assert guest.wait_for_ticks(1).counter == last.counter + 1
    assert_all_is_well(guest, last.nonce)
    close_and_check_disks(guest)


@needs_vmckpt
def test_a_disk_that_the_vm_itself_wrote_to_after_the_checkpoint_is_refused(make_guest, user):
    """What the guest has of it in memory would destroy its file system."""
    guest = make_guest(user, disks=True)
    guest.launch()
    image = guest.checkpoint()["image"]
    changed_at = [disk.stat().st_mtime_ns for disk in (guest.raw_disk, guest.qcow2_disk)]
    wait_until(lambda: all(disk.stat().st_mtime_ns != before
                           for disk, before in zip((guest.raw_disk, guest.qcow2_disk), changed_at)),
               "both disks have been written to", PATIENCE_S)
    guest.kill_9()
    refused = guest.vmckpt("restart", image, "--detach", check=False)
    assert refused.returncode == 1
    for disk in (guest.raw_disk, guest.qcow2_disk):
        assert f'"{disk}"' in refused.stderr
    assert "--changed-files=accept" in refused.stderr


@needs_vmckpt
def test_memory_that_is_rewritten_all_the_time_is_of_one_moment_in_the_image(make_guest, user):
    guest = make_guest(user, processors=2, memory_mib=256,
                       options={"fill_mib": 96, "rewrite_mib_per_s": "max"})
    guest.launch()
    report = guest.checkpoint()
    assert "memory ok: 96 MiB" in guest.console_command("check-memory")
    guest.kill_9()

    guest.restart(report["image"])
    assert "memory ok: 96 MiB" in guest.console_command("check-memory")
    # And it is being rewritten still.
    assert_counts_on(guest, guest.last_tick().nonce)
    assert "memory ok: 96 MiB" in guest.console_command("check-memory")
    guest.quit()


@needs_vmckpt
def test_ram_that_is_a_shared_file_is_that_of_the_checkpoint(make_guest):
    guest = make_guest(memory_mib=192)
    ram = guest.directory / "ram"
    guest.qemu_arguments += ["-object", f"memory-backend-file,id=ram,size=192M,mem-path={ram},share=on",
                             "-machine", "memory-backend=ram"]
    guest.launch()
    before = guest.last_tick()
    report = guest.checkpoint()
    after = guest.last_tick()
    killed_at = guest.wait_for_ticks(30)
    guest.kill_9()

    first = guest.restart(report["image"])
    assert first.nonce == before.nonce
    assert before.counter < first.counter <= after.counter + 1 < killed_at.counter
    assert_counts_on(guest, before.nonce)
    guest.kill_9()
    ram.unlink()  # on another host, say

    assert guest.restart(report["image"]).counter == first.counter
    assert_counts_on(guest, before.nonce)
    guest.quit()


@needs_vmckpt
def test_qemu_in_its_own_seccomp_sandbox_is_restarted(make_guest, user):
    guest = make_guest(user, qemu_arguments=["-sandbox", "on"])
    guest.launch()
    last = guest.wait_for_ticks(10)
    assert filters_of(guest.pid()) > 0
    report = guest.checkpoint()
    guest.kill_9()

    first = guest.restart(report["image"])
    assert first.nonce == last.nonce
    assert first.counter > last.counter
    # A restart must not free a program of the restrictions that it gave itself.
    assert filters_of(guest.pid()) > 0
    assert_all_is_well(guest, first.nonce)
    guest.quit()


def filters_of(pid):
    """How many seccomp filters the process is under, vmckpt's own included."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("Seccomp_filters:")))


@needs_vmckpt
def test_a_qemu_that_daemonized_itself_is_adopted_checkpointed_and_restarted(make_guest, user):
    guest = make_guest(user, qemu_arguments=["-daemonize"])
    guest.launch()
    last = guest.wait_for_ticks(10)
    report = guest.checkpoint()
    guest.kill_9()

    first = guest.restart(report["image"])
    assert first.nonce == last.nonce
    assert first.counter > last.counter
    assert_all_is_well(guest, first.nonce)
    guest.quit()


@needs_vmckpt
def test_connections_from_before_the_checkpoint_come_back_closed(make_guest):
    guest = make_guest()
    guest.launch()
    with guest.connect_echo() as connection:
        connection.sendall(b"first")
        assert connection.recv(100) == b"first"
        report = guest.checkpoint()
        connection.sendall(b"second")
        assert connection.recv(100) == b"second", "a checkpoint leaves connections alone"
        guest.kill_9()

    guest.restart(report["image"])
    # The guest's end must not hang for ever: slirp tells it, and its echo process ends.
    wait_until(lambda: guest.console_command("netstat -tn | grep -c ':7 .*ESTABLISHED'", check=False) == "0",
               "the end of the connection, as the guest sees it", PATIENCE_S)
    assert_all_is_well(guest, guest.last_tick().nonce)
    guest.quit()


@needs_vmckpt
def test_ten_generations_of_checkpoint_kill_and_restart_lose_and_double_no_tick(make_guest, user):
    guest = make_guest(user, processors=2, disks=True)
    guest.launch()
    nonce = guest.wait_for_ticks(10).nonce
    images = []
    for _ in range(10):
        report = guest.checkpoint("--kill")
        images.append(report["image"])
        first = guest.restart(images[-1])
        assert first.nonce == nonce
        guest.wait_for_ticks(10)
        assert_console_answers(guest)

    # The target stood still from the last tick in the log to its restart: so over all lives the log is gapless.
    ticks = guest.ticks()
    assert [tick.counter for tick in ticks] == list(range(1, len(ticks) + 1))
    assert len(set(images)) == 10, "each checkpoint has an image of its own"
    for image in images:
        guest.vmckpt("verify", image)
    assert_all_is_well(guest, nonce)
    close_and_check_disks(guest)
