"""The pages of the experiments say what their results say."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1] / "experiments"
NAMES = sorted(file.parent.name for file in ROOT.glob("*/run.py") if "PARTS" in file.read_text("utf-8"))


@pytest.mark.parametrize("name", NAMES)
def test_a_page_is_what_its_results_make_of_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ROOT / name
    monkeypatch.setattr(sys, "path", [str(folder), str(ROOT), *sys.path])
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", folder / "run.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {
        part: json.loads(file.read_text("utf-8"))
        for part in module.PARTS
        if (file := folder / f"{part}.json").is_file()
    }
    due = {part for part, each in module.PARTS.items() if not each.grows}  # the others are long, and come by and by
    assert due <= set(found), "parts without a committed result"
    page = (folder / "README.md").read_text("utf-8")
    assert page == module.page(found), "run.py writes the page anew with --only of any part"
    for part, results in found.items():
        assert module.page({part: results}).startswith("# "), f"no page where {part} alone has been measured"
        assert {"command", "commit", "versions", "machine", "time"} <= results["made"].keys()
        assert "seconds" in results["made"] or "rows" in results
        assert results["made"]["command"].startswith(f"python experiments/{name}/run.py"), part
    assert all((folder / picture).is_file() for picture in re.findall(r"\]\((\w+\.png)\)", page))


def test_the_family_is_measured_once_and_says_what_has_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    spec = importlib.util.spec_from_file_location("experiment_family", ROOT / "family" / "run.py")
    assert spec
    assert spec.loader
    family = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(family)
    monkeypatch.setattr(family, "keep_freed_memory", lambda: None)  # which other tests would feel
    asked = "--seconds 0.05 --equal 2 --count 4 --seeds 0 1 --sets sinusoid --methods maml anil ridge"
    monkeypatch.setattr(sys, "argv", ["run.py", "--out", str(tmp_path), *asked.split()])
    threads = torch.get_num_threads()
    try:
        family.main()
        rows = json.loads((tmp_path / "family.json").read_text("utf-8"))["rows"]
        family.main()
    finally:
        torch.set_num_threads(threads)
    assert rows == json.loads((tmp_path / "family.json").read_text("utf-8"))["rows"]
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for s in (0, 1) for m in ("maml", "anil", "ridge")]
    assert ["failed" in row for row in rows] == [False, False, True] * 2
    assert all(len(row[point]) == 4 for row in rows if row["method"] != "ridge" for point in ("time", "tasks"))
    assert len({row["steps"] for row in rows if row["method"] == "maml"}) == 1, "the seeds share a trial"
    lines = (tmp_path / "README.md").read_text("utf-8").splitlines()
    assert sum(line.startswith(("| maml |", "| anil |")) for line in lines) == 2
    assert sum(line.startswith("* ridge, seeds 0, 1") for line in lines) == 1


def test_every_experiment_has_a_page_in_the_index() -> None:
    index = (ROOT / "README.md").read_text("utf-8")
    assert len(NAMES) == 8
    assert all(f"]({name}/README.md)" in index for name in NAMES)


def test_the_index_holds_the_claims_of_all_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT), *sys.path])
    spec = importlib.util.spec_from_file_location("experiment_claims", ROOT / "claims.py")
    assert spec
    assert spec.loader
    claims = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(claims)
    rows = [*claims.of_pages(), *claims.of_baselines()]
    assert {row[-1] for row in rows} <= {"shown", "shown in small", "open", "contradicted", "contradicted in small"}
    index = (ROOT / "README.md").read_text("utf-8")
    assert all("| " + " | ".join(row) + " |" in index for row in rows), "python experiments/claims.py writes it anew"
