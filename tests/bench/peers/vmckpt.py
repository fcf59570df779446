# SPDX-License-Identifier: Apache-2.0
"""Ours: `vmckpt launch`, `checkpoint`, `restart`."""

import json
import os
import subprocess
import time

import guest
from peers.peer import Checkpoint, Peer, PeerFailed, Restart, elapsed_us, used_bytes

VMCKPT = os.environ.get("VMCKPT", os.path.join(guest.REPOSITORY, "build", "vmckpt"))


def environment(directory):
    """Control sockets of our own, so that a benchmark never meets the user's targets."""
    runtime = os.path.join(directory, "run")
    os.makedirs(runtime, mode=0o700, exist_ok=True)
    return {**os.environ, "VMCKPT_RUNTIME_DIR": runtime}


def launch_detached(command, name, directory, log_path):
    """Runs a command under vmckpt; returns its PID."""
    output = run_detaching([VMCKPT, "launch", "-n", name, "-d", directory, "--detach", "--", *command],
                           directory, log_path)
    return int(output.split()[1])


def run_detaching(command, directory, log_path):
    """Runs a vmckpt command that leaves a target behind, and returns what the command printed.

    The target inherits files, not pipes: reading a pipe to its end would mean waiting for the target's.
    """
    output_path = os.path.join(directory, "stdout")
    with open(log_path, "ab") as log, open(output_path, "wb") as output:
        status = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=log, check=False,
                                env=environment(directory)).returncode
    with open(log_path, encoding="utf-8", errors="replace") as log:
        said = log.read().strip().splitlines()
    if status != 0:
        raise PeerFailed(f"vmckpt {command[1]} ended with status {status}: {said[-1] if said else 'without a word'}")
    with open(output_path, encoding="utf-8") as output:
        return output.read()


class Vmckpt(Peer):
    name = "vmckpt"

    @classmethod
    def why_not(cls):
        return None if os.access(VMCKPT, os.X_OK) else f"{VMCKPT} is missing; build it, or set VMCKPT"

    def __init__(self, spec, directory, guest_directory):
        super().__init__(spec, directory, guest_directory)
        self._environment = environment(directory)
        self._generation = 0
        self.image = None

    def _launch(self, command):
        self.pid = launch_detached(command, "bench", self.directory, self.log_path)

    def checkpoint(self, stop=False):
        self._generation += 1
        self.image = os.path.join(self.directory, f"bench-{self._generation}.ckpt")
        command = [VMCKPT, "checkpoint", "bench", "-o", self.image, "--json"]
        started_ns = time.monotonic_ns()
        report = json.loads(self.run_command(command + (["--kill"] if stop else []), self._environment))
        total_us = elapsed_us(started_ns)
        phases_us = report["phases_us"]
        # The image is committed with fsync before the command returns: there is nothing left to sync.
        return Checkpoint(total_us=total_us, durable_us=total_us, image_bytes=used_bytes(self.image),
                          files=[self.image], engine_pause_us=report["pause_us"],
                          writing_us=sum(phases_us.get(name, 0) for name in ("write", "seal", "publish", "commit")), phases_us=phases_us)

    def restart(self):
        command = [VMCKPT, "restart", self.image, "-n", "bench", "--detach", "--json"]
        report = json.loads(run_detaching(command, self.directory, self.log_path))
        self.pid = int(report["pid"])
        return Restart(engine_restart_us=report["restart_us"], phases_us=report["phases_us"])

    def kill(self):
        """Also waits for the supervisor to have noticed: the next restart wants the same name."""
        super().kill()
        deadline = time.monotonic() + 10
        while json.loads(self.run_command([VMCKPT, "list", "--json"], self._environment)):
            if time.monotonic() > deadline:
                raise PeerFailed("vmckpt still lists the target 10 s after it was killed")
            time.sleep(0.005)
