"""The memory benchmark in small: what must grow with the inner steps does, and what must not does not."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
METHODS = (
    "unrolled",
    "window, frozen",
    "binomial:2",
    "implicit",
    "memory-reduced",
    "ANIL, features once",
    "autograd",
    "autograd, ANIL, features every step",
)


def test_memory_is_flat_in_what_it_should_be_flat_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["memory.py", "--quick", "--out", str(tmp_path), "--methods", *METHODS])
    importlib.import_module("memory").main()  # which measures in a fresh process
    record = json.loads((tmp_path / "memory-cpu.json").read_text())
    mib = {
        title: {row: {int(n): cell["mib"] for n, cell in cells.items()} for row, cells in table.items()}
        for title, table in record["results"].items()
    }
    steps, activations = mib["Inner steps"], record["support_activations_mib"]
    assert list(steps) == list(METHODS)

    few, more, most = (steps["autograd"][n] for n in (1, 6, 11))
    assert most - more == pytest.approx(more - few, rel=0.3)  # linear
    assert most - few > 10 * activations
    recomputed = steps["autograd, ANIL, features every step"]
    assert recomputed[11] - recomputed[6] == pytest.approx(5 * activations, rel=0.3)

    flat = {row: cells for row, cells in steps.items() if not row.startswith("autograd")}
    for row, cells in {**flat, **mib["Iterations of conjugate gradient"], **mib["Steps in a window"]}.items():
        *_, before, last = cells.values()
        assert last - before < 0.1 * (most - more), row
    # Where only the head adapts, the backbone's activations are there once.
    assert steps["memory-reduced"][11] < 0.75 * steps["unrolled"][11] < 0.3 * most
    assert (tmp_path / "memory-cpu.png").stat().st_size > 10_000
    assert (tmp_path / "memory-cpu.md").read_text().count("| implicit |") == 2


def test_committed_pages_are_what_their_records_make_of_them() -> None:
    memory = importlib.import_module("memory")
    for place in (BENCHMARKS, BENCHMARKS / "every-estimator"):
        record = json.loads((place / "memory-cpu.json").read_text("utf-8"))
        assert memory.page(record, "memory-cpu.png") == (place / "memory-cpu.md").read_text("utf-8")
    for name in ("speed", "transformer"):
        record = json.loads((BENCHMARKS / f"{name}.json").read_text("utf-8"))
        assert importlib.import_module(name).page(record) == (BENCHMARKS / f"{name}.md").read_text("utf-8")
