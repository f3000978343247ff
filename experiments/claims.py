"""Writes the table of all claims into README.md, from the pages of the experiments and the results of the baselines.

python experiments/claims.py
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from common import CLAIMS

from innerloop import reporting

HERE = Path(__file__).parent
PAPERS = {
    "memory_reduced": "memory-reduced (2412.12030)",
    "anil_convergence": "ANIL's convergence (2006.09486)",
    "imaml": "iMAML (1909.04630)",
    "lambda_patterns": "Lambda patterns (2206.05930)",
    "multi_step": "multi-step (2006.04298)",
    "fields": "GradNCP (2302.00617)",
    "neighbours": "RaT-BPTT (2311.07025), B-SMALL (2101.00203)",
    "test_time_training": "test-time training (2512.23675)",
}
OWN = "(ours)", "(our derivation)", "third party"  # claims that are not the paper's
# Omniglot 5-way 1-shot, transductive: the tables of the iMAML paper and, of MAML++, of arXiv 1810.09502
PUBLISHED = {"maml": "98.7 ± 0.4 %", "fomaml": "98.3 ± 0.5 %", "reptile": "97.68 ± 0.04 %", "imaml": "99.16 ± 0.35 %"}
RUNS = {
    "omniglot-5way-1shot": ("default recipe, Omniglot 5-way 1-shot", "99.47 % (MAML++)"),
    "omniglot-5way-1shot-own-split": ("default recipe, Omniglot's own split, 5-way 1-shot", "–"),
    "omniglot-20way-1shot": ("default recipe, Omniglot 20-way 1-shot", "95.8 ± 0.3 % (MAML)"),
    "omniglot-5way-1shot-maml": ("MAML, Omniglot 5-way 1-shot", PUBLISHED["maml"]),
}
BEGIN, END = "<!-- claims: made by claims.py -->", "<!-- end of claims -->"


def of_pages() -> Iterator[list[str]]:
    """The papers' claims, from the tables that the pages begin with."""
    for folder, paper in PAPERS.items():
        lines = (HERE / folder / "README.md").read_text("utf-8").splitlines()
        first = next(place for place, line in enumerate(lines) if line.startswith("| claim |"))
        for line in lines[first + 2 :]:
            if not line:
                break
            cells = line.strip("| ").split(" | ")
            if not any(own in cells[0] for own in OWN):
                yield [f"[{paper}]({folder}/README.md)", *cells]


def of_baselines() -> Iterator[list[str]]:
    """What methods and the default recipe reach beside their published accuracy."""
    found = json.loads((HERE / "compare" / "comparison.json").read_text("utf-8"))
    page = "[comparison](compare/report.md)"
    neighbour = reporting.percent(found["nearest_neighbour"].values())
    for entry in found["entries"]:
        scale = f"{found['budget']}, {entry['steps']:,} steps of 4 tasks, 32 filters, {len(entry['seeds'])} seeds"
        ours = f"{reporting.percent(entry['transductive'].values())}; pixels {neighbour}"
        claim = f"{entry['title']}, Omniglot 5-way 1-shot"
        yield [page, claim, PUBLISHED.get(entry["method"], "–"), ours, scale, "open"]
    for folder, (claim, published) in RUNS.items():
        run = json.loads((HERE / folder / "results.json").read_text("utf-8"))
        settings = json.loads((HERE / folder / "settings.json").read_text("utf-8"))
        steps = f"{run['training']['step']:,} steps of {settings['tasks_per_batch']} tasks"
        shifted = ", shifted images" if settings["augment"] == "crop" else ""
        scale = f"{steps}{shifted}, {settings['filters'] or 32} filters, 1 seed"
        page = "[runs](#runs-on-omniglot-1-shot)"
        test = run["test"]
        ours = (reporting.percent(each) for each in (test["transductive"]["accuracy"], test["nearest_neighbour"]))
        yield [page, claim, published, "; pixels ".join(ours), scale, "open"]


def main() -> None:
    """Write the table between its two marks."""
    page = (HERE / "README.md").read_text("utf-8")
    before, rest = page.split(BEGIN)
    table = reporting.table(["from", *CLAIMS], [*of_pages(), *of_baselines()])
    reporting.write(HERE / "README.md", f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
