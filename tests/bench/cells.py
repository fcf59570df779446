# SPDX-License-Identifier: Apache-2.0
"""One cell of a table: one peer, one guest, N samples. The measuring itself is here, alike for all peers."""

import contextlib
import os
import shutil
import time
from dataclasses import dataclass, field

import disk
from peers.peer import PeerFailed, process_exists
from qmp import QmpError
from summary import Samples
from tick_stream import NoTick

# Every stretch in which nothing is asked of the guest: after its boot, after a checkpoint, before a restart's end.
AFTER_BOOT_S = 0.5
QUIET_S = 0.5               # before a checkpoint; it also says what gap is normal
AFTER_S = 0.25              # pages copied on write and caches gone cold can stall the guest after the release, too
AFTER_RESTART_S = 0.5
NEXT_TICK_TIMEOUT_S = 60


@dataclass
class Cell:
    """Samples by quantity; where the peer could not, why, by part of the benchmark."""
    peer: str
    guest: str
    failures: dict = field(default_factory=dict)
    samples: dict = field(default_factory=dict)

    def add(self, **values):
        for name, value in values.items():
            if value is not None:
                self.samples.setdefault(name, Samples()).values.append(value)

    def get(self, name):
        return self.samples.get(name, Samples())

    def phases(self, prefix):
        """Medians of the engine's own phases, where it names them."""
        return {name[len(prefix):]: samples.median for name, samples in self.samples.items() if name.startswith(prefix)}

    def failure(self, part):
        return self.failures.get("start") or self.failures.get(part)

    def as_json(self):
        return {"peer": self.peer, "guest": self.guest, "failures": self.failures,
                **{name: samples.as_json() for name, samples in self.samples.items()}}


def run(peer_class, spec, parts, options):
    """Boots one guest under the peer, measures the `parts` (pause, write, restart) on it, and clears up."""
    cell = Cell(peer_class.name, spec.name)
    reason = peer_class.why_not()
    if reason:
        cell.failures["start"] = reason
        return cell
    place = os.path.join(options.dir, "cell")
    peer = peer_class(spec, place, options.dir)
    try:
        with noting_failure(cell, "start"):
            peer.start()
            time.sleep(AFTER_BOOT_S)
        if not cell.failures and ("pause" in parts or "write" in parts):
            with noting_failure(cell, "pause", "write"):
                for _ in range(options.repetitions):
                    taken = measure_one_pause(peer, cell)
                    if "write" in parts:
                        measure_one_dd(peer, cell, taken)
        if "start" not in cell.failures and peer.pid is not None and "restart" in parts:
            with noting_failure(cell, "restart"):
                measure_restarts(peer, cell, options)
    finally:
        with noting_failure(cell, "end"):
            peer.close()
        shutil.rmtree(place, ignore_errors=True)
    return cell


@contextlib.contextmanager
def noting_failure(cell, *parts):
    try:
        yield
    except (PeerFailed, QmpError, NoTick) as error:
        cell.failures.update({part: str(error) for part in parts})
    except (KeyError, ValueError) as error:
        cell.failures.update({part: f"unexpected output: {type(error).__name__}: {error}" for part in parts})


def measure_one_pause(peer, cell):
    quiet_from_ns = time.monotonic_ns()
    time.sleep(QUIET_S)
    quiet = Samples(peer.ticks.gaps_us(quiet_from_ns, time.monotonic_ns()))
    if not quiet:
        raise PeerFailed("the guest does not tick")

    started_ns = time.monotonic_ns()
    taken = peer.checkpoint()
    ended_ns = time.monotonic_ns()
    peer.ticks.wait_tick_after(ended_ns, NEXT_TICK_TIMEOUT_S)
    time.sleep(AFTER_S)
    worst_us = max(peer.ticks.gaps_us(started_ns, ended_ns + int(AFTER_S * 1e9)))

    cell.add(
        guest_pause_us=max(0.0, worst_us - quiet.median),
        # What the same arithmetic makes of a stretch in which nothing happened: a pause below this cannot be told.
        noise_us=max(quiet.values) - quiet.median,
        normal_gap_us=quiet.median,
        engine_pause_us=taken.engine_pause_us,
        total_us=taken.total_us,
        durable_us=taken.durable_us,
        image_bytes=taken.image_bytes,
    )
    cell.add(**{f"phase {name}": value for name, value in taken.phases_us.items()})
    return taken


def measure_one_dd(peer, cell, taken):
    # Some peers write many files or a container; dd then copies as many bytes of the biggest as there are.
    size = min(taken.image_bytes, os.path.getsize(taken.files[0]))
    dd_us = disk.dd_us(taken.files[0], os.path.join(peer.directory, "dd"), size)
    speed, dd_speed = taken.image_bytes / taken.durable_us, size / dd_us
    cell.add(dd_us=dd_us, mb_per_s=speed, dd_mb_per_s=dd_speed, of_dd=speed / dd_speed)
    if taken.writing_us:
        alone = taken.image_bytes / taken.writing_us
        cell.add(writing_mb_per_s=alone, writing_of_dd=alone / dd_speed)


def measure_restarts(peer, cell, options):
    """One checkpoint, and all restarts from it, with its image in the host's page cache (warm) or not (cold)."""
    before = peer.ticks.last()
    taken = peer.checkpoint(stop=True)
    peer.kill()
    after = peer.ticks.last()
    cell.add(restart_image_bytes=taken.image_bytes)
    for cache in options.caches:
        for _ in range(options.repetitions):
            for path in taken.files:
                if cache == "cold":
                    disk.evict(path)
                else:
                    disk.read_into_cache(path)
            measure_one_restart(peer, cell, cache, before, after)


def measure_one_restart(peer, cell, cache, before, after):
    started_ns = time.monotonic_ns()
    restarted = peer.restart()
    try:
        first = peer.ticks.wait_tick_after(started_ns, NEXT_TICK_TIMEOUT_S)
    except NoTick as error:
        alive = "it still runs" if process_exists(peer.pid) else "its process is gone"
        raise PeerFailed(f"{error} after restart; {alive}; {peer.log_tail()}") from error
    check_same_guest(first, before, after, peer.spec.tick_ms)
    # A restart that maps its image runs at once and pays later, page by page: the worst gap after it shows.
    time.sleep(AFTER_RESTART_S)
    first_second = peer.ticks.gaps_us(first.arrival_ns, first.arrival_ns + int(AFTER_RESTART_S * 1e9))
    peer.kill()
    values = {
        "next_tick_us": (first.arrival_ns - started_ns) / 1000,
        "worst_gap_us": max(first_second, default=None),
        "engine_restart_us": restarted.engine_restart_us,
        **{f"phase {name}": value for name, value in restarted.phases_us.items()},
    }
    cell.add(**{f"{cache} {name}": value for name, value in values.items()})


def check_same_guest(first, before, after, tick_ms):
    """A time is worth nothing if what came up is a freshly booted guest."""
    if first.nonce != before.nonce:
        raise PeerFailed(f"another guest came up: nonce {first.nonce}, expected {before.nonce}")
    # The ticks of a second may pass before the socket is connected again.
    latest = after.counter + 1 + 1000 // tick_ms
    if not before.counter < first.counter <= latest:
        raise PeerFailed(f"tick {first.counter} after restart, expected {before.counter + 1} to {latest}")
