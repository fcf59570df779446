# SPDX-License-Identifier: Apache-2.0
"""The vmckpt command as its user meets it: usage, messages, exit statuses, images, who may do what."""

import ctypes
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import textwrap
import time

import pexpect
import pytest

from vmckpt_harness import (ORDINARY_USER, ROOT, VMCKPT, Target, process_is_alive, processes_marked, signal_process,
                            wait_until)

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")

VERBS = ["launch", "checkpoint", "restart", "list", "attach", "logs", "stop", "kill", "inspect", "verify", "doctor"]

needs_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")


def expect_error(outcome, *words, status=1):
    """One sentence on stderr, nothing on stdout."""
    assert outcome.status == status, outcome
    assert outcome.stderr.startswith("vmckpt: "), outcome
    assert outcome.stdout == "", outcome
    for word in words:
        assert str(word) in outcome.stderr, outcome


def begin(stage, act="threads", name="target", **options):
    target = stage.launch([stage.act(act), stage.go_file], name=name, **options)
    target.wait_for_line("READY")
    return target


def end(stage, *targets):
    stage.go()
    for target in targets:
        assert target.wait_for_end() == 0, target.report()
        assert "PASS" in target.lines(), target.report()


# ---- usage ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("words", [[], ["fly"], ["--no-such-option"]], ids=" ".join)
def test_without_a_known_verb_the_command_shows_its_usage_with_status_2(own_stage, words):
    outcome = own_stage.vmckpt(*words)
    assert (outcome.status, outcome.stdout) == (2, "")
    assert "usage" in outcome.stderr
    assert all(word in outcome.stderr for word in words)


@pytest.mark.parametrize("words", [
    ["launch"],
    ["launch", "--"],
    ["launch", "-n"],
    ["launch", "--no-such-option", "--", "true"],
    ["checkpoint", "one", "two"],
    ["checkpoint", "--no-such-option"],
    ["restart"],
    ["restart", "one", "two"],
    ["list", "surplus"],
    ["inspect"],
    ["inspect", "one", "two"],
    ["verify"],
    ["verify", "one", "two"],
    ["doctor", "surplus"],
], ids=" ".join)
def test_wrong_usage_is_told_in_one_line_with_status_2(own_stage, words):
    outcome = own_stage.vmckpt(*words)
    expect_error(outcome, status=2)
    assert len(outcome.stderr.splitlines()) <= 2


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(own_stage, verb):
    outcome = own_stage.vmckpt_ok(verb, "--help")
    assert f"vmckpt {verb}" in outcome.stdout
    assert outcome.stderr == ""


@pytest.mark.parametrize("verb", VERBS)
def test_help_verb_says_what_verb_help_says(own_stage, verb):
    assert own_stage.vmckpt_ok("help", verb).stdout == own_stage.vmckpt_ok(verb, "--help").stdout


def test_version_is_a_verb_and_an_option(own_stage):
    assert re.fullmatch(r"vmckpt \d+\.\d+\.\d+\n", own_stage.vmckpt_ok("version").stdout)
    assert own_stage.vmckpt_ok("version").stdout == own_stage.vmckpt_ok("--version").stdout


def test_the_command_itself_has_help_that_names_all_verbs(own_stage):
    text = own_stage.vmckpt_ok("--help").stdout
    for verb in VERBS:
        assert verb in text


def test_doctor_says_what_this_host_can_do(stage):
    outcome = stage.vmckpt("doctor", "--json")
    assert outcome.status in (0, 1)
    assert outcome.json
    assert stage.vmckpt("doctor").stdout.strip()


# ---- naming targets -------------------------------------------------------------------------------------------------

def test_an_unknown_target_is_named_in_the_message(own_stage):
    expect_error(own_stage.vmckpt("checkpoint", "nobody-here"), "nobody-here")


def test_without_any_target_checkpoint_says_so(own_stage):
    expect_error(own_stage.vmckpt("checkpoint"))
    assert own_stage.list() == []


def test_one_target_needs_no_name_two_do(own_stage):
    first = begin(own_stage, name="first")
    own_stage.vmckpt_ok("checkpoint")
    second = begin(own_stage, name="second")
    outcome = own_stage.vmckpt("checkpoint")
    assert outcome.status in (1, 2)
    assert "first" in outcome.stderr and "second" in outcome.stderr
    report = own_stage.vmckpt_ok("checkpoint", "second", "--json").json
    assert pathlib.Path(report["image"]).name == "second-1.ckpt"
    report = own_stage.vmckpt_ok("checkpoint", first.pid, "--json").json
    assert pathlib.Path(report["image"]).name == "first-2.ckpt"
    end(own_stage, first, second)


def test_a_name_that_is_taken_is_refused(own_stage):
    first = begin(own_stage, name="taken")
    expect_error(own_stage.vmckpt("launch", "-n", "taken", "--", "true"), "taken")
    assert process_is_alive(first.pid)
    end(own_stage, first)
    # It is free again once its bearer has ended.
    assert own_stage.vmckpt("launch", "-n", "taken", "--", "true").status == 0


def test_a_restart_under_a_name_that_is_taken_is_refused_and_nothing_is_left_running(own_stage):
    target = begin(own_stage, name="taken")
    pid = target.pid
    image = target.checkpoint()
    expect_error(own_stage.vmckpt("restart", image, "--detach", "-n", "taken"), "taken")
    assert [entry["pid"] for entry in own_stage.list()] == [pid]
    assert processes_marked(own_stage.mark) == {target.supervisor.pid, pid}
    end(own_stage, target)


@pytest.mark.parametrize("name", ["with/slash", "..", ""])
def test_a_name_that_would_leave_the_directory_is_refused(own_stage, name):
    outcome = own_stage.vmckpt("launch", "-n", name, "--", "true")
    assert outcome.status in (1, 2)
    assert outcome.stderr.startswith("vmckpt: ")


def test_list_shows_name_pid_and_state(stage):
    assert stage.list() == []
    target = begin(stage)
    (entry,) = stage.list()
    assert entry["name"] == "target"
    assert process_is_alive(entry["pid"])
    assert entry["state"]
    assert "act_threads" in pathlib.Path(f"/proc/{entry['pid']}/cmdline").read_text()
    assert "target" in stage.vmckpt_ok("list").stdout
    end(stage, target)
    wait_until(lambda: stage.list() == [], "the list is empty")


# ---- launch ---------------------------------------------------------------------------------------------------------

def test_list_and_messages_show_no_control_characters_of_a_targets_arguments(stage):
    stage.vmckpt_ok("launch", "--detach", "-n", "it", "-d", stage.images, "--", "sh", "-c",
                    "while :; do sleep 1; done", "\033[2Jgone\r\x9b")
    shown = stage.vmckpt_ok("list").stdout
    assert "\\x1b[2Jgone\\x0d" in shown
    assert not any(character in shown for character in "\033\r\x9b")
    outcome = stage.vmckpt("checkpoint", "\033[2J")
    assert "\033" not in outcome.stderr and "\\x1b[2J" in outcome.stderr
    stage.vmckpt_ok("kill", "it")


def test_what_an_image_says_steers_no_terminal(stage):
    """A folder and a file of such names, an argument, a variable: shown by inspect, in a refusal, and as JSON of the same content."""
    steering = "\033[2J\x9b\n  - \u202egnp"
    folder = stage.work / f"{steering} Übung"
    folder.mkdir()
    file = folder / "file"
    file.write_text("content")
    if os.getuid() == 0 and stage.user.uid != 0:
        shutil.chown(folder, stage.user.uid)
        shutil.chown(file, stage.user.uid)
    stage.vmckpt_ok("launch", "--detach", "-n", "it", "-d", stage.images, "--", "env", f"NAME={steering}", "sh", "-c",
                    'exec 5<"$0"; exec sleep 1000', file)
    (running,) = stage.list()
    wait_until(lambda: pathlib.Path(f"/proc/{running['pid']}/comm").read_text() == "sleep\n", "it sleeps")
    image = stage.vmckpt_ok("checkpoint", "it", "--json").json["image"]
    (listed,) = [entry for entry in stage.list() if entry["name"] == "it"]
    assert steering in listed["command"][-1]
    stage.vmckpt_ok("kill", "it")
    outcomes = [stage.vmckpt_ok("list"), stage.vmckpt_ok("list", "--json", "--all"), stage.vmckpt_ok("inspect", image),
                stage.vmckpt_ok("inspect", image, "--json")]
    assert "Übung" in outcomes[2].stdout and json.loads(outcomes[3].stdout)
    file.unlink()
    refused = stage.vmckpt("restart", image, "--detach", "-n", "again")
    expect_error(refused, "Übung", "\\x1b[2J")
    assert refused.stderr.count("\n  - ") <= 1, refused
    for outcome in [*outcomes, refused, stage.vmckpt("verify", folder), stage.vmckpt(steering), stage.vmckpt("list", f"--{steering}")]:
        assert not any(character in outcome.stdout + outcome.stderr for character in "\033\x9b\u202e"), outcome


def test_a_runtime_folder_that_is_missing_or_somebody_elses_is_not_used(stage):
    """su and sudo leave XDG_RUNTIME_DIR as it was."""
    environment = {key: value for key, value in stage.environment.items() if key != "VMCKPT_RUNTIME_DIR"}
    for folder in ("/proc/1", str(stage.work / "missing")):
        outcome = stage.vmckpt("list", env={**environment, "XDG_RUNTIME_DIR": folder})
        assert outcome.status == 0, outcome


@pytest.mark.skipif(not os.path.exists("/dev/userfaultfd"), reason="/dev/userfaultfd is not there")
def test_a_denied_device_is_told_by_name_once_and_only_if_it_is_there(stage):
    script = "for d in ('/dev/sgx_vepc', '/dev/userfaultfd', '/dev/userfaultfd'):\n  try: open(d)\n  except FileNotFoundError: print('none')"
    outcome = stage.vmckpt_ok("launch", "--", "/usr/bin/python3", "-c", script)
    assert outcome.stdout == "none\n" * 3
    assert outcome.stderr.count("denied") == 1 and "/dev/userfaultfd" in outcome.stderr, outcome


def test_launch_passes_the_programs_status_through(stage):
    assert stage.vmckpt("launch", "--", "sh", "-c", "exit 42").status == 42
    assert stage.vmckpt("launch", "--", "true").status == 0
    for number in (signal.SIGTERM, signal.SIGKILL, signal.SIGUSR2):
        assert stage.vmckpt("launch", "--", "sh", "-c", f"kill -{int(number)} $$").status == 128 + number


def test_restart_passes_the_programs_status_through(stage):
    target = begin(stage)
    image = target.checkpoint()
    target.kill()
    target.restart(image)
    os.kill(target.pid, signal.SIGTERM)
    assert target.wait_for_end() == 128 + signal.SIGTERM


def test_launch_shares_standard_input_and_output(stage):
    outcome = stage.vmckpt("launch", "--", "tr", "a-z", "A-Z", input=b"through the pipe\n", stdin=None)
    assert (outcome.status, outcome.stdout) == (0, "THROUGH THE PIPE\n")
    outcome = stage.vmckpt("launch", "--", "sh", "-c", "echo to stderr >&2")
    assert outcome.stderr == "to stderr\n"


def test_launch_runs_a_script_by_its_interpreter(stage):
    script = stage.file("script", "#!/bin/sh\necho \"$0 $1\"\n")
    script.chmod(0o755)
    assert stage.vmckpt_ok("launch", "--", "./script", "word").stdout == "./script word\n"


def test_launch_finds_programs_in_path_and_keeps_arguments_that_look_like_options(stage):
    assert stage.vmckpt_ok("launch", "--", "echo", "-n", "--help").stdout == "--help"


def test_a_missing_program_is_refused_in_one_sentence(stage):
    expect_error(stage.vmckpt("launch", "--", "no-such-program-anywhere"), "no-such-program-anywhere")
    expect_error(stage.vmckpt("launch", "--", "/no/such/program"), "/no/such/program")


def test_a_missing_program_comes_with_advice(stage):
    expect_error(stage.vmckpt("launch", "--", "./missing"), "./missing", "look at its name")
    stage.file("here", "#!/bin/sh\n").chmod(0o755)
    expect_error(stage.vmckpt("launch", "--", "here"), "./here")


def test_a_static_go_program_is_told_how_it_is_built_to_be_checkpointed(stage):
    """Known by the note that Go's linker makes: here a static program that gets one, since Go itself is not needed for that."""
    program = stage.work / "like-go"
    source = stage.file("like-go.c", textwrap.dedent("""
        __attribute__((section(".note.go.buildid"), used)) static const struct { int n, d, t; char name[4], id[4]; }
            note = {4, 4, 4, "Go", "abc"};
        int main(void) { return 0; }
    """))
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    subprocess.run(["gcc", "-static", "-Wl,--build-id=none", "-o", program, source], check=True)
    expect_error(stage.vmckpt("launch", "--", program), "statically linked", "-buildmode=pie")


def test_something_that_is_no_program_is_refused(stage):
    """With 1 when vmckpt sees it, with 127 as a shell would when the kernel does."""
    for what in (stage.work, stage.file("plain text", "no program\n")):
        outcome = stage.vmckpt("launch", "--", what)
        assert outcome.status in (1, 127)
        assert outcome.stderr.startswith("vmckpt: ") and str(what) in outcome.stderr


@pytest.mark.skipif(not os.path.exists("/bin/busybox"), reason="busybox-static is not installed")
def test_a_static_program_is_refused_in_one_sentence(stage):
    if b"/ld-linux-x86-64.so.2" in pathlib.Path("/bin/busybox").read_bytes():
        pytest.skip("busybox is linked dynamically here; busybox-static is not installed")
    expect_error(stage.vmckpt("launch", "--", "/bin/busybox", "true"), "static")


def test_a_set_user_id_program_is_refused_in_one_sentence(make_stage):
    """To root it gives nothing that root has not; the loader trusts LD_PRELOAD then."""
    stage = make_stage(ORDINARY_USER)
    su = shutil.which("su")
    if su is None or not os.stat(su).st_mode & stat.S_ISUID:
        pytest.skip("su with its set-user-id bit is not installed")
    expect_error(stage.vmckpt("launch", "--", su, "--version"), "set-")


def test_launch_detached_returns_at_once_and_says_name_and_pid(stage):
    begin_s = time.monotonic()
    outcome = stage.vmckpt_ok("launch", "--detach", "-n", "behind", "-d", stage.images, "--", "sh", "-c",
                              "read line; echo got:$line: >answer; exec sleep 1000")
    assert time.monotonic() - begin_s < 10
    name, pid = outcome.stdout.split()
    assert name == "behind"
    assert stage.list() == [entry for entry in stage.list() if entry["pid"] == int(pid)]
    answer = stage.work / "answer"
    wait_until(lambda: answer.exists() and answer.read_text() == "got::\n", "standard input is empty")
    image = stage.vmckpt_ok("checkpoint", "--json").json["image"]
    signal_process(int(pid), signal.SIGKILL)
    wait_until(lambda: stage.list() == [], "it has ended")

    report = stage.vmckpt_ok("restart", image, "--detach", "-n", "again", "--json").json
    assert report["restart_us"] > 0
    assert report["phases_us"]
    (entry,) = stage.list()
    assert (entry["name"], entry["pid"]) == ("again", report["pid"])
    signal_process(entry["pid"], signal.SIGTERM)
    wait_until(lambda: stage.list() == [], "it has ended")


def test_a_terminal_program_is_reached_by_control_c(stage):
    screen = stage.start_on_terminal([VMCKPT, "launch", "--", "sh", "-c",
                                      "trap 'echo got it; exit 3' INT; echo ready; while :; do sleep 0.05; done"])
    screen.expect("ready")
    screen.sendcontrol("c")
    screen.expect("got it")
    screen.expect(pexpect.EOF)
    screen.wait()
    assert screen.exitstatus == 3


def test_control_z_stops_the_program_and_fg_continues_it(stage):
    script = stage.file("count", textwrap.dedent("""
        i=0
        while :; do i=$((i + 1)); echo tick-$i; sleep 0.1; done
    """))
    shell = stage.start_on_terminal(["bash", "--noprofile", "--norc", "-i"])
    shell.sendline("PS1='read''y> '")
    shell.expect("ready> ")
    shell.sendline(f"{VMCKPT} launch -n counter -- sh {script}")
    shell.expect("tick-3\r\n")
    pid = next(entry["pid"] for entry in stage.list() if entry["name"] == "counter")
    shell.sendcontrol("z")
    shell.expect("Stopped")
    shell.expect("ready> ")
    assert [entry["name"] for entry in stage.list()] == ["counter"], "a stopped target is listed too"
    assert pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    shell.sendline("fg")
    shell.expect(r"tick-\d+\r\n")
    shell.expect(r"tick-\d+\r\n")
    shell.sendcontrol("c")
    shell.expect("ready> ")
    shell.sendline("echo status:$?")
    shell.expect("status:130\r\n")
    wait_until(lambda: not process_is_alive(pid), "the program has ended")


# ---- supervisor and control socket ----------------------------------------------------------------------------------

def test_when_its_supervisor_is_killed_the_program_runs_on(stage):
    target = begin(stage)
    pid = target.pid
    target.supervisor.kill()
    target.supervisor.wait()
    time.sleep(0.1)
    assert process_is_alive(pid)
    stage.go()
    wait_until(lambda: "PASS" in target.lines() or "FAIL" in target.text(), "it ends by itself")
    assert "PASS" in target.lines(), target.report()


def control_sockets(stage):
    return [path for path in stage.runtime.rglob("*") if path.is_socket()]


def connect_to_control(path):
    for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM):
        client = socket.socket(socket.AF_UNIX, kind)
        try:
            client.connect(str(path))
            client.settimeout(2)
            return client
        except OSError as problem:
            client.close()
            if problem.errno != 91:  # EPROTOTYPE
                raise
    raise AssertionError(f"{path} is of no known type")


def test_the_control_socket_is_in_a_directory_of_the_user(stage):
    target = begin(stage)
    assert stat.S_IMODE(stage.runtime.stat().st_mode) == 0o700
    assert control_sockets(stage)
    end(stage, target)
    wait_until(lambda: control_sockets(stage) == [], "the socket is removed")


def test_garbage_on_the_control_socket_disturbs_nothing(stage):
    target = begin(stage)
    (path,) = control_sockets(stage)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    noise = random.Random(seed)
    held = [connect_to_control(path) for _ in range(20)]  # clients that never say anything
    messages = [b"\n", b"\0" * 4096, b"{", b"checkpoint\n" * 100, b"\xff" * 100_000, b'{"verb": "checkpoint"', b"[]\n"]
    messages += [noise.randbytes(noise.randrange(1, 5000)) for _ in range(50)]
    for message in messages:
        with connect_to_control(path) as client:
            try:
                client.sendall(message)
                client.recv(100) if noise.random() < 0.1 else None
            except OSError:
                pass  # hung up on, and rightly so
    assert target.checkpoint().exists()
    for client in held:
        client.close()
    target.checkpoint()
    assert target.supervisor.poll() is None
    end(stage, target)


@needs_root
@pytest.mark.parametrize("door", ["closed", "open"])
def test_another_user_may_not_control_a_target(make_stage, door):
    """Also when the directory of the control sockets has been opened by mistake."""
    stage = make_stage(ROOT)
    target = begin(stage)
    if door == "open":
        stage.runtime.chmod(0o777)
        for path in control_sockets(stage):
            path.chmod(0o777)
    outcome = stage.vmckpt("checkpoint", "target", "-o", "/tmp/vmckpt-test-never-written.ckpt", user=ORDINARY_USER)
    expect_error(outcome)
    assert not os.path.exists("/tmp/vmckpt-test-never-written.ckpt")
    stage.runtime.chmod(0o700)
    end(stage, target)


@needs_root
def test_root_may_control_an_ordinary_users_target(make_stage):
    stage = make_stage(ORDINARY_USER)
    target = begin(stage)
    outcome = stage.vmckpt_ok("checkpoint", "target", "--json", user=ROOT)
    assert os.path.exists(outcome.json["image"])
    end(stage, target)


def test_a_traced_program_is_refused_and_runs_on(own_stage):
    target = begin(own_stage)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
    ptrace_seize, ptrace_interrupt, ptrace_detach = 0x4206, 0x4207, 17
    pid = target.pid
    if libc.ptrace(ptrace_seize, pid, None, None) != 0:
        pytest.skip(f"this process may not trace: {os.strerror(ctypes.get_errno())}")
    expect_error(own_stage.vmckpt("checkpoint", "target"), "trace")
    libc.ptrace(ptrace_interrupt, pid, None, None)
    os.waitpid(pid, 0x40000000)  # __WALL
    assert libc.ptrace(ptrace_detach, pid, None, None) == 0
    assert target.checkpoint().exists()
    end(own_stage, target)


# ---- images ---------------------------------------------------------------------------------------------------------

def test_a_checkpoint_reports_what_it_did(stage):
    target = begin(stage)
    report = target.checkpoint_report()
    image = os.stat(report["image"])
    assert report["image_bytes"] in (image.st_size, image.st_blocks * 512)  # holes may be left out
    assert 0 < report["pause_us"] < report["total_us"]
    assert 0 < report["memory_bytes_saved"] <= report["image_bytes"]
    assert report["phases_us"] and all(us >= 0 for us in report["phases_us"].values())
    assert "target-2.ckpt" in stage.vmckpt_ok("checkpoint").stdout
    end(stage, target)


def test_images_count_up_in_the_working_directory_and_leave_foreign_files_alone(stage):
    foreign = stage.file("target-2.ckpt", "not an image of mine")
    target = Target(stage, "target")
    target.begin([VMCKPT, "launch", "-n", "target", "--", stage.act("threads"), stage.go_file])
    target.wait_for_line("READY")
    names = [target.checkpoint().name for _ in range(3)]
    assert names == ["target-3.ckpt", "target-4.ckpt", "target-5.ckpt"]
    assert foreign.read_text() == "not an image of mine"
    assert all((stage.work / name).exists() for name in names)
    end(stage, target)


def test_a_number_is_never_used_again_so_that_the_newest_image_has_the_highest(stage):
    """Also after the newest was removed, and by the restarted target."""
    target = begin(stage)
    images = [target.checkpoint() for _ in range(3)]
    images[0].unlink()
    assert target.checkpoint().name == "target-4.ckpt"
    (stage.images / "target-4.ckpt").unlink()
    newest = target.checkpoint()
    assert newest.name == "target-5.ckpt"
    target.kill()
    kept = newest.rename(stage.work / "kept.ckpt")
    for image in stage.images.iterdir():
        image.unlink()
    target.restart(kept)
    assert target.checkpoint().name == "target-6.ckpt"
    end(stage, target)


def test_an_image_is_private_whatever_the_umask(stage):
    target = Target(stage, "target")
    target.begin(["sh", "-c", f"umask 0; exec {VMCKPT} launch -n target -d {stage.images} -- "
                              f"{stage.act('threads')} {stage.go_file}"])
    target.wait_for_line("READY")
    image = target.checkpoint()
    assert stat.S_IMODE(image.stat().st_mode) == 0o600
    assert image.stat().st_uid == stage.user.uid
    given = stage.work / "given.ckpt"
    target.checkpoint("-o", given)
    assert stat.S_IMODE(given.stat().st_mode) == 0o600
    end(stage, target)


@pytest.mark.parametrize("content", ["somebody's text\n", "", "VMCKPT\r\n but no image"])
def test_a_foreign_file_is_not_overwritten(stage, content):
    target = begin(stage)
    foreign = stage.file("precious", content)
    expect_error(stage.vmckpt("checkpoint", "target", "-o", foreign), "precious")
    assert foreign.read_text() == content.replace("\r\n", "\n")
    assert list(stage.images.iterdir()) == []
    end(stage, target)


def test_an_image_of_another_target_is_not_overwritten_but_ones_own_is(stage):
    first, second = begin(stage, name="first"), begin(stage, name="second")
    image = first.checkpoint()
    before = image.read_bytes()
    expect_error(stage.vmckpt("checkpoint", "second", "-o", image), image.name)
    assert image.read_bytes() == before
    first.checkpoint("-o", image)
    assert image.read_bytes() != before
    stage.vmckpt_ok("verify", image)
    end(stage, first, second)


def test_no_image_and_no_harm_where_the_image_cannot_be_written(stage):
    target = begin(stage)
    expect_error(stage.vmckpt("checkpoint", "target", "-o", "/no/such/directory/image.ckpt"), "/no/such/directory")
    expect_error(stage.vmckpt("checkpoint", "target", "-o", stage.images), str(stage.images))
    expect_error(stage.vmckpt("checkpoint", "target", "-o", "/dev/null"), "/dev/null")
    assert list(stage.images.iterdir()) == []
    end(stage, target)


def test_an_output_name_is_relative_to_where_checkpoint_is_run(stage):
    target = begin(stage)
    report = stage.vmckpt_ok("checkpoint", "target", "-o", "here.ckpt", "--json", cwd=stage.images).json
    assert os.path.samefile(report["image"], stage.images / "here.ckpt")
    end(stage, target)


def test_checkpoint_stop_ends_the_target_when_its_image_is_whole(stage):
    target = begin(stage)
    pid = target.pid
    image = target.checkpoint("--kill")
    assert not process_is_alive(pid)
    assert target.wait_for_end() != 0
    stage.vmckpt_ok("verify", image)
    target.restart(image)
    end(stage, target)


def test_the_image_a_target_runs_from_is_not_replaced_by_its_own_checkpoint(stage):
    """It backs the target's memory, so it must stay as it is."""
    target = begin(stage)
    image = target.checkpoint()
    target.kill()
    before = image.read_bytes()
    target.restart(image)
    outcome = stage.vmckpt("checkpoint", "target", "-o", image)
    if outcome.status == 0:
        # A new file under the old name: the old one lives on where it is mapped.
        stage.vmckpt_ok("verify", image)
    else:
        assert image.read_bytes() == before
    end(stage, target)


def begin_restart(stage, image, name):
    target = Target(stage, name)
    target.restart(image)
    return target


def test_one_image_can_be_restarted_twice_at_the_same_time(stage):
    target = begin(stage)
    image = target.checkpoint()
    target.kill()
    first, second = begin_restart(stage, image, "first"), begin_restart(stage, image, "second")
    assert {entry["name"] for entry in stage.list()} == {"first", "second"}
    stage.go()
    assert (first.wait_for_end(), second.wait_for_end()) == (0, 0), first.report() + second.report()
    assert target.lines().count("PASS") == 2  # both write to the file that was standard output


def test_an_image_can_be_restarted_while_its_original_still_runs(stage):
    target = begin(stage)
    image = target.checkpoint()
    twin = begin_restart(stage, image, "twin")
    stage.go()
    assert (target.wait_for_end(), twin.wait_for_end()) == (0, 0), target.report() + twin.report()
    assert target.lines().count("PASS") == 2


# ---- inspect and verify ---------------------------------------------------------------------------------------------

SECTION_TABLE_OFFSET, SECTION_BYTES = 96, 32
HEADER_BYTES = 4096


def sections_of(image):
    """(kind, flags, offset, bytes, checksum) of each section."""
    data = image.read_bytes()
    (count,) = struct.unpack_from("<I", data, SECTION_TABLE_OFFSET - 8)
    return [struct.unpack_from("<IIQQQ", data, SECTION_TABLE_OFFSET + i * SECTION_BYTES) for i in range(count)]


def page_records_of(image):
    """(object, address, bytes, kind, codec, reserved, store, stored bytes, offset, checksum) of each run of pages."""
    data = image.read_bytes()
    records = []
    for kind, _, offset, length, _ in sections_of(image):
        if kind == 2:
            records += [struct.unpack_from("<QQIBBHIIQQ", data, offset + at) for at in range(0, length, 48)]
    return records


def xxh3(data):
    library = ctypes.CDLL("libxxhash.so.0")
    library.XXH3_64bits.restype = ctypes.c_uint64
    library.XXH3_64bits.argtypes = [ctypes.c_char_p, ctypes.c_size_t]
    return library.XXH3_64bits(data, len(data))


@pytest.fixture
def image(own_stage):
    target = begin(own_stage)
    made = target.checkpoint()
    target.kill()
    return made


def damaged_copy(image, damage):
    data = bytearray(image.read_bytes())
    damage(data)
    copy = image.parent / "damaged.ckpt"
    copy.write_bytes(data)
    if os.stat(image).st_uid != os.getuid():
        shutil.chown(copy, os.stat(image).st_uid)
    return copy


def expect_unusable(stage, copy, *words):
    """Nothing takes the image: all say so with status 1, and nothing runs."""
    expect_error(stage.vmckpt("verify", copy), *words)
    expect_error(stage.vmckpt("restart", copy, "--detach", "-n", "never"), *words)
    assert stage.list() == []


def test_inspect_shows_what_restart_will_use(own_stage, image):
    shown = own_stage.vmckpt_ok("inspect", image, "--json")
    text = json.dumps(shown.json)
    for word in ("act_threads", "act-thread-7", "target.stdout", own_stage.go_file, "[stack]", "libstdc++"):
        assert word in text, word
    plain = own_stage.vmckpt_ok("inspect", image).stdout
    for word in ("act_threads", "act-thread-7", "target.stdout"):
        assert word in plain, word


def test_verify_accepts_a_good_image(own_stage, image):
    assert own_stage.vmckpt("verify", image).status == 0


def test_a_missing_image_is_named(own_stage):
    for verb in ("verify", "restart", "inspect"):
        expect_error(own_stage.vmckpt(verb, "nowhere.ckpt"), "nowhere.ckpt")


def test_a_truncated_image_is_found_by_verify_and_by_restart(own_stage, image):
    whole = image.stat().st_size
    for length in (0, 7, 4095, 4096, 8192, whole // 2, whole - 4096, whole - 1):
        def truncate(data, length=length):
            del data[length:]

        expect_unusable(own_stage, damaged_copy(image, truncate))


def test_a_flipped_bit_in_the_header_or_any_section_is_found_by_verify_and_by_restart(own_stage, image):
    offsets = [0, 9, 13, 17, 40, 70, 100, 2000, 4090]
    for _, _, offset, length, _ in sections_of(image):
        offsets += [offset, offset + length // 2, offset + length - 1]
    for at in offsets:
        def flip(data, at=at):
            data[at] ^= 0x10

        expect_unusable(own_stage, damaged_copy(image, flip))


def test_a_flipped_bit_in_any_page_is_found_by_verify(own_stage, image):
    records = page_records_of(image)
    assert records
    generator = random.Random(7)
    for record in [records[0], records[-1], *generator.sample(records, min(8, len(records)))]:
        _, _, _, kind, codec, _, store, length, offset, _ = record
        assert (kind, codec, store) == (1, 0, 0)
        at = offset + generator.randrange(length)

        def flip(data, at=at):
            data[at] ^= 0x01

        expect_error(own_stage.vmckpt("verify", damaged_copy(image, flip)))


def test_an_image_of_a_newer_format_is_refused_as_such(own_stage, image):
    def make_newer(data):
        struct.pack_into("<II", data, 8, 99, 99)
        struct.pack_into("<Q", data, HEADER_BYTES - 8, xxh3(bytes(data[:HEADER_BYTES - 8])))

    expect_unusable(own_stage, damaged_copy(image, make_newer), "version")


def test_a_section_of_unknown_kind_is_refused(own_stage, image):
    def add_section(data):
        (count,) = struct.unpack_from("<I", data, SECTION_TABLE_OFFSET - 8)
        known = struct.unpack_from("<IIQQQ", data, SECTION_TABLE_OFFSET)
        struct.pack_into("<IIQQQ", data, SECTION_TABLE_OFFSET + count * SECTION_BYTES, 77, 0, *known[2:])
        struct.pack_into("<I", data, SECTION_TABLE_OFFSET - 8, count + 1)
        struct.pack_into("<Q", data, HEADER_BYTES - 8, xxh3(bytes(data[:HEADER_BYTES - 8])))

    expect_unusable(own_stage, damaged_copy(image, add_section))


@pytest.mark.parametrize("content", [b"", b"some text\n", b"\x7fELF" + bytes(8000), bytes(100_000)],
                         ids=["nothing", "text", "a program", "zeros"])
def test_a_file_that_is_no_image_is_called_that(own_stage, content):
    file = own_stage.work / "foreign"
    file.write_bytes(content)
    file.chmod(0o644)
    expect_unusable(own_stage, file, "foreign")
    expect_error(own_stage.vmckpt("inspect", file), "foreign")


def with_metadata(image, metadata):
    """A copy with other metadata, all checksums right."""
    def replace(data):
        (offset, length), (index, index_bytes) = [entry[2:4] for entry in sections_of(image)]
        records = bytes(data[index:index + index_bytes])
        del data[offset:]
        data += metadata + bytes(-len(metadata) % 8)
        struct.pack_into("<IIQQQ", data, SECTION_TABLE_OFFSET, 1, 0, offset, len(metadata), xxh3(metadata))
        struct.pack_into("<IIQQQ", data, SECTION_TABLE_OFFSET + SECTION_BYTES, 2, 0, len(data), index_bytes, xxh3(records))
        data += records
        struct.pack_into("<Q", data, SECTION_TABLE_OFFSET - 16, len(data))
        struct.pack_into("<Q", data, HEADER_BYTES - 8, xxh3(bytes(data[:HEADER_BYTES - 8])))

    return damaged_copy(image, replace)


def test_metadata_that_would_fill_the_memory_when_it_is_decoded_is_refused_with_a_sentence(own_stage, image):
    empty_thread = b"\x22\x00"
    hostile = with_metadata(image, empty_thread * 4_000_000)
    expect_unusable(own_stage, hostile, "MiB of memory when it is decoded")
    expect_error(own_stage.vmckpt("inspect", hostile), "MiB of memory when it is decoded")


@pytest.mark.parametrize("words", [["verify"], ["inspect"], ["inspect", "--json"]], ids=" ".join)
def test_want_of_memory_is_told_with_a_sentence(own_stage, image, words):
    """However little there is: each megabyte more lets it come a step further."""
    metadata = image.read_bytes()[sections_of(image)[0][2]:][:sections_of(image)[0][3]]
    note = b"\x3a\xe8\x07" + b"n" * 1000
    large = with_metadata(image, metadata + note * 20_000)
    refused = 0
    for mebibytes in range(24, 400, 8):
        outcome = own_stage.run(["prlimit", f"--as={mebibytes << 20}", VMCKPT, *words, large])
        assert not re.search("terminate called|Sanitizer|core dumped", outcome.stderr), outcome
        if outcome.status == 1 and "memory" in outcome.stderr:
            refused += 1
            assert len(outcome.stderr.splitlines()) == 1, outcome
        if outcome.status == 0:
            break
    assert refused, outcome


def test_random_damage_never_makes_a_command_crash(own_stage, image):
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    generator = random.Random(seed)
    for _ in range(30):
        def damage(data):
            for _ in range(generator.randrange(1, 20)):
                # Mostly where structure is: the header and the sections at the end.
                at = generator.choice([generator.randrange(HEADER_BYTES), -generator.randrange(1, 20_000)])
                data[at] = generator.randrange(256)

        copy = damaged_copy(image, damage)
        for verb in ("verify", "inspect"):
            outcome = own_stage.vmckpt(verb, copy)
            assert outcome.status in (0, 1), f"seed {seed}: {outcome}"
            assert not re.search("terminate called|Sanitizer|core dumped", outcome.stderr), f"seed {seed}: {outcome}"
