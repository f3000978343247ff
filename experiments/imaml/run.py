"""iMAML: Rajeswaran, Finn, Kakade and Levine, "Meta-learning with implicit gradients" (arXiv 1909.04630).

Claims: the error of the implicit meta-gradient falls with the inner steps to a floor that the conjugate gradients set
(`error`); its memory does not grow with the inner steps (`memory`); it matches or beats MAML on Omniglot (`omniglot5`,
`omniglot20`, both 1-shot, each method with the same seconds of outer steps).

The paper's figures give no numbers to compare with, and its learning rates for 20-way are not known, nor is the number
of Newton steps of iMAML-HF. The authors' published code computes something else than the paper's formula and tests on
characters that it may have trained on; here it is the formula, and the characters are disjoint.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

import innerloop as il
from innerloop.reporting import in_fresh_process, peak_memory, percent, table, time_of
from innerloop.reporting.figures import MARKED, Line, Panel, panels
from innerloop.tasks._regression import quadratic_form
from innerloop.training.evaluation import assess, evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    Part,
    Results,
    Section,
    as_accurate,
    check_learning,
    in_turns,
    judged,
    learning,
    page_of,
    run,
    validations,
)

PROXIMAL = 2.0

# --- error of the meta-gradient ---------------------------------------------------------------------------------------

INPUTS, EIGENVALUES = 20, (0.01, 10.0)
RATE = 1 / (EIGENVALUES[1] + PROXIMAL)  # of the longest stable step half, for the inner loss with its proximal term
NEWTON_STEPS = 8
ESTIMATORS: dict[str, tuple[il.meta_gradient.MetaGradient, type[il.SGD | il.NewtonCG]]] = {
    **{f"iMAML-GD, CG {n}": (il.Implicit(il.CG(n)), il.SGD) for n in (2, 5, 10, 20)},
    "iMAML-HF, CG 20": (il.Implicit(il.CG(20)), il.NewtonCG),
    "unrolled": (il.Unrolled(), il.SGD),
    "FOMAML": (il.FirstOrder(), il.SGD),
}


def error(_: argparse.Namespace) -> Results:
    return errors(tasks=10, steps=[1, 2, 4, 8, 16, 32, 64, 128, 256])


def errors(tasks: int, steps: list[int]) -> Results:
    """Median over linear regressions of the relative error against the closed form, for every number of steps."""
    source = il.tasks.quadratic(shots=INPUTS, queries=INPUTS, inputs=INPUTS, eigenvalues=EIGENVALUES)
    batch = source.batch("test", 0, tasks).to(dtype=torch.float64)
    meta = {"slope": torch.zeros(INPUTS, dtype=torch.float64)}

    def squared_error(params: il.problem.Tree, _: il.problem.Tree, examples: Any) -> torch.Tensor:
        return (examples[0] @ params["slope"] - examples[1][:, 0]).square().mean()

    problem = il.Problem(lambda meta: meta, squared_error, squared_error)

    def one(task: il.Task, name: str, count: int) -> float:
        estimator, solver = ESTIMATORS[name]
        inner = solver(lr=RATE if solver is il.SGD else 1.0, steps=count, proximal=PROXIMAL)
        found = il.hypergradient(problem, meta, task, inner, estimator).grad["slope"]
        exact = closed_form(task, meta["slope"])
        return ((found - exact).norm() / exact.norm()).item()

    split = [torch.utils._pytree.tree_map(lambda part, i=i: part[i], batch) for i in range(tasks)]
    curves = {}
    for name, (_, solver) in ESTIMATORS.items():
        shown = [count for count in steps if solver is il.SGD or count <= NEWTON_STEPS]
        curves[name] = [[count, statistics.median(one(task, name, count) for task in split)] for count in shown]
    return {"tasks": tasks, "curves": curves}


def closed_form(task: il.Task, start: torch.Tensor) -> torch.Tensor:
    """With proximal weight l: l (H + l I)^-1 times the query gradient at the solution (H + l I)^-1 (c + l start)."""
    (support, c), (query, d) = (quadratic_form(*part) for part in task)
    matrix = support + PROXIMAL * torch.eye(len(c), dtype=c.dtype)
    solution = torch.linalg.solve(matrix, c + PROXIMAL * start)
    return PROXIMAL * torch.linalg.solve(matrix, query @ solution - d)


def quick_error(_: argparse.Namespace) -> Results:
    results = errors(tasks=2, steps=[4, 8, 16, 128])
    last = {name: curve[-1][1] for name, curve in results["curves"].items()}
    for name in ("iMAML-GD, CG 20", "unrolled"):
        values = [value for _, value in results["curves"][name]]
        assert values == sorted(values, reverse=True), f"{name}: error does not fall with the inner steps: {values}"
    assert last["iMAML-GD, CG 20"] < 1e-6, f"20 conjugate gradients leave an error: {last}"
    floors = [last[f"iMAML-GD, CG {n}"] for n in (20, 10, 5, 2)]
    assert floors == sorted(floors), f"fewer conjugate gradients do not raise the floor: {floors}"
    assert last["FOMAML"] > last["iMAML-GD, CG 2"] > 0.01, f"2 conjugate gradients: no floor below FOMAML's: {last}"
    return results


def draw_error(results: Results) -> Figure:
    lines = {
        name: Line(*zip(*curve, strict=True), MARKED | {"linestyle": "--" if name == "unrolled" else "-"})
        for name, curve in results["curves"].items()
    }
    labels = {"xlabel": "inner steps (iMAML-HF: Newton steps)", "ylabel": "relative error of the meta-gradient"}
    axes = {"xscale": "log", "yscale": "log", "ylim": (1e-16, 3), **labels}
    by_solver = {name: line for name, line in lines.items() if name.startswith("iMAML-GD")}
    others = {name: line for name, line in lines.items() if name not in by_solver or name == "iMAML-GD, CG 20"}
    return panels([Panel(by_solver, axes), Panel(others, axes)])


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = {
    "MAML, recorded graph": il.Unrolled(record=True),
    "MAML, Unrolled()": il.Unrolled(),
    "FOMAML": il.FirstOrder(),
    "iMAML, CG 5": il.Implicit(il.CG(5)),
    "iMAML, CG 20": il.Implicit(il.CG(20)),
}


def memory(_: argparse.Namespace) -> Results:
    return costs(list(MEMORY), [1, 5, 10, 20, 50], ways=20, shots=5, filters=64)


def costs(methods: list[str], steps: list[int], ways: int, shots: int, filters: int) -> Results:
    """Memory of one meta-step, in a process of its own, and seconds, taken in turns."""
    wanted = [(name, count) for name in methods for count in steps]
    seconds = in_turns({each: meta_step(*each, ways, shots, filters) for each in wanted}, 3)
    rows = {
        name: [
            in_fresh_process(cost, name, count, ways, shots, filters) | {"seconds": seconds[name, count]}
            for count in steps
        ]
        for name in methods
    }
    return {"steps": steps, "ways": ways, "shots": shots, "filters": filters, "rows": rows}


def cost(name: str, steps: int, ways: int, shots: int, filters: int) -> Results:
    """Peak MiB of a meta-step above model and task."""
    meta_step(name, 1, ways, shots, 2)()  # what is loaded on first use is not the meta-step's memory
    return {"mib": peak_memory(meta_step(name, steps, ways, shots, filters), "cpu") / 2**20}


def meta_step(name: str, steps: int, ways: int, shots: int, filters: int) -> Callable[[], object]:
    """Of one task of random images with as many queries as shots."""
    torch.manual_seed(0)
    labels = torch.arange(ways).repeat_interleave(shots)
    support, query = ((torch.rand(1, len(labels), 1, 28, 28), labels[None]) for _ in range(2))
    model = il.models.Conv4(in_channels=1, ways=ways, filters=filters, downsample="stride")
    inner = il.SGD(lr=0.1, steps=steps, proximal=PROXIMAL if name.startswith("iMAML") else 0.0)
    learner = il.MetaLearner(model, inner=inner, meta_gradient=MEMORY[name], memory=0)
    return partial(learner.meta_step, il.Task(support, query))


def quick_memory(_: argparse.Namespace) -> Results:
    results = costs(["MAML, recorded graph", "iMAML, CG 5"], [1, 8], ways=5, shots=5, filters=32)
    recorded, implicit = ([cell["mib"] for cell in row] for row in results["rows"].values())
    assert recorded[1] > 2 * recorded[0], f"the recorded graph does not grow with the inner steps: {recorded} MiB"
    assert implicit[1] < 1.25 * implicit[0] + 2, f"iMAML's memory grows with the inner steps: {implicit} MiB"
    assert implicit[1] < recorded[1] / 2, f"iMAML takes {implicit} MiB, the recorded graph {recorded} MiB"
    return results


def draw_memory(results: Results) -> Figure:
    shown = []
    for key, label in (("mib", "MiB at the peak"), ("seconds", "seconds")):
        rows = results["rows"].items()
        lines = {name: Line(results["steps"], [cell[key] for cell in row], MARKED) for name, row in rows}
        shown.append(Panel(lines, {"xlabel": "inner steps", "ylabel": f"{label} of a meta-step", "ylim": (0, None)}))
    return panels(shown)


# --- Omniglot ---------------------------------------------------------------------------------------------------------

TASKS_PER_BATCH, QUERIES, FILTERS = 4, 5, 32
PROTOCOLS = "transductive", "inductive"


class Recipe(NamedTuple):
    """How a method learns. Published accuracies, by ways: the iMAML paper's table; MAML++'s from arXiv 1810.09502."""

    inner: il.inner.InnerSolver
    meta_gradient: il.meta_gradient.MetaGradient
    published: dict[int, str]
    outer: Callable[[il.MetaLearner, int], tuple[torch.optim.Optimizer, LRScheduler | None]]
    training_shots: int = 1
    multi_step_share: float = 0.0  # of the outer steps, over which the multi-step loss is annealed


def adam(learner: il.MetaLearner, _: int, eps: float = 1e-8) -> tuple[torch.optim.Optimizer, None]:
    return torch.optim.Adam(learner.parameters(), lr=1e-3, eps=eps), None


def cosine(learner: il.MetaLearner, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    return optimizer, CosineAnnealingLR(optimizer, steps, eta_min=1e-5)


def interpolation(learner: il.MetaLearner, steps: int) -> tuple[torch.optim.Optimizer, LRScheduler]:
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    return optimizer, LinearLR(optimizer, 1.0, 1e-3, steps)


def recipes(ways: int) -> dict[str, Recipe]:
    """The papers' inner settings; 10 training shots of Reptile at 20-way would leave it too few outer steps."""
    few = ways == 5
    maml = il.SGD(lr=0.4, steps=1) if few else il.SGD(lr=0.1, steps=5)
    gd = il.SGD(lr=0.1, steps=16 if few else 25, proximal=PROXIMAL)
    by_minibatch = il.Adam(lr=1e-3, steps=5, test_steps=50, betas=(0.0, 0.999))
    reptile = by_minibatch if few else il.Adam(lr=5e-4, steps=10, test_steps=50, betas=(0.0, 0.999))
    layer_step = il.LearnedRates(lr=0.1, steps=5, per="layer-step")
    newton, implicit = il.NewtonCG(steps=3, proximal=PROXIMAL), il.Implicit(il.CG(5))
    theirs = partial(adam, eps=1e-3)
    return {
        "MAML": Recipe(maml, il.Unrolled(), {5: "98.7 ± 0.4", 20: "95.8 ± 0.3"}, adam),
        "FOMAML": Recipe(maml, il.FirstOrder(), {5: "98.3 ± 0.5", 20: "89.4 ± 0.5"}, adam),
        "Reptile": Recipe(
            reptile, il.Reptile(), {5: "97.68 ± 0.04", 20: "89.43 ± 0.14"}, interpolation, 10 if few else 5
        ),
        "iMAML-GD": Recipe(gd, implicit, {5: "99.16 ± 0.35", 20: "94.46 ± 0.42"}, theirs),
        "iMAML-HF": Recipe(newton, implicit, {5: "99.50 ± 0.26", 20: "96.18 ± 0.36"}, theirs),
        "MAML++-style": Recipe(layer_step, il.Unrolled(), {5: "99.47"}, cosine, multi_step_share=0.15),
    }


def omniglot(ways: int, seconds: float, arguments: argparse.Namespace) -> Results:
    def source(shots: int) -> il.tasks.Episodes:
        return il.tasks.omniglot(ways, shots, QUERIES, data=arguments.data, rotations=True, split="vinyals")

    return accuracies(source, ways, FILTERS, list(recipes(ways)), 100, 600, seconds=seconds)


def accuracies(
    source: Callable[[int], il.tasks.Episodes],
    ways: int,
    filters: int,
    methods: list[str],
    validation_tasks: int,
    test_tasks: int,
    seconds: float = 0.0,
    steps: int = 0,
) -> Results:
    """Test accuracy of each method after as many outer steps as fit into so many seconds, or after ``steps``."""
    rows, tasks = {}, source(1)
    for name in methods:
        recipe = recipes(ways)[name]
        torch.manual_seed(0)
        model = il.models.Conv4(in_channels=1, ways=ways, filters=filters, downsample="stride")
        learner = il.MetaLearner(model, inner=recipe.inner, meta_gradient=recipe.meta_gradient)
        training = source(recipe.training_shots)
        step_seconds = time_of(partial(learner.meta_step, training.batch("train", 0, TASKS_PER_BATCH)), 3, "cpu").median
        learner.zero_grad()
        count = steps or max(10, int(seconds / step_seconds))
        rows[name] = trained(learner, recipe, Split(training, tasks), count, validation_tasks, test_tasks)
        rows[name]["seconds a step"] = step_seconds
        print(f"{name}: {rows[name]}", flush=True)
    return {"ways": ways, "seconds": seconds, "filters": filters, "test tasks": test_tasks, "rows": rows}


class Split(il.tasks.TaskSource):
    """Tasks to train on from one source, and all others from another; Reptile trains on more shots than it is given."""

    def __init__(self, training: il.tasks.Episodes, judged: il.tasks.Episodes) -> None:
        self.name, self.input_shape, self.ways, self.output_size = (
            judged.name, judged.input_shape, judged.ways, judged.output_size,
        )  # fmt: skip
        self._training, self._judged = training, judged

    def batch(self, split: str, start: int, count: int) -> il.Task:
        return (self._training if split == "train" else self._judged).batch(split, start, count)


def trained(
    learner: il.MetaLearner, recipe: Recipe, tasks: Split, steps: int, validation_tasks: int, test_tasks: int
) -> Results:
    """Train and test; the curve holds (outer steps, accuracy, loss) of each validation."""
    before = evaluate(learner, tasks, "validation", validation_tasks)
    optimizer, scheduler = recipe.outer(learner, steps)
    records: list[dict[str, Any]] = []
    il.fit(
        learner, tasks, steps=steps, tasks_per_batch=TASKS_PER_BATCH, optimizer=optimizer, scheduler=scheduler, clip=10,
        multi_step_loss=int(recipe.multi_step_share * steps) or None, validate_every=max(10, steps // 6),
        validation_tasks=validation_tasks, progress=False, log=records.append,
    )  # fmt: skip
    found = assess(learner, tasks, count=test_tasks)
    return {
        "steps": steps,
        "curve": [[0, before.quality, before.loss.mean], *validations(records)],
        "negative curvature": statistics.mean(
            each.get("negative_curvature", 0.0) for each in records if each["kind"] == "train"
        ),
        "nearest neighbour": found.nearest_neighbour.mean,
        **{scores.protocol: list(scores.accuracy) for scores in found.protocols},
        "accuracies": [found.protocols[0].accuracies.tolist()],
    }


def quick_omniglot(_: argparse.Namespace) -> Results:
    def source(shots: int) -> il.tasks.Episodes:
        return il.tasks.glyphs(5, shots, QUERIES)

    least = {"MAML": 0.2, "iMAML-GD": 0.1}
    results = accuracies(source, 5, 16, list(least), 64, 8, steps=20)
    check_learning(results["rows"], least)
    return results


def draw_omniglot(results: Results) -> Figure:
    words = f", {results['ways']}-way 1-shot"
    return panels([learning(results["rows"], PROTOCOLS[0], ways=results["ways"], shots=words)], width=7)


# --- the page ---------------------------------------------------------------------------------------------------------


HEADER = f"""# iMAML: implicit meta-gradients (arXiv 1909.04630)

**Not the paper's budget.** Of its text only an abstract could be read: settings are those of its released code, and
published numbers those that other works repeat. Each method has the seconds named below on one processor thread,
{TASKS_PER_BATCH} tasks a step, {QUERIES} queries a class and {FILTERS} filters, one seed; the authors ask for 20,000
steps of 32 tasks with 64 filters. Vinyals' split of an area-averaged Omniglot with quarter rotations as further
training classes."""
NEGATIVE = (
    "The last column is the share of the training tasks in which the solve met negative curvature and stopped: the "
    "inner steps do not end near a minimum, which the implicit gradient takes for granted."
)


def page(results: dict[str, Results]) -> str:
    sections = {"error": error_section, "memory": memory_section}
    sections |= {"omniglot5": omniglot_section, "omniglot20": omniglot_section}
    how = "`python experiments/imaml/run.py --threads 1`"
    return page_of(HEADER, sections, results, how)


def error_section(results: Results) -> Section:
    ends = {name: (curve[0], curve[-1]) for name, curve in results["curves"].items()}
    (_, first), (_, last) = ends["iMAML-GD, CG 20"]
    floor = ends["iMAML-GD, CG 2"][1][1]
    scale, falls, stays = f"{results['tasks']} linear regressions", last < 1e-6 * first, floor > 1e3 * last
    claims = [
        ["the error falls with the inner steps", "falls", f"{first:.1e} to {last:.1e} (CG 20)", scale,
         judged(falls, small=False)],
        ["few conjugate gradients leave a floor", "a floor", f"{floor:.1e} (CG 2)", scale, judged(stays, small=False)],
    ]  # fmt: skip
    rows = [[name, *(f"{error:.1e} ({steps})" for steps, error in pair)] for name, pair in ends.items()]
    return claims, (
        f"**Error of the meta-gradient** on {results['tasks']} linear regressions ({INPUTS} weights, curvatures "
        f"{EIGENVALUES[0]:g} to {EIGENVALUES[1]:g}, lambda {PROXIMAL:g}), median. iMAML-HF counts Newton steps of five "
        "conjugate gradients.\n\n" + table(["estimator", "first error (steps)", "last error (steps)"], rows)
    )


def memory_section(results: Results) -> Section:
    steps = results["steps"]
    rows = [
        [name, *(f"{cell['mib']:.0f}" for cell in row), f"{row[-1]['seconds']:.2f}"]
        for name, row in results["rows"].items()
    ]
    ends = [
        [results["rows"][name][place]["mib"] for place in (0, -1)] for name in ("iMAML, CG 5", "MAML, recorded graph")
    ]
    implicit, recorded = (f"{first:.0f} to {last:.0f} MiB" for first, last in ends)
    scale = f"{results['ways']}-way {results['shots']}-shot, {results['filters']} filters, 1 task"
    flat = judged(ends[0][1] < 1.2 * ends[0][0], small=False)
    claims = [["memory is flat in the inner steps", "flat", f"{implicit}; a recorded graph: {recorded}", scale, flat]]
    return claims, (
        f"**Memory**, peak MiB of a meta-step above model and task, {results['ways']}-way {results['shots']}-shot at "
        f"28x28, Conv4 of {results['filters']} filters with strides, one task, each cell a fresh process. `Unrolled()` "
        "finds MAML's exact gradient without the graph, at the price of one copy of the weights a step.\n\n"
        + table(["inner steps", *map(str, steps), f"seconds at {steps[-1]}"], rows)
    )


def omniglot_section(results: Results) -> Section:
    ways, found = results["ways"], results["rows"]
    rows = [
        [name, recipes(ways)[name].published.get(ways, ""), *(percent(row[key], unit="") for key in PROTOCOLS),
         f"{row['steps']:,}", f"{100 * row['negative curvature']:.1f} %" if row["negative curvature"] else ""]
        for name, row in found.items()
    ]  # fmt: skip
    claims = []
    if {"MAML", "iMAML-GD", "iMAML-HF"} <= set(found):
        known = recipes(ways)
        scale = f"{results['seconds']:g} s, {results['filters']} filters, 1 seed"
        for name in ("iMAML-GD", "iMAML-HF"):
            mine, maml = found[name], found["MAML"]
            claims.append(
                [f"{ways}-way 1-shot: {name} matches or beats MAML",
                 f"{known[name].published[ways]} % against {known['MAML'].published[ways]} %",
                 f"{percent(mine['transductive'])} against {percent(maml['transductive'])}", scale,
                 as_accurate(mine, maml)]
            )  # fmt: skip
    neighbour = next(iter(found.values()))["nearest neighbour"]
    return claims, (
        f"**Omniglot {ways}-way 1-shot**, {results['seconds']:g} s a method, accuracy in % on {results['test tasks']} "
        f"test tasks, ± 95 %. Nearest neighbour on pixels: {100 * neighbour:.1f} %. {NEGATIVE}\n\n"
        + table(["method", "published (transductive)", *PROTOCOLS, "outer steps", "negative curvature"], rows)
    )


PARTS = {
    "error": Part(error, draw_error, quick_error),
    "memory": Part(memory, draw_memory, quick_memory),
    "omniglot5": Part(partial(omniglot, 5, 80.0), draw_omniglot, quick_omniglot),
    "omniglot20": Part(partial(omniglot, 20, 200.0), draw_omniglot, None),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
