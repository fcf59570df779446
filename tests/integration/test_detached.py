# SPDX-License-Identifier: Apache-2.0
"""Targets that run in the background: where their output goes, their terminal, how they are ended, what is known afterwards."""

import os
import pathlib
import re
import shutil

import pexpect
import pytest

from vmckpt_harness import VMCKPT, process_is_alive, wait_until

pytestmark = pytest.mark.skipif(not os.access(VMCKPT, os.X_OK), reason=f"{VMCKPT} is not built")


def launch(stage, script, *options, name="it", **run_options):
    outcome = stage.vmckpt_ok("launch", "--detach", "-n", name, "-d", stage.images, *options, "--", "sh", "-c", script, **run_options)
    assert outcome.stdout.split()[0] == name, outcome
    return int(outcome.stdout.split()[1])


def logs(stage, name="it"):
    return stage.vmckpt_ok("logs", name).stdout


def wait_for_log(stage, text, name="it"):
    wait_until(lambda: text in logs(stage, name), lambda: f"{text} in the log; {logs(stage, name)}")


def everything(stage):
    return stage.vmckpt_ok("list", "--json", "--all").json


# ---- output ---------------------------------------------------------------------------------------------------------

def test_what_is_said_into_the_callers_pipe_is_in_the_log_and_the_pipe_ends_with_the_command(stage):
    launch(stage, "echo first; echo second >&2; exec sleep 1000")  # comes back only because nobody keeps its pipes
    wait_for_log(stage, "second")
    assert logs(stage) == "first\nsecond\n"
    assert (stage.images / "it.log").stat().st_mode & 0o777 == 0o600
    stage.vmckpt_ok("kill", "it")


def test_output_to_a_file_stays_there(stage):
    path = stage.file("own.txt")
    with open(path, "ab") as file:
        words = [VMCKPT, "launch", "--detach", "-n", "it", "-d", stage.images, "--", "sh", "-c", "echo here; exec sleep 1000"]
        assert stage.start(words, stdout=file, stderr=file).wait(timeout=60) == 0
    wait_until(lambda: "here\n" in path.read_text(), lambda: path.read_text())
    assert not (stage.images / "it.log").exists()
    outcome = stage.vmckpt("logs", "it")
    assert (outcome.status, "has no log" in outcome.stderr) == (1, True)
    stage.vmckpt_ok("kill", "it")


def test_checkpoint_stop_comes_back_when_the_target_has_ended_and_its_name_is_free(stage):
    pid = launch(stage, f"exec {stage.act('threads')} {stage.go_file}")
    wait_for_log(stage, "READY")
    for _ in range(10):
        image = stage.vmckpt_ok("checkpoint", "it", "--kill", "--json").json["image"]
        assert not process_is_alive(pid)
        restarted = stage.vmckpt_ok("restart", "--detach", image, "-n", "it")
        pid = int(restarted.stdout.split()[1])
    stage.vmckpt_ok("kill", "it")


def test_the_log_goes_on_after_a_restart(stage):
    launch(stage, f"echo before; exec {stage.act('threads')} {stage.go_file}")
    wait_for_log(stage, "READY")
    image = stage.vmckpt_ok("checkpoint", "--json").json["image"]
    stage.vmckpt_ok("kill", "it")
    stage.vmckpt_ok("restart", image, "--detach")
    stage.go()
    wait_until(lambda: stage.list() == [], "it has ended")
    assert logs(stage) == "before\nREADY\nPASS\n"


def test_logs_follow_until_the_end(stage):
    launch(stage, f"echo one; while [ ! -e {stage.go_file} ]; do sleep 0.05; done; echo two")
    wait_for_log(stage, "one")
    out = stage.file("followed")
    with open(out, "ab") as file:
        follower = stage.start([VMCKPT, "logs", "-f", "it"], stdout=file)
    wait_until(lambda: out.read_text() == "one\n", "the first line")
    stage.go()
    assert follower.wait(timeout=60) == 0
    assert out.read_text() == "one\ntwo\n"


# ---- the end --------------------------------------------------------------------------------------------------------

def test_an_ended_target_is_remembered_with_its_status_and_named_when_it_is_asked_for(stage):
    launch(stage, "trap 'exit 7' TERM; echo up; read forever", "--terminal")
    wait_for_log(stage, "up")
    image = stage.vmckpt_ok("checkpoint", "it", "--json").json["image"]
    stage.vmckpt_ok("stop", "it")
    (entry,) = everything(stage)
    assert (entry["name"], entry["state"], entry["status"], entry["last_image"]) == ("it", "exited", 7, image)
    assert re.search(r"^it +- +exited .*ended \d+ s ago with status 7", stage.vmckpt_ok("list").stdout, re.M)
    outcome = stage.vmckpt("checkpoint", "it")
    assert outcome.status == 1
    for word in ("with status 7", image, "vmckpt logs it"):
        assert word in outcome.stderr, outcome


def test_stop_lets_a_target_end_by_itself(stage):
    launch(stage, "trap 'echo tidy; exit 3' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_log(stage, "up")
    stage.vmckpt_ok("stop", "it")
    assert logs(stage).endswith("tidy\n")
    (entry,) = everything(stage)
    assert entry["status"] == 3


def test_stop_kills_a_target_that_does_not_end(stage):
    pid = launch(stage, "trap '' TERM; echo up; while :; do sleep 0.05; done")
    wait_for_log(stage, "up")
    outcome = stage.vmckpt_ok("stop", "--timeout", "0.3", "it")
    assert "killed" in outcome.stderr
    assert not process_is_alive(pid)
    (entry,) = everything(stage)
    assert entry["signal"] == 9


def test_kill_leaves_no_process_of_the_target(stage):
    pids = stage.work / "pids"
    launch(stage, f"sleep 1000 & echo $! >{pids}; sleep 1000 & echo $! >>{pids}; echo up; wait")
    wait_for_log(stage, "up")
    stage.vmckpt_ok("kill", "it")
    assert stage.list() == []
    assert not any(process_is_alive(int(pid)) for pid in pids.read_text().split())


def test_a_stopped_target_is_ended_too(stage):
    pid = launch(stage, "kill -STOP $$; echo continued; exit 0")
    wait_until(lambda: [entry["state"] for entry in stage.list()] == ["stopped"], "it has stopped itself")
    stage.vmckpt_ok("stop", "it")
    assert not process_is_alive(pid)


# ---- the terminal ---------------------------------------------------------------------------------------------------

ECHO = "stty -echo; echo ready; while read line; do echo \"got $line at $(stty size)\"; done"


def attach(stage, rows=30, columns=90):
    return stage.start_on_terminal([VMCKPT, "attach", "it"], rows=rows, columns=columns)


def test_one_attaches_to_the_terminal_of_a_target_leaves_it_and_comes_back(stage):
    pid = launch(stage, ECHO, "--terminal")
    wait_for_log(stage, "ready")
    for word in ("one", "two"):
        screen = attach(stage)
        screen.expect("ready")  # what it has shown before
        screen.sendline(word)
        screen.expect(f"got {word} at 30 90")
        screen.sendcontrol("]")
        screen.expect("left; the target runs on")
        screen.expect(pexpect.EOF)
    assert process_is_alive(pid)
    assert "got two" in logs(stage)
    stage.vmckpt_ok("kill", "it")


def test_control_c_at_an_attached_terminal_reaches_the_target(stage):
    launch(stage, "trap 'echo caught; exit 4' INT; echo ready; while :; do sleep 0.05; done", "--terminal")
    wait_for_log(stage, "ready")
    screen = attach(stage)
    screen.expect("ready")
    screen.sendcontrol("c")
    screen.expect("caught")
    screen.expect("has ended")
    (entry,) = everything(stage)
    assert entry["status"] == 4


def test_one_attaches_to_a_restarted_target_too(stage):
    launch(stage, ECHO, "--terminal")
    wait_for_log(stage, "ready")
    image = stage.vmckpt_ok("checkpoint", "--json").json["image"]
    stage.vmckpt_ok("kill", "it")
    stage.vmckpt_ok("restart", image, "--detach")
    screen = attach(stage)
    screen.sendline("again")
    screen.expect("got again at 30 90")
    screen.sendcontrol("]")
    screen.expect(pexpect.EOF)
    stage.vmckpt_ok("kill", "it")


def test_launched_from_a_terminal_a_detached_target_has_one_of_its_own(stage):
    """The caller's may be closed; the target does not write into it, and is not hung up with it."""
    caller = stage.start_on_terminal(["sh", "-c", f"{VMCKPT} launch --detach -n it -d {stage.images} -- sh -c '{ECHO}'; echo done"])
    caller.expect("it [0-9]+")
    caller.expect("done")
    caller.close(force=True)
    wait_for_log(stage, "ready")
    screen = attach(stage)
    screen.sendline("hello")
    screen.expect("got hello")
    screen.close(force=True)
    stage.vmckpt_ok("kill", "it")


def test_a_target_without_a_terminal_is_not_attached_to(stage):
    launch(stage, "exec sleep 1000")
    screen = attach(stage)
    screen.expect("has no terminal of its own")
    screen.expect(pexpect.EOF)
    screen.close()
    assert screen.exitstatus == 1
    stage.vmckpt_ok("kill", "it")


# ---- completion -----------------------------------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not installed")
def test_bash_completes_verbs_options_and_names(stage):
    launch(stage, "exec sleep 1000", name="a-target")
    script = pathlib.Path(__file__).resolve().parents[2] / "tools" / "completion" / "vmckpt.bash"

    def complete(*words):
        line = f"source {script}; COMP_WORDS=(vmckpt {' '.join(repr(word) for word in words)}); COMP_CWORD={len(words)}; _vmckpt; echo \"${{COMPREPLY[@]}}\""
        environment = {**stage.environment, "PATH": f"{pathlib.Path(VMCKPT).parent}:{stage.environment['PATH']}"}
        return stage.run(["bash", "-c", line], env=environment).stdout.split()

    assert complete("che") == ["checkpoint"]
    assert complete("checkpoint", "a") == ["a-target"]
    assert complete("stop", "--ti") == ["--timeout"]
    stage.vmckpt_ok("kill", "a-target")
