"""What was measured, against what, and whether that is the goal."""

import os
import pathlib
import statistics
import time
from dataclasses import dataclass


@dataclass
class Row:
    what: str
    ours: str
    other: str
    ratio: str
    goal: str
    ok: str


class Report:
    def __init__(self):
        self.rows = []
        self.busy = []

    def compare(self, what, ours, other, unit, goal, faster=None, digits=2):
        """Two sides, each measured several times. `goal` is the least ratio; the ratio is ours/other where more is
        better (`faster` False) and other/ours where less is (`faster` True)."""
        mine, theirs = statistics.median(ours), statistics.median(other)
        ratio = theirs / mine if faster else mine / theirs
        met = "" if goal is None else mark(ratio >= goal)
        goal_text = "" if goal is None else f">= {goal}"
        self.add(Row(what, spread(ours, unit, digits), spread(other, unit, digits), f"{ratio:.2f}", goal_text, met))

    def at_most(self, what, ours, unit, limit=None, other="", ratio="", digits=2):
        """One side that must not be more than a limit."""
        met = "" if limit is None else mark(statistics.median(ours) <= limit)
        goal = "" if limit is None else f"<= {limit:g} {unit}"
        self.add(Row(what, spread(ours, unit, digits), other, ratio, goal, met))

    def at_least(self, what, ours, unit, limit, other=(), digits=0):
        """One side that must not be less than a limit; the other is shown beside it."""
        ratio = f"{statistics.median(ours) / statistics.median(other):.2f}" if other else ""
        theirs = spread(other, unit, digits) if other else ""
        met = mark(statistics.median(ours) >= limit)
        self.add(Row(what, spread(ours, unit, digits), theirs, ratio, f">= {limit:g} {unit}", met))

    def add(self, row):
        self.rows.append(row)
        print(f"  {row.what}: {row.ours} | {row.other} | {row.ratio} {row.goal} {row.ok}", flush=True)

    def note_load(self, seconds=0.5):
        """How busy the processors are with the work of others, between two measurements."""
        before = processor_times()
        time.sleep(seconds)
        after = processor_times()
        total = sum(after) - sum(before)
        idle = (after[3] + after[4]) - (before[3] + before[4])
        self.busy.append(100 * (1 - idle / total) if total else 0)

    def show(self, bench):
        if not self.rows:
            return
        head = Row("what", "pgcairn", "pgBackRest / native", "ratio", "goal", "ok?")
        cells = [list(vars(row).values()) for row in [head, *self.rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in cells]
        lines.insert(1, "  ".join("-" * width for width in widths))
        lines.append("")
        lines.append(f"medians (least - most) of {bench.repeat} measurements in turns, unless the line says otherwise; "
                     "ratio: how many times as good")
        lines.append(f"{os.cpu_count()} processors, {memory_gb():.0f} GB memory, "
                     f"busy with other work between the measurements: median {statistics.median(self.busy or [0]):.0f} %, "
                     f"most {max(self.busy or [0]):.0f} %; load {os.getloadavg()[0]:.1f}")
        text = "\n".join(lines)
        print(f"\n{text}", flush=True)
        (bench.base / "results.txt").write_text(text + "\n")


def mark(met):
    return "yes" if met else "NO"


def spread(values, unit, digits):
    middle = f"{statistics.median(values):.{digits}f}"
    if len(values) == 1:
        return f"{middle} {unit}".rstrip()
    return f"{middle} {unit} ({min(values):.{digits}f} - {max(values):.{digits}f})"


def processor_times():
    return [int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]


def memory_gb():
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
