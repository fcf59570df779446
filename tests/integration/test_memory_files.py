# SPDX-License-Identifier: Apache-2.0
"""Memory that is a file: whose content a restart shows, and whose data it must not touch."""

import mmap
import os
import pathlib
import subprocess

import pytest

from test_resources import begin, end, intermission, needs_vmckpt, variants
from vmckpt_harness import ROOT, VMCKPT, wait_until

pytestmark = needs_vmckpt


@pytest.fixture
def segment(stage):
    """The path of a segment in /dev/shm for the act, removed in the end."""
    path = pathlib.Path(f"/dev/shm/vmckpt-{stage.mark}")
    yield path
    path.unlink(missing_ok=True)


def scribble(segment):
    """What the program, or somebody else, does to the memory after the checkpoint."""
    with open(segment, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        memory[0:65536] = b"\xaa" * 65536
        memory[-4096:] = b"\xbb" * 4096


def checkpoint_and_kill(stage, segment, *options, **arguments):
    target = begin(stage, "shared_memory_file", segment.name, *arguments.get("words", []))
    report = target.checkpoint_report(*options)
    scribble(segment)
    target.kill()
    return target, report


@pytest.mark.parametrize("words", [[], ["keep-open"]], ids=["mapped only", "open, too"])
@variants
def test_shared_memory_with_a_path_is_what_it_was(stage, segment, words, variant):
    target = begin(stage, "shared_memory_file", segment.name, *words, native=variant == "native")
    intermission(stage, target, variant)
    end(stage, target)


def test_its_content_is_that_of_the_checkpoint_not_that_of_the_kill(stage, segment):
    target, report = checkpoint_and_kill(stage, segment)
    assert not any(str(segment) in note for note in report["notes"])
    target.restart(report["image"])
    end(stage, target)


@pytest.mark.parametrize("words", [[], ["keep-open"]], ids=["mapped only", "open, too"])
def test_it_is_made_again_where_it_is_missing(stage, segment, words):
    target, report = checkpoint_and_kill(stage, segment, words=words)
    segment.unlink()
    target.restart(report["image"])
    assert segment.stat().st_uid == stage.user.uid
    end(stage, target)


def expect_refusal(stage, report, *words):
    outcome = stage.vmckpt("restart", report["image"], "--detach", "-n", "refused")
    assert outcome.status == 1, outcome
    for word in words:
        assert str(word) in outcome.stderr


def test_what_somebody_else_uses_is_not_overwritten(stage, segment):
    target, report = checkpoint_and_kill(stage, segment)
    script = ("import mmap, sys, time; file = open(sys.argv[1], 'r+b'); memory = mmap.mmap(file.fileno(), 0); "
              "print('mapped', flush=True); time.sleep(600)")
    user = stage.start(["/usr/bin/python3", "-c", script, segment], stdout=subprocess.PIPE)
    assert user.stdout.readline() == b"mapped\n"
    before = segment.read_bytes()
    expect_refusal(stage, report, segment, "in use", user.pid, "--shared-files")
    assert segment.read_bytes() == before
    user.kill()
    user.wait()
    target.restart(report["image"])
    end(stage, target)


def test_another_file_of_that_name_is_not_overwritten_unless_that_is_asked_for(stage, segment):
    target, report = checkpoint_and_kill(stage, segment)
    size = segment.stat().st_size
    replacement = segment.with_name(segment.name + ".new")
    replacement.write_bytes(b"\xcc" * size)
    replacement.chmod(0o640)
    os.chown(replacement, stage.user.uid, stage.user.uid)
    os.replace(replacement, segment)
    expect_refusal(stage, report, segment, "another file", "--shared-files")
    assert segment.read_bytes() == b"\xcc" * size
    stage.vmckpt_ok("restart", report["image"], "--detach", "-n", "left", "--shared-files=leave")
    assert segment.read_bytes() == b"\xcc" * size
    os.kill(next(entry["pid"] for entry in stage.list() if entry["name"] == "left"), 9)
    wait_until(lambda: stage.list() == [], "the restarted target has ended")
    stage.vmckpt_ok("restart", report["image"], "--detach", "-n", "overwritten", "--shared-files=overwrite")
    assert segment.read_bytes() != b"\xcc" * size


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_another_users_file_is_not_taken_for_it_though_inode_and_size_are_the_same(stage, segment):
    target, report = checkpoint_and_kill(stage, segment)
    before = segment.read_bytes()
    os.chown(segment, 4243, 4243)
    segment.chmod(0o666)
    expect_refusal(stage, report, segment, "belongs to user 4243")
    for rule in ["overwrite", "leave"]:
        outcome = stage.vmckpt("restart", report["image"], "--detach", "-n", "refused", f"--shared-files={rule}")
        assert outcome.status == 1 and "belongs to user 4243" in outcome.stderr, outcome
    assert segment.read_bytes() == before
    os.chown(segment, stage.user.uid, stage.user.uid)
    segment.chmod(0o640)
    second = segment.with_name(segment.name + ".second")
    os.link(segment, second)
    try:
        expect_refusal(stage, report, segment, "another name")
    finally:
        second.unlink()
    target.restart(report["image"])
    end(stage, target)


def test_a_file_on_a_new_tmpfs_is_another_one_though_its_inode_has_the_same_number(make_stage):
    """As after a reboot of the machine: the numbers of inodes start over."""
    stage = make_stage(ROOT)
    folder = stage.work / "ram"
    folder.mkdir()
    file = folder / "file"

    def mount():
        if stage.run(["mount", "-t", "tmpfs", "vmckpt-test", folder]).status != 0:
            pytest.skip("no tmpfs may be mounted here")

    def make(byte):
        file.write_bytes(byte * 65536)
        return (file.stat().st_dev, file.stat().st_ino)

    mount()
    try:
        old = make(b"a")
        text = "import mmap, os, time; f = os.open('ram/file', os.O_RDWR); m = mmap.mmap(f, 0); os.close(f); print('READY', flush=True); time.sleep(1000)"
        target = stage.launch(["/usr/bin/python3", "-c", text])
        target.wait_for_line("READY")
        report = target.checkpoint_report()
        target.kill()
        wait_until(lambda: stage.run(["umount", folder]).status == 0, "nothing uses the file any more")
        mount()
        if make(b"b") != old:
            pytest.skip("no inode of the same number on the same device is to be had")
        expect_refusal(stage, report, file, "another file")
        assert file.read_bytes() == b"b" * 65536
    finally:
        stage.run(["umount", "-l", folder])


def test_a_link_in_its_place_is_not_followed(stage, segment):
    _, report = checkpoint_and_kill(stage, segment)
    victim = stage.file("victim", "precious")
    segment.unlink()
    segment.symlink_to(victim)
    expect_refusal(stage, report, segment)
    assert victim.read_text() == "precious"


def test_more_than_the_limit_is_refused_and_may_be_left_to_the_file(stage, segment):
    target = begin(stage, "shared_memory_file", segment.name)
    outcome = stage.vmckpt("checkpoint", target.name, "--shared-limit=1")
    assert outcome.status == 1
    assert str(segment) in outcome.stderr and "--shared-limit" in outcome.stderr
    report = target.checkpoint_report("--shared-files=none")
    assert any(str(segment) in note and "--shared-files" in note for note in report["notes"])
    end(stage, target)


def test_a_file_on_disk_is_left_to_itself_with_a_note_or_saved_on_request(stage):
    target = begin(stage, "shared_file_mapping")
    path = stage.work / "shared file"
    report = target.checkpoint_report()
    on_tmpfs = stage.run(["stat", "-f", "-c", "%T", path]).stdout.strip() == "tmpfs"
    assert on_tmpfs != any("shared file" in note and "--shared-files=all" in note for note in report["notes"])
    report = target.checkpoint_report("--shared-files=all")
    assert not any("shared file" in note for note in report["notes"])
    with open(path, "r+b") as file:
        file.write(b"\xaa" * 65536)
    target.kill()
    target.restart(report["image"])
    end(stage, target)


# ---- small files on disk, as a JVM's hsperfdata ---------------------------------------------------------------------

MAPPER = """
import ctypes, os, sys, time
os.mkdir("perf")
fd = os.open("perf/data", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
bytes_mapped = int(sys.argv[2])
os.ftruncate(fd, bytes_mapped)
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *3 * [ctypes.c_int], ctypes.c_long]
memory = (ctypes.c_char * bytes_mapped).from_address(libc.mmap(None, bytes_mapped, 3, 1, fd, 0))  # read and write, shared
if sys.argv[3] == "mapped only": os.close(fd)
memory[:6] = b"counts"
print("READY", flush=True)
while not os.access(sys.argv[1], os.F_OK):
    time.sleep(0.01)
print("HELD", bytes(memory[:6]), flush=True)
memory[:6] = b"goes on"[:6]
in_file = open("perf/data", "rb").read(6)
print("PASS" if in_file == b"goes o" else f"FAIL {in_file}", flush=True)
"""


def begin_mapper(stage, *options, size=32768, how="mapped only"):
    """An image of a program with a small file mapped, which has been killed since, and the file."""
    if stage.run(["stat", "-f", "-c", "%T", stage.work]).stdout.strip() == "tmpfs":
        pytest.skip(f"{stage.work} on a disk: on tmpfs files are memory")
    target = stage.launch(["/usr/bin/python3", "-c", MAPPER, stage.go_file, size, how])
    target.wait_for_line("READY")
    report = target.checkpoint_report(*options)
    target.kill()
    return target, report, stage.work / "perf" / "data"


def end_mapper(stage, target, held):
    stage.go()
    assert target.wait_for_line("HELD").endswith(repr(held))
    target.wait_for_line("PASS")
    assert target.wait_for_end() == 0, target.report()


@pytest.mark.parametrize("how", ["mapped only", "open, too"])
def test_a_small_file_on_disk_that_is_mapped_for_writing_is_made_again_when_it_is_missing(stage, how):
    target, report, file = begin_mapper(stage, how=how)
    before = file.stat()
    for _ in range(2):  # and again, from an image of the restarted one
        file.unlink()
        notes = target.restart(report["image"])["notes"]
        assert any(str(file) in note and "made again" in note for note in notes), notes
        now = file.stat()
        assert (now.st_uid, now.st_mode, now.st_size, now.st_mtime_ns) == (before.st_uid, before.st_mode, before.st_size, before.st_mtime_ns)
        report = target.checkpoint_report()
        target.kill()
    target.restart(report["image"])
    end_mapper(stage, target, b"counts")


def test_a_small_mapped_file_that_is_there_is_left_as_it_is_unless_its_content_is_asked_for(stage):
    target, report, file = begin_mapper(stage)
    with open(file, "r+b") as opened:
        opened.write(b"newer ")
    target.restart(report["image"], name="left")
    assert file.read_bytes()[:6] == b"newer "
    target.kill()
    target.restart(report["image"], name="put-back", options=["--shared-files=overwrite"])
    end_mapper(stage, target, b"counts")


def test_another_file_in_the_place_of_a_small_mapped_one_is_not_overwritten(stage):
    target, report, file = begin_mapper(stage)
    file.unlink()
    stage.file("perf/other", "x" * 32768).rename(file)
    target.restart(report["image"])
    assert file.read_bytes() == b"x" * 32768
    end_mapper(stage, target, b"xxxxxx")


def test_without_its_folder_a_small_mapped_file_cannot_be_made_again(stage):
    target, report, file = begin_mapper(stage)
    file.unlink()
    file.parent.rename(stage.work / "elsewhere")
    expect_refusal(stage, report, file, f"make the directory {file.parent}")
    (stage.work / "elsewhere").rename(file.parent)
    outcome = stage.vmckpt("restart", report["image"], "--detach", "-n", "refused", "--shared-files=leave")
    assert outcome.status == 1 and str(file) in outcome.stderr
    target.restart(report["image"])
    end_mapper(stage, target, b"counts")


@pytest.mark.parametrize("options, size", [([], 2 << 20), (["--shared-files=none"], 32768)], ids=["too large", "not wanted"])
def test_a_mapped_file_that_is_missing_and_not_in_the_image_is_named_with_the_way_to_have_it_there(stage, options, size):
    target, report, file = begin_mapper(stage, *options, size=size)
    file.unlink()
    expect_refusal(stage, report, file, "checkpoint --shared-files=all")
    outcome = stage.vmckpt("restart", report["image"], "--detach", "-n", "refused")
    assert "--self-contained" not in outcome.stderr
    assert not file.exists()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_a_program_without_privileges_is_not_made_a_mapped_file_of_roots(make_stage):
    stage = make_stage(ROOT)
    drop = "\nos.setgroups([]); os.setresgid(*3 * [65534]); os.setresuid(*3 * [65534])\nprint(\"READY\", flush=True)"
    target = stage.launch(["/usr/bin/python3", "-c", MAPPER.replace('\nprint("READY", flush=True)', drop), stage.go_file, 32768, "mapped only"])
    target.wait_for_line("READY")
    report = target.checkpoint_report()
    target.kill()
    file = stage.work / "perf" / "data"
    os.chown(file.parent, 65534, 65534)
    file.unlink()
    expect_refusal(stage, report, file)
    assert not file.exists()


# ---- a mapped program of the same build -----------------------------------------------------------------------------

def test_a_mapped_file_of_the_same_build_id_and_another_size_is_noted(stage):
    target = begin(stage, "mapped_program")
    image = target.checkpoint()
    target.kill()
    with open(stage.work / "a program", "ab") as file:
        file.write(b"more")
    report = target.restart(image)
    assert any("a program" in note and "same build id" in note for note in report["notes"])
    end(stage, target)


def test_a_mapped_file_of_the_same_build_id_that_is_too_short_is_refused(stage):
    target = begin(stage, "mapped_program")
    image = target.checkpoint()
    target.kill()
    path = stage.work / "a program"
    os.truncate(path, path.stat().st_size - 8192)
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1
    assert "a program" in outcome.stderr


# ---- programs under sanitizers --------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["address_sanitizer", "thread_sanitizer"])
@pytest.mark.parametrize("through", ["itself", "a shell"])
@variants
def test_a_program_under_a_sanitizer_starts_and_is_what_it_was(stage, name, through, variant):
    if int(pathlib.Path("/proc/sys/vm/mmap_rnd_bits").read_text()) > 28:
        pytest.skip("vm.mmap_rnd_bits of at most 28, which this compiler's sanitizers need")
    words = [stage.act(name), stage.go_file]
    if through == "a shell":
        words = ["sh", "-c", "exec \"$@\"", "sh", *words]
    target = stage.launch(words, native=variant == "native")
    target.wait_for_line("READY")
    for report in intermission(stage, target, variant):
        assert report["image_bytes"] < 256 << 20
    end(stage, target)


# ---- who asked for it has gone --------------------------------------------------------------------------------------

def test_a_checkpoint_whose_client_goes_away_is_given_up(stage):
    go_on = stage.work / "go on"
    fault = {"VMCKPT_FAULT": "wait:write", "VMCKPT_FAULT_GO": str(go_on)}
    target = begin(stage, "anon_memory", env={**stage.environment, **fault})
    client = stage.start([VMCKPT, "checkpoint", target.name])
    wait_until(lambda: "fault point write" in target.report(), "the image is being written")
    os.killpg(client.pid, 9)
    client.wait()
    # The supervisor hears of it before it answers who comes later.
    assert stage.list()[0]["state"] == "checkpointing"
    go_on.touch()
    wait_until(lambda: stage.list()[0]["state"] == "running", "the checkpoint has been given up")
    assert list(stage.images.iterdir()) == []
    assert target.checkpoint().exists()
    end(stage, target)
