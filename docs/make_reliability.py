"""Kills runs and damages their files, counts and draws what is lost: `python docs/make_reliability.py`.

The trials are those of tests/test_reliability.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from innerloop.reporting import provenance, write_json
from innerloop.reporting.figures import DOTS, Line, Panel, panels, save

DOCS = Path(__file__).parent
LOST = {
    "last.safetensors": "steps taken again",
    "settings.json": "settings taken for others",
    "metrics.jsonl": "records lost",
}


def main() -> None:
    """Try, count, write and draw."""
    sys.path.insert(0, str(DOCS.parent / "tests"))
    from trials import damages, end_of, killed_runs, whole_run

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--damages", type=int, default=500, help="of each file")
    asked = parser.parse_args()
    made = provenance()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "killed").mkdir()
        whole = whole_run(folder / "run")
        kills, ends = killed_runs(folder / "killed", asked.kills, end_of(whole))
        damaged = list(damages(whole, folder / "damaged", asked.damages))
    outcomes = {name: Counter(each.outcome for each in damaged if each.file == name) for name in LOST}
    write_json(
        DOCS / "reliability.json",
        {
            "kills": Counter("in a write" if each.in_write else "at a random moment" for each in kills),
            "steps lost to a kill": Counter(str(each.lost) for each in kills),
            "runs": ends,
            "damaged files": outcomes,
            "seconds": time.monotonic() - began,
            **made,
        },
    )
    save(DOCS / "reliability-kills.png", panels([_kills(kills)], width=8, height=3))
    save(DOCS / "reliability-damage.png", panels([_damage(name, damaged) for name in LOST], columns=3, width=4))


def _kills(kills: list[Any]) -> Panel:
    lines = {}
    for label, in_write in (("at a random moment", False), ("in a call that reaches the disk", True)):
        mine = [each for each in kills if each.in_write == in_write]
        beside = 0.15 if in_write else -0.15
        lines[label] = Line(
            [each.step + beside for each in mine], [each.lost for each in mine], DOTS | {"alpha": 0.4, "markersize": 6}
        )
    axes = {"xlabel": "last outer step recorded before the kill", "ylabel": "steps taken again", "ylim": (-0.3, 2.6)}
    return Panel(lines, axes, {"a checkpoint comes every 2 steps": (2, {})})


def _damage(name: str, damaged: list[Any]) -> Panel:
    lines = {}
    for what in sorted({each.what for each in damaged}):
        mine = [each for each in damaged if each.file == name and each.what == what]
        lines[what] = Line([100 * each.place for each in mine], [each.lost for each in mine], DOTS | {"alpha": 0.4})
    axes = {"title": name, "xlabel": "place of the damage, % of the file", "ylabel": LOST[name], "ylim": (-0.2, None)}
    return Panel(lines, axes)


if __name__ == "__main__":
    main()
