# SPDX-License-Identifier: Apache-2.0
"""CRIU (root only), from Debian or as the environment variable CRIU says.

Debian 12's 3.17 does not run on Linux 6.13 and later: it does not know the [vvar_vclock] mapping (CRIU issue 2532,
mended in 4.1). CRIU saves no connection to a process outside, so ticks go through a file here.
"""

import glob
import os
import shutil
import subprocess
import time

from peers.peer import Checkpoint, Peer, Restart, elapsed_us, sync_file, used_bytes

CRIU = os.environ.get("CRIU", "criu")


class Criu(Peer):
    name = "CRIU"
    ticks_through_file = True

    @classmethod
    def why_not(cls):
        if os.geteuid() != 0:
            return "needs root"
        if not shutil.which(CRIU):
            return "not installed (Debian package criu)"
        check = subprocess.run([CRIU, "check"], capture_output=True, text=True, check=False)
        if check.returncode == 0:
            return None
        errors = [line for line in check.stderr.splitlines() if "Error" in line]
        # Newest first is how CRIU unwinds, but the cause is the first one that names a source file other than util.c.
        causes = [line for line in errors if "util.c" not in line] or errors
        return f"`criu check` fails: {causes[0] if causes else check.stderr.strip()}"

    def __init__(self, spec, directory, guest_directory):
        super().__init__(spec, directory, guest_directory)
        self.images = os.path.join(directory, "images")
        self._tick_bytes = None
        self._dumped_pid = None

    def checkpoint(self, stop=False):
        shutil.rmtree(self.images, ignore_errors=True)
        os.makedirs(self.images)
        # Without --leave-running CRIU kills the process itself. That is what a restart needs: CRIU refuses to
        # restore when a file has grown since the dump.
        leave = [] if stop else ["--leave-running"]
        started_ns = time.monotonic_ns()
        self.run_command([CRIU, "dump", "-t", str(self.pid), "-D", self.images, "-o", "dump.log", *leave])
        total_us = elapsed_us(started_ns)
        files = sorted(glob.glob(os.path.join(self.images, "*.img")), key=os.path.getsize, reverse=True)
        for path in files:
            sync_file(path)
        durable_us = elapsed_us(started_ns)
        self._tick_bytes = os.path.getsize(self.tick_path)
        return Checkpoint(total_us=total_us, durable_us=durable_us, image_bytes=sum(map(used_bytes, files)),
                          files=files)

    def restart(self):
        # The same check of the file's size stands against a second restart.
        os.truncate(self.tick_path, self._tick_bytes)
        self.ticks.rewind(self._tick_bytes)
        self.run_command([CRIU, "restore", "-D", self.images, "-d", "-o", "restore.log"])
        self.pid = self._dumped_pid     # CRIU restores it
        return Restart()

    def kill(self):
        if self.pid is not None:
            self._dumped_pid = self.pid
        super().kill()
