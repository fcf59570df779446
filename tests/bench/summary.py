# SPDX-License-Identifier: Apache-2.0
"""Samples to text: minimum, median and maximum, and tables that line up."""

import statistics


class Samples:
    """The values of one quantity in one cell, kept whole for the JSON report."""

    def __init__(self, values=()):
        self.values = [value for value in values if value is not None]

    def __bool__(self):
        return bool(self.values)

    @property
    def median(self):
        return statistics.median(self.values) if self.values else None

    def text(self, scale=1.0, digits=0):
        """`min median max`, or a dash where nothing was measured."""
        if not self.values:
            return "-"
        ordered = (min(self.values), self.median, max(self.values))
        return " ".join(f"{value * scale:.{digits}f}" for value in ordered)

    def milliseconds(self):
        """Microseconds shown as milliseconds: small ones with a digit more, since those are the ones compared."""
        if not self.values:
            return "-"
        return self.text(1e-3, 2 if max(self.values) < 10_000 else 1 if self.median < 100_000 else 0)

    def as_json(self):
        if not self.values:
            return None
        return {"min": min(self.values), "median": self.median, "max": max(self.values), "values": self.values}


def failed_row(cell, part):
    """A row that says why, and does not widen the columns of numbers."""
    return [cell.guest, cell.peer, Remark(cell.failure(part))]


class Remark(str):
    """Text of the last cell of a row that may run over the columns to its right."""


def table(headings, rows):
    """Left-aligned columns of strings."""
    widths = [len(heading) for heading in headings]
    for row in rows:
        for column, text in enumerate(row):
            if not isinstance(text, Remark):
                widths[column] = max(widths[column], len(text))

    def line(row):
        return "  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip()

    return "\n".join([line(headings), line(["-" * width for width in widths]), *map(line, rows)]) + "\n"
