# SPDX-License-Identifier: Apache-2.0
"""QEMU's migration into a file: `migrate exec:` and `-incoming exec:`, with the guest stopped or running meanwhile.

QEMU 7.2 limits migration to 128 MiB/s unless told otherwise, which would measure the limit; it is lifted here.
The downtime limit stays at QEMU's default of 300 ms. None of this syncs the file; durable_us adds that.
"""

import os
import shlex
import time

from peers.peer import Checkpoint, Peer, PeerFailed, Restart, elapsed_us, sync_file, used_bytes
from qmp import Qmp, QmpError

MAX_BANDWIDTH_BYTES_PER_S = 1 << 40


class Migrate(Peer):
    capabilities = ("events",)      # so that the end is an event, and not found by polling

    def __init__(self, spec, directory, guest_directory):
        super().__init__(spec, directory, guest_directory)
        self.qmp = None
        self.image = os.path.join(directory, "image")

    def start(self):
        super().start()
        self.qmp = Qmp(self.qmp_path)
        self.qmp.call("migrate-set-capabilities",
                      capabilities=[{"capability": name, "state": True} for name in self.capabilities])
        self.qmp.call("migrate-set-parameters", max_bandwidth=MAX_BANDWIDTH_BYTES_PER_S)

    def kill(self):
        if self.qmp:
            self.qmp.close()
            self.qmp = None
        super().kill()

    def checkpoint(self, stop=False):
        if os.path.exists(self.image):
            os.unlink(self.image)
        started_ns = time.monotonic_ns()
        self._save()
        total_us = elapsed_us(started_ns)
        sync_file(self.image)
        return Checkpoint(total_us=total_us, durable_us=elapsed_us(started_ns), image_bytes=used_bytes(self.image),
                          files=[self.image])

    def restart(self):
        # Goes on by itself at the end of the image, whatever the source did after saving.
        self._launch(self.qemu_command("-incoming", f"exec:cat {shlex.quote(self.image)}"))
        return Restart()

    def _save(self):
        raise NotImplementedError

    def _migrate(self):
        """Returns when the image is complete. The guest's state is left as migration leaves it."""
        done = self.image + ".done"
        # "completed" is said while the other end of the pipe is still writing; the second command says when it is not.
        self.qmp.forget_events()
        self.qmp.call("migrate", uri=f"exec:cat > {shlex.quote(self.image)} && : > {shlex.quote(done)}")
        ends = ("completed", "failed", "cancelled")
        event = None
        while not event:
            event = self.qmp.wait_event(lambda e: e["event"] == "MIGRATION" and e["data"]["status"] in ends, 0.5)
            if not event:
                self._give_up_if_diverging()
        if event["data"]["status"] != "completed":
            reason = self.qmp.call("query-migrate").get("error-desc", "without a reason")
            raise PeerFailed(f"migration {event['data']['status']}: {reason}")
        return done

    def _give_up_if_diverging(self):
        """A guest that writes faster than the pipe takes would fill the disk."""
        ram = self.qmp.call("query-migrate").get("ram")
        if ram and ram["transferred"] > 2 * ram["total"]:
            self.qmp.call("migrate_cancel")
            raise PeerFailed(f"did not converge: gave up after writing {ram['transferred'] >> 20} MiB")

    def _continue(self):
        """QEMU says "completed" a moment before it accepts `cont`."""
        while True:
            try:
                self.qmp.call("cont")
                return
            except QmpError as error:
                if "not finalized" not in str(error):
                    raise
                time.sleep(0.0002)

    @staticmethod
    def _wait_written(done):
        while not os.path.exists(done):
            time.sleep(0.0005)
        os.unlink(done)


class MigrateLive(Migrate):
    name = "QEMU migrate, live"

    def _save(self):
        done = self._migrate()
        self._continue()
        self._wait_written(done)


class MigrateStopped(Migrate):
    name = "QEMU migrate, stopped"
    left_out_when_quick = True      # savevm stops the guest just as long

    def _save(self):
        self.qmp.call("stop")
        done = self._migrate()
        self._wait_written(done)
        self._continue()

    def restart(self):
        # The image says that the guest was stopped, so the new QEMU has to be told to go on, once it has loaded.
        started = super().restart()
        qmp = Qmp(self.qmp_path)
        while qmp.call("query-status")["status"] == "inmigrate":
            time.sleep(0.0005)
        qmp.call("cont")
        qmp.close()
        return started
