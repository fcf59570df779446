# SPDX-License-Identifier: Apache-2.0
"""QEMU's background snapshot: migration with write protection by userfaultfd, so that the guest runs meanwhile.

A capability of `migrate`, so the rest is as in migrate.py. Needs the right to make a userfaultfd that also catches the
kernel's faults: root, or vm.unprivileged_userfaultfd=1.
"""

import os

from peers.migrate import Migrate

UNPRIVILEGED = "/proc/sys/vm/unprivileged_userfaultfd"


class BackgroundSnapshot(Migrate):
    name = "QEMU background-snapshot"
    capabilities = ("events", "background-snapshot")

    @classmethod
    def why_not(cls):
        if not os.path.exists(UNPRIVILEGED):
            return "this kernel has no userfaultfd"
        with open(UNPRIVILEGED, encoding="ascii") as setting:
            allowed = setting.read().strip() == "1"
        return None if os.geteuid() == 0 or allowed else "needs root or vm.unprivileged_userfaultfd=1"

    def _save(self):
        self._wait_written(self._migrate())
