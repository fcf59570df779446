# SPDX-License-Identifier: Apache-2.0
"""QEMU's `savevm` and `-loadvm`: an internal snapshot in a qcow2 file, with the guest stopped meanwhile.

The qcow2 is not attached to any device of the guest, so the machine is the same as for the other peers.
"""

import os
import time

from peers.peer import Checkpoint, Peer, Restart, elapsed_us, sync_file
from qmp import Qmp

TAG = "bench"
# Only an upper limit, the file grows as needed. The VM's state may be larger than the disk; this leaves room.
DISK_SIZE = "16G"


class Savevm(Peer):
    name = "QEMU savevm"

    def __init__(self, spec, directory, guest_directory):
        super().__init__(spec, directory, guest_directory)
        self.qmp = None
        self._saved = False
        self.image = os.path.join(directory, "state.qcow2")

    def start(self):
        self.run_command(["qemu-img", "create", "-q", "-f", "qcow2", self.image, DISK_SIZE])
        super().start()
        self.qmp = Qmp(self.qmp_path)

    def kill(self):
        if self.qmp:
            self.qmp.close()
            self.qmp = None
        super().kill()

    def extra_qemu_options(self):
        return ["-drive", f"file={self.image},format=qcow2,if=none,id=state,discard=unmap"]

    def checkpoint(self, stop=False):
        if self._saved:
            self.qmp.human(f"delvm {TAG}")
            sync_file(self.image)
        started_ns = time.monotonic_ns()
        self.qmp.human(f"savevm {TAG}")
        total_us = elapsed_us(started_ns)
        sync_file(self.image)
        durable_us = elapsed_us(started_ns)
        self._saved = True
        return Checkpoint(total_us=total_us, durable_us=durable_us, image_bytes=self._state_bytes(),
                          files=[self.image])

    def restart(self):
        self._launch(self.qemu_command("-loadvm", TAG))
        return Restart()

    def _state_bytes(self):
        for node in self.qmp.call("query-named-block-nodes"):
            for snapshot in node["image"].get("snapshots", ()):
                if snapshot["name"] == TAG:
                    return snapshot["vm-state-size"]
        raise LookupError(f"no snapshot {TAG} in {self.image}")
