# SPDX-License-Identifier: Apache-2.0
"""bench/pause: how long a running guest stands still for a checkpoint, and how long the checkpoint takes."""

import summary

QUANTITIES = {
    "pause seen in guest": "guest_pause_us",
    "(noise)": "noise_us",
    "pause by engine": "engine_pause_us",
    "total": "total_us",
    "durable": "durable_us",
}


def show(found, options):
    explanation = (
        f"pause: checkpoint of a running guest; min median max of {options.repetitions}; ms.\n"
        "pause seen in guest: longest gap between two ticks as they reach the host, less the normal gap; (noise): the\n"
        "same when nothing happens, just before. total: command until done and guest running; durable: with an fsync.")
    rows = [row(cell) for cell in found]
    return explanation, summary.table(["guest", "peer", *QUANTITIES, "image MB"], rows) + phases(found, "phase ")


def row(cell):
    if cell.failure("pause"):
        return summary.failed_row(cell, "pause")
    return [cell.guest, cell.peer, *(cell.get(name).milliseconds() for name in QUANTITIES.values()),
            cell.get("image_bytes").text(1e-6)]


def phases(found, prefix):
    """Where the time goes, of the peers that say so."""
    lines = []
    for cell in found:
        medians_us = cell.phases(prefix)
        if medians_us:
            parts = ", ".join(f"{name} {median / 1000:.2f}" for name, median in medians_us.items())
            lines.append(f"{cell.peer}, {cell.guest}, {prefix.strip()}s, median ms: {parts}")
    return "\n" + "\n".join(lines) + "\n" if lines else ""
