# SPDX-License-Identifier: Apache-2.0
"""bench/write: how fast the image reaches the disk, next to dd of the same bytes right after it."""

import summary

HEADINGS = ["guest", "peer", "image MB", "checkpoint", "dd", "MB/s", "dd MB/s", "% of dd", "writing alone MB/s",
            "% of dd"]


def show(found, options):
    explanation = (
        "write: the whole of a checkpoint with fsync, next to `dd bs=1M conv=fsync` of its bytes, from the page cache\n"
        f"to the same file system, in turns; min median max of {options.repetitions}; ms. Percentages pair by pair.\n"
        "writing alone: without the work before it, by the engine, in phases write, seal and publish.")
    return explanation, summary.table(HEADINGS, [row(cell) for cell in found])


def row(cell):
    if cell.failure("write"):
        return summary.failed_row(cell, "write")
    return [cell.guest, cell.peer, cell.get("image_bytes").text(1e-6), cell.get("durable_us").milliseconds(),
            cell.get("dd_us").milliseconds(), cell.get("mb_per_s").text(), cell.get("dd_mb_per_s").text(),
            cell.get("of_dd").text(100), cell.get("writing_mb_per_s").text(), cell.get("writing_of_dd").text(100)]
