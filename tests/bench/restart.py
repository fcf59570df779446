# SPDX-License-Identifier: Apache-2.0
"""bench/restart: from the command until the guest is seen to run again."""

import summary
from pause import phases

QUANTITIES = {"next tick": "next_tick_us", "threads run": "engine_restart_us", "worst gap": "worst_gap_us"}


def show(found, options):
    explanation = (
        f"restart: after SIGKILL; min median max of {options.repetitions}; ms. warm, cold: image cached or not.\n"
        "next tick: command start until the guest's next tick reaches the host. threads run: command start until the\n"
        "target's threads run, by the engine. worst gap: longest gap between two ticks in the half second after that.")
    headings = ["guest", "peer"]
    for cache in options.caches:
        headings += [f"{cache}: {heading}" for heading in QUANTITIES]
    text = summary.table([*headings, "image MB"], [row(cell, options.caches) for cell in found])
    return explanation, text + "".join(phases(found, f"{cache} phase ") for cache in options.caches)


def row(cell, caches):
    if cell.failure("restart"):
        return summary.failed_row(cell, "restart")
    return [cell.guest, cell.peer,
            *(cell.get(f"{cache} {name}").milliseconds() for cache in caches for name in QUANTITIES.values()),
            cell.get("restart_image_bytes").text(1e-6)]
