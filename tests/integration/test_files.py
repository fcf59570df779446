# SPDX-License-Identifier: Apache-2.0
"""Files that are not what they were at the checkpoint: exchanged for others, changed, missing, out of reach."""

import os
import stat
import subprocess
import textwrap

import pytest

from vmckpt_harness import ORDINARY_USER, ROOT, VMCKPT, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")

NOBODY = 65534

# Says READY, waits for its third act, and then does what `after` says.
FRAME = """
import fcntl, mmap, os, sys, time
{before}
print("READY", flush=True)
while not os.access({go!r}, os.F_OK):
    time.sleep(0.01)
{after}
print("PASS", flush=True)
"""

BECOME_NOBODY = f"os.setgroups([]); os.setresgid(*3 * [{NOBODY}]); os.setresuid(*3 * [{NOBODY}])\n"


def begin(stage, before, after="pass"):
    """A Python program in the middle of its two acts."""
    text = FRAME.format(before=textwrap.dedent(before), after=textwrap.dedent(after), go=stage.go_file)
    target = stage.launch(["/usr/bin/python3", "-c", text])
    target.wait_for_line("READY")
    return target


def end(stage, target):
    stage.go()
    target.wait_for_line("PASS")
    assert target.wait_for_end() == 0, target.report()


def restart(stage, image, *options):
    """`vmckpt restart` that is to fail."""
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused", *options)
    if outcome.status == 0:
        subprocess.run(["kill", "-9", outcome.stdout.split()[1]], check=False)
    return outcome


def expect_refusal(stage, image, *words, options=()):
    outcome = restart(stage, image, *options)
    assert outcome.status == 1, outcome
    for word in words:
        assert word in outcome.stderr, outcome.stderr
    assert stage.list() == []


# ---- rights: a program that was root and has become nobody ----------------------------------------------------------

# What it holds of "own", which belongs to nobody and lies in a folder of nobody's.
HELD = {
    "file": "held = os.open('folder/own', os.O_RDONLY)",
    "written file": "held = os.open('folder/own', os.O_WRONLY | os.O_APPEND)",
    "O_PATH": "held = os.open('folder/own', os.O_PATH)",
    "private mapping": "f = os.open('folder/own', os.O_RDONLY); held = mmap.mmap(f, 0, mmap.MAP_PRIVATE, mmap.PROT_READ); os.close(f)",
    "shared mapping": "f = os.open('folder/own', os.O_RDONLY); held = mmap.mmap(f, 0, mmap.MAP_SHARED, mmap.PROT_READ); os.close(f)",
    "FIFO": "held = os.open('folder/own fifo', os.O_RDWR)",
    "folder": "held = os.open('folder/inner', os.O_RDONLY | os.O_DIRECTORY)",
    "working directory": "os.chdir('folder/inner')",
}
NAMES = {"FIFO": "own fifo", "folder": "inner", "working directory": "inner"}


def make_nobodys_folder(stage):
    folder = stage.work / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "own").write_text("own content\n")
    os.mkfifo(folder / "own fifo", 0o600)
    for path in (folder, folder / "inner", folder / "own", folder / "own fifo"):
        os.chown(path, NOBODY, NOBODY)
    return folder


def make_secret(stage, name):
    """Something of the same kind as `name` that only root may use."""
    secret = stage.work / "secret"
    if name == "inner":
        secret.mkdir(mode=0o700)
    elif name == "own fifo":
        os.mkfifo(secret, 0o600)
    else:
        secret.write_text("root only!!\n")
        secret.chmod(0o600)
    return secret


def begin_as_nobody(stage, kind, after="pass"):
    target = begin(stage, BECOME_NOBODY + HELD[kind], after)
    image = target.checkpoint()
    target.kill()
    return target, image


@as_root
@pytest.mark.parametrize("kind", HELD)
@pytest.mark.parametrize("exchanged", ["itself", "its folder"])
def test_a_file_exchanged_for_a_link_gives_a_program_without_privileges_nothing_of_roots(make_stage, kind, exchanged):
    stage = make_stage(ROOT)
    folder = make_nobodys_folder(stage)
    _, image = begin_as_nobody(stage, kind)
    name = NAMES.get(kind, "own")
    secret = make_secret(stage, name)
    if exchanged == "itself":
        (folder / name).rename(folder / "away")
        (folder / name).symlink_to(secret)
    else:
        roots = stage.work / "root's folder"
        roots.mkdir(mode=0o700)
        secret.rename(roots / name)
        folder.rename(stage.work / "away")
        folder.symlink_to(roots)
    for options in [(), ("--changed-files=accept", "--missing-files=empty")]:
        expect_refusal(stage, image, "symbolic link", options=options)


@as_root
@pytest.mark.parametrize("kind", HELD)
def test_another_file_by_the_same_name_is_refused_to_a_program_without_privileges(make_stage, kind):
    """Not even --changed-files=accept opens with root's rights what the program could not open."""
    stage = make_stage(ROOT)
    folder = make_nobodys_folder(stage)
    _, image = begin_as_nobody(stage, kind)
    name = NAMES.get(kind, "own")
    (folder / name).rename(folder / "away")
    make_secret(stage, name).rename(folder / name)
    expect_refusal(stage, image, "another file")
    if kind != "O_PATH":  # which gives no right to the content
        expect_refusal(stage, image, name, options=("--changed-files=accept",))


@as_root
@pytest.mark.parametrize("kind", HELD)
def test_a_program_without_privileges_gets_back_what_it_had(make_stage, kind):
    stage = make_stage(ROOT)
    make_nobodys_folder(stage)
    target, image = begin_as_nobody(stage, kind, after="assert os.getresuid() == (65534, 65534, 65534)")
    target.restart(image)
    end(stage, target)


@as_root
def test_what_root_opened_for_a_program_without_privileges_comes_back_if_it_is_the_same_file(make_stage):
    stage = make_stage(ROOT)
    log = stage.file("log", "one\n")
    log.chmod(0o600)
    target = begin(stage, "log = os.open('log', os.O_RDWR | os.O_APPEND)\n" + BECOME_NOBODY, "os.write(log, b'two\\n')")
    image = target.checkpoint()
    target.kill()
    log.rename(stage.work / "log.1")
    make_secret(stage, "log").rename(log)
    expect_refusal(stage, image, "another file")
    expect_refusal(stage, image, "log", "Permission denied", options=("--changed-files=accept",))
    (stage.work / "log.1").rename(log)
    target.restart(image)
    end(stage, target)
    assert log.read_text() == "one\ntwo\n"


@as_root
@pytest.mark.parametrize("readable", [False, True], ids=["only written", "read, too"])
def test_a_program_without_privileges_gets_no_copy_of_a_file_of_roots_that_is_missing(make_stage, readable):
    stage = make_stage(ROOT)
    folder = make_nobodys_folder(stage)
    log = folder / "log"
    log.write_text("for root only\n")
    log.chmod(0o600)
    how = "os.O_RDWR" if readable else "os.O_WRONLY"
    target = begin(stage, f"log = os.open('folder/log', {how} | os.O_APPEND)\n" + BECOME_NOBODY,
                   "assert os.fstat(log).st_size == 0 and os.fstat(log).st_uid == os.getuid()")
    image = target.checkpoint()
    assert (b"for root only" in image.read_bytes()) == readable
    target.kill()
    log.unlink()
    expect_refusal(stage, image, "folder/log", "is missing")
    assert not log.exists()
    target.restart(image, options=["--missing-files=empty"])
    end(stage, target)


@as_root
def test_a_program_without_privileges_gets_its_own_file_made_again_though_it_only_writes_to_it(make_stage):
    stage = make_stage(ROOT)
    folder = make_nobodys_folder(stage)
    target, image = begin_as_nobody(stage, "written file", "os.write(held, b'more')")
    mode = stat.S_IMODE((folder / "own").stat().st_mode)
    (folder / "own").unlink()
    target.restart(image)
    end(stage, target)
    made = folder / "own"
    assert made.read_text() == "own content\nmore"
    assert (made.stat().st_uid, stat.S_IMODE(made.stat().st_mode)) == (NOBODY, mode)


# ---- files that changed ---------------------------------------------------------------------------------------------

DISK = "disk = os.open('disk', os.O_RDWR | os.O_CREAT, 0o644); os.pwrite(disk, b'old', 0)"


def change(path, text):
    with open(path, "r+b") as file:
        file.write(text)
        os.utime(path)


def test_a_file_open_for_writing_in_place_that_changed_is_refused_unless_accepted(stage):
    target = begin(stage, DISK, "assert os.pread(disk, 3, 0) == b'new'")
    image = target.checkpoint()
    target.kill()
    change(stage.work / "disk", b"new")
    expect_refusal(stage, image, "disk", "has been changed", "--changed-files=accept")
    report = target.restart(image, options=["--changed-files=accept"])
    assert "has been changed" in " ".join(report["notes"])
    end(stage, target)


def test_a_file_put_back_with_its_time_is_as_it_was(stage):
    target = begin(stage, DISK, "assert os.pread(disk, 3, 0) == b'old'")
    image = target.checkpoint()
    target.kill()
    subprocess.run(["cp", "-p", stage.work / "disk", stage.work / "disk.copy"], check=True)
    change(stage.work / "disk", b"new")
    expect_refusal(stage, image, "has been changed")
    subprocess.run(["cp", "-p", stage.work / "disk.copy", stage.work / "disk"], check=True)
    target.restart(image)
    end(stage, target)


def test_a_locked_file_that_changed_is_refused_though_it_is_only_read(stage):
    stage.file("disk", "old")
    target = begin(stage, "disk = os.open('disk', os.O_RDONLY); fcntl.flock(disk, fcntl.LOCK_SH)")
    image = target.checkpoint()
    target.kill()
    change(stage.work / "disk", b"new")
    expect_refusal(stage, image, "disk", "had it locked")


def test_the_program_itself_changing_its_file_after_the_checkpoint_counts(stage):
    target = begin(stage, DISK, "os.pwrite(disk, b'new', 0); print('WRITTEN', flush=True); time.sleep(1000)")
    image = target.checkpoint()
    stage.go()
    target.wait_for_line("WRITTEN")
    target.kill()
    expect_refusal(stage, image, "disk", "has been changed")


def test_a_log_that_has_grown_is_no_matter_and_not_worth_a_note(stage):
    target = begin(stage, "log = os.open('log', os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)", "os.write(log, b'end\\n')")
    image = target.checkpoint()
    target.kill()
    with open(stage.work / "log", "a") as log:
        log.write("more\n")
    report = target.restart(image)
    assert not [note for note in report["notes"] if "log" in note]
    end(stage, target)
    assert (stage.work / "log").read_text() == "more\nend\n"


def test_output_that_went_on_after_the_checkpoint_is_written_over(stage):
    target = begin(stage, """
        out = os.open('out', os.O_WRONLY | os.O_CREAT, 0o644)
        os.write(out, b'one ')
        """, "os.write(out, b'two')")
    image = target.checkpoint()
    target.kill()
    with open(stage.work / "out", "a") as out:
        out.write("and on")
    target.restart(image)
    end(stage, target)
    assert (stage.work / "out").read_text() == "one two on"


# What it holds of "file", which belongs to its user.
HOLDS = {
    "read": "held = os.open('file', os.O_RDONLY)",
    "written": "held = os.open('file', os.O_RDWR)",
    "log": "held = os.open('file', os.O_WRONLY | os.O_APPEND)",
    "shared mapping": "f = os.open('file', os.O_RDWR); held = mmap.mmap(f, 0); os.close(f)",
}


@as_root
@pytest.mark.parametrize("how", HOLDS)
def test_another_users_file_is_refused_though_size_and_time_are_the_same(stage, how):
    file = stage.file("file", "mine" * 1024)
    os.chown(file, stage.user.uid, stage.user.uid)
    target = begin(stage, HOLDS[how])
    image = stage.vmckpt_ok("checkpoint", target.name, "--shared-files=none", "--json").json["image"]
    target.kill()
    forged = stage.file("forged", "evil" * 1024)
    forged.chmod(0o666)
    times = file.stat()
    os.utime(forged, ns=(times.st_atime_ns, times.st_mtime_ns))
    os.chown(forged, 4243, 4243)
    file.rename(stage.work / "away")
    forged.rename(file)
    expect_refusal(stage, image, f'file" belongs to user 4243 and belonged to {stage.user.uid}', "--changed-files=accept")
    target.restart(image, options=["--changed-files=accept"])
    target.kill()
    file.unlink()
    (stage.work / "away").rename(file)
    target.restart(image)
    end(stage, target)


# ---- files that are missing -----------------------------------------------------------------------------------------

def test_a_small_file_that_was_being_written_is_made_again_when_it_is_missing(stage):
    target = begin(stage, """
        out = os.open('new.tmp', os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
        again = os.open('new.tmp', os.O_RDONLY)
        os.write(out, b'half of it, ')
        """, """
        os.write(out, b'and the rest')
        assert os.read(again, 100) == b'half of it, and the rest'
        os.rename('new.tmp', 'new')
        """)
    image = target.checkpoint()
    target.kill()
    (stage.work / "new.tmp").rename(stage.work / "new")
    report = target.restart(image)
    assert "new.tmp" in " ".join(report["notes"])
    end(stage, target)
    made = stage.work / "new"
    assert made.read_text() == "half of it, and the rest"
    assert stat.S_IMODE(made.stat().st_mode) == 0o640
    assert made.stat().st_uid == stage.user.uid


@pytest.mark.parametrize("folder", [True, False], ids=["file", "file and folder"])
def test_a_large_file_that_is_missing_is_made_empty_only_when_told_to(stage, folder):
    target = begin(stage, """
        os.mkdir('folder')
        out = os.open('folder/big', os.O_RDWR | os.O_CREAT | os.O_EXCL)
        os.write(out, bytes(4 << 20))
        """, """
        assert os.fstat(out).st_size == 0
        os.write(out, b'x')
        assert os.fstat(out).st_size == (4 << 20) + 1
        """)
    report = target.checkpoint_report()
    assert "folder/big" in " ".join(report["notes"])
    target.kill()
    (stage.work / "folder" / "big").unlink()
    if not folder:
        (stage.work / "folder").rmdir()
    expect_refusal(stage, report["image"], "folder/big", "is missing", "--missing-files=empty")
    target.restart(report["image"], options=["--missing-files=empty"])
    end(stage, target)


# ---- standard output that is out of reach ---------------------------------------------------------------------------

@as_root
@pytest.mark.parametrize("place", ["file of root", "folder of root"])
def test_standard_output_that_cannot_be_opened_again_is_restarts_own(make_stage, place):
    stage = make_stage(ORDINARY_USER)
    folder = stage.work / "closed"
    folder.mkdir(mode=0o700 if place == "folder of root" else 0o755)
    text = FRAME.format(before="", after="print('after', flush=True)", go=stage.go_file)
    words = [VMCKPT, "launch", "-n", "target", "-d", stage.images, "--", "/usr/bin/python3", "-c", text]
    with open(folder / "out", "wb") as out:
        os.fchmod(out.fileno(), 0o600)
        launched = stage.start(words, stdout=out)
    wait_until(lambda: "READY" in (folder / "out").read_text(), "the program runs")
    image = stage.vmckpt_ok("checkpoint", "target", "--json").json["image"]
    pid = stage.list()[0]["pid"]
    os.kill(pid, 9)
    launched.wait(timeout=30)
    read_end, write_end = os.pipe()
    notes = stage.file("notes")
    with open(notes, "ab") as stderr:
        again = stage.start([VMCKPT, "restart", image, "-n", "target"], stdout=write_end, stderr=stderr)
    os.close(write_end)
    stage.go()
    with os.fdopen(read_end) as output:
        assert output.read().splitlines() == ["after", "PASS"]
    assert again.wait(timeout=30) == 0
    assert "restart's own takes its place" in notes.read_text()
    assert "after" not in (folder / "out").read_text()


# ---- files without their name ---------------------------------------------------------------------------------------

def test_a_deleted_file_keeps_its_holes_its_owner_and_its_times(stage):
    target = begin(stage, """
        f = os.open('gone', os.O_RDWR | os.O_CREAT, 0o640)
        for page in range(0, 64, 2):
            os.pwrite(f, b'x' * 4096, page * 4096)
        os.ftruncate(f, 64 << 20)
        os.utime(f, ns=(1_000_000_007, 2_000_000_009))
        if os.getuid() == 0:
            os.fchown(f, 4243, 4244)
        os.unlink('gone')
        before = os.fstat(f)
        """, """
        now = os.fstat(f)
        for field in ('st_size', 'st_mode', 'st_uid', 'st_gid', 'st_atime_ns', 'st_mtime_ns', 'st_nlink'):
            assert getattr(now, field) == getattr(before, field), (field, before, now)
        assert now.st_blocks * 512 <= 40 * 4096, now
        assert os.pread(f, 4096, 62 * 4096) == b'x' * 4096
        """)
    for _ in range(2):
        image = target.checkpoint()
        target.kill()
        target.restart(image)
    end(stage, target)


def test_a_file_with_another_name_in_its_folder_is_opened_by_that(stage):
    target = begin(stage, """
        f = os.open('first', os.O_RDWR | os.O_CREAT, 0o600)
        os.link('first', 'second')
        os.unlink('first')
        os.write(f, b'one ')
        """, "os.write(f, b'two')")
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    end(stage, target)
    assert (stage.work / "second").read_text() == "one two"
    assert not (stage.work / "first").exists()


def test_a_removed_working_directory_and_a_removed_link_come_back_removed(stage):
    target = begin(stage, """
        os.symlink('somewhere', 'link')
        link = os.open('link', os.O_PATH | os.O_NOFOLLOW)
        os.unlink('link')
        f = os.open('file', os.O_RDWR | os.O_CREAT)
        os.write(f, b'text')
        place = os.open('file', os.O_PATH)
        os.unlink('file')
        os.mkdir('gone')
        os.chdir('gone')
        os.rmdir('../gone')
        """, """
        assert os.readlink('', dir_fd=link) == 'somewhere'
        assert open(f'/proc/self/fd/{place}').read() == 'text'
        try:
            os.getcwd()
        except FileNotFoundError:
            pass
        else:
            raise AssertionError('the working directory has a name')
        """)
    for _ in range(2):
        image = target.checkpoint()
        target.kill()
        target.restart(image)
    end(stage, target)


# ---- namespaces -----------------------------------------------------------------------------------------------------

NAMESPACES = {"network": "n", "mount": "m", "IPC": "i", "UTS": "u", "cgroup": "C", "time": "T"}


@pytest.mark.parametrize("kind", NAMESPACES)
def test_a_target_in_a_namespace_of_its_own_is_refused_by_name_and_runs_on(stage, kind):
    options = f"-{NAMESPACES[kind]}" if stage.user.uid == 0 else f"-Ur{NAMESPACES[kind]}"
    if stage.run(["unshare", options, "true"]).status != 0:
        pytest.skip(f"no {kind} namespace may be made here")
    text = FRAME.format(before="", after="pass", go=stage.go_file)
    target = stage.launch(["unshare", options, "/usr/bin/python3", "-c", text])
    target.wait_for_line("READY")
    outcome = stage.vmckpt("checkpoint", target.name)
    assert outcome.status == 1
    assert "namespaces of its own" in outcome.stderr and kind in outcome.stderr, outcome.stderr
    end(stage, target)


@as_root
def test_a_target_with_a_root_directory_of_its_own_is_refused_and_runs_on(make_stage):
    stage = make_stage(ROOT)
    (stage.work / "jail").mkdir()
    target = begin(stage, """
        outside = os.open('/', os.O_DIRECTORY)
        real_access = os.access
        os.access = lambda path, mode: real_access(path[1:], mode, dir_fd=outside)  # the go file is outside
        os.chroot('jail')
        """)
    outcome = stage.vmckpt("checkpoint", target.name)
    assert outcome.status == 1
    assert f"root directory {stage.work}/jail" in outcome.stderr and "chroot" in outcome.stderr, outcome.stderr
    end(stage, target)


def test_namespaces_that_restart_made_are_not_the_targets_own(stage):
    target = begin(stage, "")
    for _ in range(2):
        image = target.checkpoint()
        target.kill()
        target.restart(image)
    end(stage, target)
