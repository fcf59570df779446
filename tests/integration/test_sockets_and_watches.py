# SPDX-License-Identifier: Apache-2.0
"""Descriptors after an eventful life: what a program could still do to each of them, not only what it reads. Programs of three
acts, as in test_resources.py."""

import os
import socket

import pytest

from test_resources import Act, begin, each, end, expect_clear_refusal, needs_vmckpt, play, variants
from vmckpt_harness import ORDINARY_USER, ROOT

LIVED_IN = [
    Act("inotify_churn"),
    Act("unix_names"),
    Act("inet_states"),
    Act("owners_and_pidfds"),
    Act("descriptor_details"),
    Act("peer_credentials"),
]


@each(LIVED_IN)
@variants
def test_a_descriptor_that_has_seen_much_is_what_it_was(stage, act, variant):
    play(stage, act, variant)


# What passes by itself within a moment, or cannot be had again: the words of the refusal say which.
REFUSED = {
    "bpf-map": "a BPF program, map or link",
    "packet-socket": "a packet socket",
    "lease-breaking": "checkpoint again when the program has answered",
    "tcp-not-accepted": "over a connection that the program has not accepted yet",
    "unix-not-accepted": "over a connection that the program has not accepted yet",
}


@needs_vmckpt
@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_saved_is_refused_by_name(stage, kind):
    target = begin(stage, "unsupported", kind)
    outcome = stage.vmckpt("checkpoint", target.name)
    expect_clear_refusal(stage, outcome)
    assert REFUSED[kind] in outcome.stderr
    end(stage, target)


@needs_vmckpt
def test_an_ordinary_user_is_told_how_long_connections_of_the_target_hold_its_port(make_stage):
    """They linger in the kernel after the target has ended, and only root can end them."""
    stage = make_stage(ORDINARY_USER)
    target = begin(stage, "inet_states", "without SO_REUSEADDR")
    image = target.checkpoint()
    target.kill()
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1
    assert "TIME_WAIT" in outcome.stderr and "seconds, or as root" in outcome.stderr
    assert stage.list() == []


@needs_vmckpt
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_root_makes_no_socket_where_the_program_that_gave_up_its_rights_could_not(make_stage):
    """The folder of a socket has been exchanged for a link by the program's user."""
    stage = make_stage(ROOT)
    target = begin(stage, "peer_credentials")
    image = target.checkpoint()
    target.kill()
    secret = stage.work / "of root"
    secret.mkdir(mode=0o700)
    (stage.work / "own").rename(stage.work / "own.away")
    (stage.work / "own").symlink_to(secret)
    os.lchown(stage.work / "own", ORDINARY_USER.uid, ORDINARY_USER.uid)
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1 and "own/after" in outcome.stderr
    assert list(secret.iterdir()) == []
    assert stage.list() == []


@needs_vmckpt
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
def test_root_removes_no_socket_file_where_the_program_that_gave_up_its_rights_could_not(make_stage):
    """A file that an ended process has left is in the way; the folder's name leads to another one by now."""
    stage = make_stage(ROOT)
    target = begin(stage, "peer_credentials")
    image = target.checkpoint()
    target.kill()
    other = stage.work / "of root"
    other.mkdir()
    other.chmod(0o1777)
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(other / "after"))
    (stage.work / "own").rename(stage.work / "own.away")
    (stage.work / "own").symlink_to(other)
    os.lchown(stage.work / "own", ORDINARY_USER.uid, ORDINARY_USER.uid)
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1 and "own/after" in outcome.stderr
    assert [entry.name for entry in other.iterdir()] == ["after"]
    assert stage.list() == []
