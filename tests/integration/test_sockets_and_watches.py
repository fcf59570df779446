# SPDX-License-Identifier: Apache-2.0
"""Descriptors after an eventful life: what a program could still do to each of them, not only what it reads. Programs of three
acts, as in test_resources.py."""

import os
import shutil
import socket
import subprocess

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
    Act("dropped_watches"),
    Act("dropped_mailbox"),
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
    "own-directory": "a working directory and umask of its own",
    "landlock": "has restricted itself with Landlock",
    "landlock-before-exec": "has restricted itself with Landlock",
    "deep-path": "is longer than 4096 characters",
    "tcp-urgent": "has unread urgent data (MSG_OOB)",
    "unix-urgent": "has unread urgent data (MSG_OOB)",
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


@needs_vmckpt
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
@pytest.mark.parametrize("exchanged", ["folder", "file"])
def test_root_watches_nothing_else_for_a_program_that_gave_up_its_rights(make_stage, exchanged):
    """Its user has put a link in place of the folder, or another file in place of the watched one."""
    stage = make_stage(ROOT)
    target = begin(stage, "dropped_watches")
    image = target.checkpoint()
    target.kill()
    own = stage.work / "own"
    if exchanged == "folder":
        own.rename(stage.work / "own.away")
        own.symlink_to("own.away")
        wanted = "leads over a symbolic link now"
    else:
        (own / "after").rename(own / "after.away")
        (own / "after").touch()
        wanted = "is another file than at the checkpoint"
    outcome = stage.vmckpt("restart", image, "--detach", "-n", "refused")
    assert outcome.status == 1 and "own/after" in outcome.stderr and wanted in outcome.stderr
    assert f"watches a file: \"{own}/after\"" in outcome.stderr
    assert stage.list() == []


# Exchanges the folder "own" for a link to "of root" as soon as a socket has been bound there.
EXCHANGER = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int bind(int fd, const struct sockaddr *address, socklen_t bytes) {
  int (*next)(int, const struct sockaddr *, socklen_t) = (int (*)(int, const struct sockaddr *, socklen_t))dlsym(RTLD_NEXT, "bind");
  int result = next(fd, address, bytes);
  if (result == 0 && address->sa_family == AF_UNIX && strcmp(((const struct sockaddr_un *)address)->sun_path, "own/box") == 0 &&
      (rename("own", "own.away") != 0 || symlink("of root", "own") != 0))
    return -1;
  return result;
}
"""


@needs_vmckpt
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be two users")
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_root_connects_to_the_sockets_of_the_program_whatever_their_names_lead_to_by_now(make_stage):
    stage = make_stage(ROOT)
    target = begin(stage, "dropped_mailbox")
    image = target.checkpoint()
    target.kill()
    other = stage.work / "of root"
    other.mkdir(mode=0o755)
    exchanger = stage.file("exchanger.so")
    subprocess.run(["cc", "-shared", "-fPIC", "-xc", "-", "-o", exchanger, "-ldl"], input=EXCHANGER.encode(), check=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as roots:
        roots.bind(str(other / "box"))
        stage.environment["LD_PRELOAD"] = str(exchanger)
        target.restart(image)
        assert (stage.work / "own").is_symlink()
        with pytest.raises(BlockingIOError):
            roots.recv(16, socket.MSG_DONTWAIT)
    end(stage, target)
