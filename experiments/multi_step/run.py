"""Window gradient reuse, after Kim, Park and Choi, "Multi-step estimation for gradient-based meta-learning" (2020).

Claims of the abstract (arXiv 2006.04298): time and memory fall with the window (`cost`) at competitive accuracy
(`accuracy`), and meta-networks become trainable that other approximations leave without a signal (`meta_network`).
`error` shows what is paid: how far the estimate is from the exact meta-gradient, against the inner rate.

Nothing but the abstract could be read. The estimator is reconstructed from it in two readings, `frozen` and
`true_forward` (see `innerloop.Window`), no setting is the paper's, and there is no published number to compare with.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from itertools import combinations
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import innerloop as il
from innerloop.problem import Tree
from innerloop.reporting import in_fresh_process, peak_memory, percent, points, table
from innerloop.reporting.figures import DOTS, MARKED, Line, Panel, panels
from innerloop.training.evaluation import Estimate, Scores, evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    Part,
    Results,
    Section,
    check_learning,
    higher_of,
    in_turns,
    judged,
    learning,
    page_of,
    run,
    validations,
)

Estimator = il.meta_gradient.MetaGradient
FROZEN, TRUE, RECORDED, FIRST = "frozen", "true forward", "frozen, recorded graph", "FOMAML"

# --- cost of a meta-step ----------------------------------------------------------------------------------------------

INNER_STEPS = 10


def cost(_: argparse.Namespace) -> Results:
    return costs([32, 84], [1, 2, 5, 10], filters=32)


def costs(sizes: list[int], windows: list[int], filters: int, rounds: int = 5) -> Results:
    """Of a meta-step on one 5-way 5-shot task of random images; memory in processes of their own, seconds in turns."""
    rows = {}
    for size in sizes:
        wanted = [(kind, window) for kind in (FROZEN, TRUE, RECORDED) for window in windows] + [(FIRST, 1)]
        steps = {each: meta_step(*each, size, filters, INNER_STEPS) for each in wanted}
        seconds = in_turns(steps, rounds)
        rows[str(size)] = {
            kind: [
                in_fresh_process(measure_cost, kind, window, size, filters) | {"seconds": seconds[kind, window]}
                for of, window in wanted
                if of == kind
            ]
            for kind in (FROZEN, TRUE, RECORDED, FIRST)
        }
    return {"inner steps": INNER_STEPS, "windows": windows, "filters": filters, "rows": rows}


def meta_step(kind: str, window: int, size: int, filters: int, steps: int) -> Callable[[], Any]:
    torch.manual_seed(0)
    labels = torch.arange(5).repeat_interleave(5)
    support, query = ((torch.rand(1, len(labels), 3, size, size), labels[None]) for _ in range(2))
    inner = il.SGD(lr=0.01, steps=steps)
    if kind == RECORDED:  # a frozen window is one step of plain gradient descent, as long as all of its steps
        inner, estimator = il.SGD(lr=0.01 * window, steps=math.ceil(steps / window)), il.Unrolled(record=True)
    else:
        estimator = (
            il.FirstOrder() if kind == FIRST else il.Window(window, "true_forward" if kind == TRUE else "frozen")
        )
    learner = il.MetaLearner(il.models.Conv4(size=size, filters=filters), inner=inner, meta_gradient=estimator)
    return partial(learner.meta_step, il.Task(support, query))


def measure_cost(kind: str, window: int, size: int, filters: int) -> Results:
    """Peak MiB above model and task, and curvature products of a meta-step."""
    meta_step(kind, window, size, 2, 1)()  # what is loaded on first use is not the meta-step's memory
    measured = meta_step(kind, window, size, filters, INNER_STEPS)
    mib = peak_memory(measured, "cpu") / 2**20
    products = None if kind == RECORDED else measured().diagnostics["curvature_products"].item()
    return {"mib": mib, "products": products}


def quick_cost(_: argparse.Namespace) -> Results:
    source, model = il.tasks.glyphs(queries=5), il.models.Conv4(in_channels=1, filters=4)
    for window in (3, 10):
        for mode in ("frozen", "true_forward"):
            inner, estimator = il.SGD(lr=0.01, steps=INNER_STEPS), il.Window(window, mode)
            metrics = il.MetaLearner(model, inner=inner, meta_gradient=estimator).meta_step(source.batch("train", 0, 1))
            products, expected = metrics.diagnostics["curvature_products"].item(), math.ceil(INNER_STEPS / window)
            assert products == expected, f"{estimator}: {products} curvature products, not {expected}"
    windows = [1, 10]
    wanted = [(kind, window) for kind in (FROZEN, RECORDED) for window in windows]
    seconds = in_turns({each: meta_step(*each, 32, 8, INNER_STEPS) for each in wanted}, 3)
    found = {
        kind: [in_fresh_process(measure_cost, kind, each, 32, 8) | {"seconds": seconds[kind, each]} for each in windows]
        for kind in (FROZEN, RECORDED)
    }
    for kind, (one, ten) in found.items():
        assert ten["seconds"] < one["seconds"], f"{kind}: no time is saved by the window: {one}, {ten}"
    one, ten = found[RECORDED]
    assert ten["mib"] < one["mib"] / 2, f"the recorded graph does not shrink with the window: {one}, {ten}"
    assert found[FROZEN][0]["mib"] < one["mib"] / 2, f"the adjoint walk saves no memory: {found[FROZEN][0]}, {one}"
    return {"inner steps": INNER_STEPS, "windows": windows, "filters": 8, "rows": {"32": found}}


def draw_cost(results: Results) -> Figure:
    shown = []
    for size, found in results["rows"].items():
        for key, label in (("mib", "peak memory, MiB"), ("seconds", "seconds")):
            # dashes, so that where they lie on one another both are seen
            lines = {
                kind: Line(results["windows"], [cell[key] for cell in cells], MARKED | dashes(kind, TRUE))
                for kind, cells in found.items() if kind != FIRST
            }  # fmt: skip
            first = {FIRST: (found[FIRST][0][key], {})} if FIRST in found else {}
            axes = {"xlabel": f"window, of {results['inner steps']} inner steps", "ylabel": label, "ylim": (0, None)}
            shown.append(Panel(lines, axes | {"title": f"{size}x{size}", "xticks": results["windows"]}, first))
    return panels(shown, height=3.2)


def dashes(name: str, dashed: str = "true") -> dict[str, str]:
    return {"linestyle": "--" if dashed in name else "-"}


# --- accuracy ---------------------------------------------------------------------------------------------------------

TASKS_PER_BATCH, QUERIES, RATE, STEPS, OUTER_RATE = 4, 5, 0.1, 5, 3e-3
SHOWN = ("", ""), ("difference, ", "+")  # keys of accuracies, and the sign
METHODS: dict[str, Estimator] = {
    "window 1 (exact)": il.Window(1),
    "window 2, frozen": il.Window(2),
    "window 5, frozen": il.Window(5),
    "window 2, true forward": il.Window(2, "true_forward"),
    "window 5, true forward": il.Window(5, "true_forward"),
    "FOMAML": il.FirstOrder(),
}


def accuracy(arguments: argparse.Namespace) -> Results:
    tasks = il.tasks.cifar_fs(5, 1, QUERIES, data=arguments.data)
    return accuracies(tasks, 3, 32, list(METHODS), validation_tasks=100, test_tasks=600, seconds=100.0)


def accuracies(
    tasks: il.tasks.Episodes,
    channels: int,
    filters: int,
    methods: list[str],
    validation_tasks: int,
    test_tasks: int,
    seconds: float = 0.0,
    steps: int = 0,
    rate: float = RATE,
) -> Results:
    """Test accuracy of each method after the same outer steps, those of the slowest, and after the same seconds.

    Args:
        tasks: to learn.
        channels: of the images.
        filters: of Conv4.
        methods: names in ``METHODS``; the first is what the others are compared with, task by task.
        validation_tasks: in each validation.
        test_tasks: in each test.
        seconds: of outer steps that each method has.
        steps: outer steps in place of the seconds.
        rate: of the inner loop.
    """

    def learner(name: str) -> il.MetaLearner:
        torch.manual_seed(0)
        model = il.models.Conv4(in_channels=channels, filters=filters, downsample="stride")
        return il.MetaLearner(model, inner=il.SGD(lr=rate, steps=STEPS), meta_gradient=METHODS[name])

    batch = tasks.batch("train", 0, TASKS_PER_BATCH)
    step_seconds = in_turns({name: partial(learner(name).meta_step, batch) for name in methods}, 15)
    counts = {name: steps or max(1, int(seconds / step)) for name, step in step_seconds.items()}
    equal = min(counts.values())
    rows, scores = {}, {}
    for name in methods:
        curve, scores[name] = trained(learner(name), tasks, equal, counts[name], validation_tasks, test_tasks)
        rows[name] = {"steps": counts[name], "curve": curve, "seconds a step": step_seconds[name]}
        for when, mine, exact in zip(("equal steps", "equal seconds"), scores[name], scores[methods[0]], strict=True):
            assert mine.accuracies is not None
            assert exact.accuracies is not None
            rows[name][when] = [*Estimate.of(mine.accuracies)]
            rows[name][f"difference, {when}"] = [*Estimate.of(mine.accuracies - exact.accuracies)]
        print(f"{name}: {rows[name]}", flush=True)
    return {"seconds": seconds, "equal steps": equal, "filters": filters, "test tasks": test_tasks, "rows": rows}


def trained(
    learner: il.MetaLearner, tasks: il.tasks.Episodes, equal: int, steps: int, validation_tasks: int, test_tasks: int
) -> tuple[list[list[float]], list[Scores]]:
    """Validation curve, and tests after ``equal`` outer steps and, going on from there, after ``steps``."""
    optimizer = torch.optim.Adam(learner.parameters(), lr=OUTER_RATE)
    before = evaluate(learner, tasks, "validation", validation_tasks)
    records: list[dict[str, Any]] = []
    tests = []
    with TemporaryDirectory() as folder:
        for count in (equal, steps):
            il.fit(
                learner, tasks, steps=count, tasks_per_batch=TASKS_PER_BATCH, optimizer=optimizer, clip=10,
                validate_every=max(10, equal // 4), validation_tasks=validation_tasks, folder=folder, resume=True,
                progress=False, log=records.append,
            )  # fmt: skip
            tests.append(evaluate(learner, tasks, "test", test_tasks))
    return [[0, before.quality, before.loss.mean], *validations(records)], tests


def quick_accuracy(_: argparse.Namespace) -> Results:
    least = {"window 1 (exact)": 0.15, "window 2, frozen": 0.14}
    results = accuracies(il.tasks.glyphs(queries=QUERIES), 1, 16, list(least), 64, 8, steps=30, rate=0.02)
    check_learning(results["rows"], least)
    exact, window = (row["seconds a step"] for row in results["rows"].values())
    assert window < exact, f"a meta-step with window 2 takes {window} s, the exact one {exact} s"
    return results


def draw_accuracy(results: Results) -> Figure:
    ends = {"outer steps": "equal steps", "seconds of outer steps": "equal seconds"}
    return panels([learning(cut(results, by), test, by) for by, test in ends.items()])


def cut(results: Results, by: str) -> dict[str, Results]:
    """The rows, over the outer steps that all methods have had."""
    if by != "outer steps":
        return results["rows"]
    most = results["equal steps"]
    return {
        name: row | {"curve": [point for point in row["curve"] if point[0] <= most]}
        for name, row in results["rows"].items()
    }


# --- a meta-network ---------------------------------------------------------------------------------------------------

SIGNALS: dict[str, Estimator] = {
    "exact": il.Unrolled(),
    **{f"window {n}, frozen": il.Window(n) for n in (2, 5, 10)},
    **{f"window {n}, true forward": il.Window(n, "true_forward") for n in (2, 5, 10)},
    "first order": il.FirstOrder(),
}


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator)


class Transfer:
    """Learning what and where to transfer (Jang, Lee, Hwang and Shin, arXiv 1905.05901), in small.

    A target network takes ten steps on a matching loss alone, whose weights a meta-network gives for each channel of a
    source network and as a whole, then one step on its own loss; the outer loss is its own loss after that. So the
    meta-network occurs in the inner loss and nowhere else. Of the source's six channels the first tells the classes.
    """

    inner = il.Momentum(lr=0.1, steps=10, momentum=0.9, weight_decay=1e-4)

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.signal, self.noise = self.normal(6, 1) / 6**0.5, 4 * self.normal(6, 5)
        self.meta = {
            "what": torch.zeros(6, 6, dtype=torch.float64),
            "where": torch.zeros(6, dtype=torch.float64),
            "bias": torch.ones((), dtype=torch.float64),
        }

    def normal(self, *shape: int) -> Tensor:
        return normal(self.generator, *shape)

    def source(self, inputs: Tensor) -> Tensor:
        return torch.cat([(2 * inputs @ self.signal).tanh(), (inputs @ self.noise).sin()], 1)

    def hidden(self, params: Tree, inputs: Tensor) -> Tensor:
        return (inputs @ params["in"] + params["bias"]).tanh()

    def task_loss(self, params: Tree, batch: Any) -> Tensor:
        return F.cross_entropy(self.hidden(params, batch[0]) @ params["out"], batch[1])

    def matching_loss(self, params: Tree, meta: Tree, batch: Any) -> Tensor:
        source = self.source(batch[0])
        distance = (self.hidden(params, batch[0]) @ params["to source"] - source).square()
        where = F.softplus(source.mean(0) @ meta["where"] + meta["bias"])
        return where * ((source @ meta["what"]).softmax(1) * distance).sum(1).mean()

    def loss_after_a_step(self, params: Tree, meta: Tree, batch: Any) -> Tensor:
        grad = torch.func.grad(self.task_loss)(params, batch)
        return self.task_loss({name: params[name] - grad[name] for name in params}, batch)

    def draw(self) -> tuple[il.Problem, il.Task]:
        """A new target network and a batch, which both losses read."""
        params = {
            "in": self.normal(6, 10) / 6**0.5,
            "bias": torch.zeros(10, dtype=torch.float64),
            "out": self.normal(10, 2) / 10,
            "to source": self.normal(10, 6) / 10**0.5,
        }
        inputs = self.normal(64, 6)
        batch = inputs, (self.source(inputs)[:, 0] > 0).long()
        return il.Problem(lambda meta: params, self.matching_loss, self.loss_after_a_step), il.Task(batch, batch)


def meta_network(_: argparse.Namespace) -> Results:
    return meta_networks(list(SIGNALS), steps=60, seeds=3)


def meta_networks(names: list[str], steps: int, seeds: int) -> Results:
    """Each estimator trains the meta-network on the same draws; loss of the ordinary inner steps, held out."""
    curves: dict[str, list[list[float]]] = {name: [] for name in names}
    alike: dict[str, list[float]] = {name: [] for name in names}
    largest = dict.fromkeys(names, 0.0)
    for seed in range(seeds):
        for name in names:
            found = learn(Transfer(seed), SIGNALS[name], steps)
            curves[name].append(found["curve"])
            alike[name].append(found["cosine"])
            largest[name] = max(largest[name], found["largest"])
    return {
        "steps": list(range(0, steps + 1, steps // 6)),
        "seeds": seeds,
        "rows": {
            name: {
                "loss": [statistics.mean(values) for values in zip(*curves[name], strict=True)],
                "final": [curve[-1] for curve in curves[name]],
                "cosine": statistics.mean(alike[name]),
                "largest gradient": largest[name],
            }
            for name in names
        },
    }


def learn(transfer: Transfer, estimator: Estimator, steps: int) -> Results:
    """The outer loop: Adam on the meta-network."""
    held_out = [transfer.draw() for _ in range(8)]
    meta = {name: value.clone() for name, value in transfer.meta.items()}
    optimizer = torch.optim.Adam(meta.values(), lr=0.1)

    def loss() -> float:
        # the loss does not depend on how it would be differentiated
        found = [il.hypergradient(problem, meta, task, transfer.inner, il.FirstOrder()) for problem, task in held_out]
        return torch.stack([each.loss for each in found]).mean().item()

    def gradient(problem: il.Problem, task: il.Task, estimator: Estimator) -> Tree:
        return il.hypergradient(problem, meta, task, transfer.inner, estimator).grad

    def flat(tree: Tree) -> Tensor:
        return torch.cat([tree[name].flatten() for name in meta])

    first, exact = (flat(gradient(*held_out[0], each)) for each in (estimator, il.Unrolled()))
    curve, largest = [], 0.0
    for step in range(steps + 1):
        if step % (steps // 6) == 0:
            curve.append(loss())
        for name, grad in gradient(*transfer.draw(), estimator).items():
            meta[name].grad = grad
            largest = max(largest, grad.abs().max().item())
        optimizer.step()
    return {"curve": curve, "cosine": F.cosine_similarity(first, exact, 0).item(), "largest": largest}


def quick_meta_network(_: argparse.Namespace) -> Results:
    results = meta_networks(["window 5, frozen", "window 2, true forward", "first order"], steps=24, seeds=1)
    first = results["rows"]["first order"]
    assert first["largest gradient"] == 0.0, f"first order has a gradient: {first}"
    assert first["loss"][-1] == first["loss"][0], f"without a gradient the meta-network has moved: {first}"
    for name, row in results["rows"].items():
        if name != "first order":
            assert row["cosine"] > 0.95, f"{name} points away from the exact meta-gradient: {row}"
            assert row["loss"][-1] < first["loss"][-1] - 0.025, f"{name} does not train the meta-network: {row}"
    return results


def draw_meta_network(results: Results) -> Figure:
    label = f"held-out loss; bar: {results['seeds']} seeds"
    shown = []
    for reading in (FROZEN, TRUE):
        lines = {}
        for name, row in results["rows"].items():
            if not name.startswith("window") or name.endswith(reading):
                short = name.removesuffix(f", {reading}")
                lines[short] = Line(results["steps"], row["loss"])
                end = [row["loss"][-1]], DOTS, [min(row["final"])], [max(row["final"])]
                lines[f"_{short}"] = Line(results["steps"][-1:], *end)
        shown.append(Panel(lines, {"xlabel": "outer steps", "ylabel": label, "title": reading, "ylim": (0.33, 0.54)}))
    return panels(shown)


# --- error ------------------------------------------------------------------------------------------------------------


def error(_: argparse.Namespace) -> Results:
    return errors(12, [2, 4, 12], [0.1, 0.05, 0.025, 0.0125], draws=20)


def errors(steps: int, windows: list[int], rates: list[float], draws: int) -> Results:
    """Median relative error against the exact meta-gradient, for the start and for what only the inner loss reads."""
    estimators: dict[str, Estimator] = {
        **{f"window {n}, frozen": il.Window(n) for n in windows},
        **{f"window {n}, true forward": il.Window(n, "true_forward") for n in windows},
        "first order": il.FirstOrder(),
    }
    found: dict[str, list[list[list[float]]]] = {name: [] for name in estimators}
    for seed in range(draws):
        problem, meta, task = weighted_regression(seed)
        exact = {rate: il.hypergradient(problem, meta, task, il.SGD(lr=rate, steps=steps)).grad for rate in rates}
        for name, estimator in estimators.items():
            grads = {
                rate: il.hypergradient(problem, meta, task, il.SGD(lr=rate, steps=steps), estimator).grad
                for rate in rates
            }
            found[name].append([distances(grads[rate], exact[rate]) for rate in rates])
    rows = {name: torch.tensor(values).quantile(0.5, 0).tolist() for name, values in found.items()}
    return {"inner steps": steps, "rates": rates, "draws": draws, "rows": rows}


def weighted_regression(seed: int) -> tuple[il.Problem, Tree, il.Task]:
    """A tanh network 3-8-1 on 12 support and 12 query points; meta-parameters are its start and a weight per point."""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(normal, generator)
    meta = {"in": draw(3, 8) / 3**0.5, "bias": draw(8) / 2, "out": draw(8) / 8**0.5, "weights": draw(12) / 2}

    def residuals(params: Tree, batch: Any) -> Tensor:
        return ((batch[0] @ params["in"] + params["bias"]).tanh() @ params["out"] - batch[1]).square()

    def inner_loss(params: Tree, meta: Tree, batch: Any) -> Tensor:
        return (2 * meta["weights"].sigmoid() * residuals(params, batch)).mean()

    def outer_loss(params: Tree, _: Tree, batch: Any) -> Tensor:
        return residuals(params, batch).mean()

    def start(meta: Tree) -> Tree:
        return {name: value for name, value in meta.items() if name != "weights"}

    support, query = ((inputs, inputs.sin().sum(1)) for inputs in (draw(12, 3), draw(12, 3)))
    return il.Problem(start, inner_loss, outer_loss), meta, il.Task(support, query)


def distances(found: Tree, exact: Tree) -> list[float]:
    """Relative errors of the gradient in the start and in the weights."""

    def start(tree: Tree) -> Tensor:
        return torch.cat([value.flatten() for name, value in tree.items() if name != "weights"])

    pairs = (start(found), start(exact)), (found["weights"], exact["weights"])
    return [((a - b).norm() / b.norm()).item() for a, b in pairs]


def quick_error(_: argparse.Namespace) -> Results:
    results = errors(12, [4], [0.05, 0.0125], draws=3)
    for name in ("window 4, frozen", "window 4, true forward"):
        (start, weights), (start_later, weights_later) = results["rows"][name]
        assert start_later < start, f"{name}: the start's error does not fall with the inner rate: {results['rows']}"
        assert weights_later < weights, f"{name}: the weights' error does not fall with the rate: {results['rows']}"
    first = [weights for _, weights in results["rows"]["first order"]]
    assert first == [1.0, 1.0], f"first order has a gradient where only the inner loss reads: {first}"
    return results


def draw_error(results: Results) -> Figure:
    shown = []
    axes = {"xscale": "log", "yscale": "log", "xlabel": "inner rate", "ylabel": "relative error, median"}
    for reading in (FROZEN, TRUE):
        for which, title in enumerate(("the start", "what only the inner loss reads")):
            lines = {
                name.removesuffix(f", {reading}"): Line(results["rates"], [pair[which] for pair in values], MARKED)
                for name, values in results["rows"].items()
                if not name.startswith("window") or name.endswith(reading)
            }
            named = axes | {"title": f"{reading}: gradient to {title}"}
            shown.append(Panel(lines, named, ticks={"x": "{:g}".format}))
    return panels(shown)


# --- the page ---------------------------------------------------------------------------------------------------------


HEADER = """# Window gradient reuse (after arXiv 2006.04298)

**What differs from the paper.** Only an abstract could be read, and this is a reconstruction from it: no setting is
the paper's, and there is no published number to stand beside ours. Accuracy was measured on CIFAR-FS at 32x32 alone (a
lossy copy: 5-bit luma, subsampled chroma), on one processor thread, one seed; at miniImageNet's 84x84 the cost alone
was, on random images."""


def page(results: dict[str, Results]) -> str:
    sections = {"cost": cost_section, "accuracy": accuracy_section}
    sections |= {"meta_network": meta_network_section, "error": error_section}
    how = "`python experiments/multi_step/run.py --threads 1`"
    return page_of(HEADER, sections, results, how)


def cost_section(results: Results) -> Section:
    windows, sizes = results["windows"], results["rows"]
    claims = []
    largest = list(sizes)[-1]
    scale = f"{largest}x{largest}, {results['filters']} filters, 1 task"
    for what, unit, share in (("seconds", "s", 1), ("mib", "MiB", 0.8)):
        for kind in (FROZEN, TRUE, RECORDED) if what == "seconds" else (RECORDED,):
            ends = [(found[kind][0][what], found[kind][-1][what]) for found in sizes.values() if kind in found]
            if ends:
                text = f"window {windows[0]} to {windows[-1]}: {ends[-1][0]:.4g} to {ends[-1][1]:.3g} {unit}"
                falls = all(last < share * first for first, last in ends)
                name = f"{'time' if what == 'seconds' else 'memory'} falls with the window ({kind})"
                text += "; flat at the last where no graph is recorded" if what == "mib" else ""
                claims.append([name, "falls", text, scale, judged(falls, small=False)])
    rows = [
        [f"{size}x{size}", kind, *(f"{cell['mib']:.0f} / {cell['seconds']:.2f}" for cell in cells),
         *[""] * (len(windows) - len(cells))]
        for size, found in sizes.items() for kind, cells in found.items()
    ]  # fmt: skip
    products = ", ".join(str(math.ceil(results["inner steps"] / window)) for window in windows)
    return claims, (
        f"**Cost** of a meta-step of {results['inner steps']} inner steps, 5-way 5-shot, {results['filters']} filters, "
        f"one task: peak MiB / seconds; {products} curvature products. Recorded, window 1 is MAML by autograd.\n\n"
        + table(["images", "window", *map(str, windows)], rows)
    )


def accuracy_section(results: Results) -> Section:
    claims, found = [], results["rows"]
    after = {"equal steps": f"{results['equal steps']:,} outer steps", "equal seconds": f"{results['seconds']:g} s"}
    for when, words in after.items():
        ends = [row[f"difference, {when}"] for name, row in found.items() if "window" in name and "exact" not in name]
        low, high = (f"{100 * end(mean for mean, _ in ends):+.1f}" for end in (min, max))
        here = f"windows {low} to {high} points against exact"
        here += f", first order {points(found[FIRST][f'difference, {when}'], '+')}" if FIRST in found else ""
        scale = f"CIFAR-FS 5-way 1-shot, {results['filters']} filters, 1 seed"
        claims.append([f"accuracy is competitive after {words}", "competitive", here, scale, "open"])
    rows = [
        [name, *(percent(row[prefix + when], sign, "") for when in after for prefix, sign in SHOWN),
         f"{row['steps']:,}", f"{1000 * row['seconds a step']:.0f}"]
        for name, row in found.items()
    ]  # fmt: skip
    head = [text for words in after.values() for text in (f"after {words}", "against exact")]
    return claims, (
        f"**Accuracy**, CIFAR-FS 5-way 1-shot, {results['filters']} filters and strides, {STEPS} inner steps at "
        f"{RATE:g}, Adam at {OUTER_RATE:g} outside, transductive, % on {results['test tasks']} test tasks; differences "
        "task by task. ±: 95 % interval over tasks, which says nothing of another seed.\n\n"
        + table(["method", *head, "outer steps then", "ms a step"], rows)
    )


def meta_network_section(results: Results) -> Section:
    found = results["rows"]
    windows = [row for name, row in found.items() if name.startswith("window")]
    largest = found["first order"]["largest gradient"]
    ends = [row["loss"][-1] for row in windows]
    text = f"held-out loss {windows[0]['loss'][0]:.3f} before, {min(ends):.3f} to {max(ends):.3f} after training"
    pairs = [(one, other) for one, other in combinations(windows, 2) if one["cosine"] != other["cosine"]]
    crossed = sum((one["cosine"] > other["cosine"]) == (one["loss"][-1] > other["loss"][-1]) for one, other in pairs)
    # first order leaves the meta-network as it was, so its end is where every seed began
    fell = [
        [start - end for start, end in zip(found["first order"]["final"], row["final"], strict=True)] for row in windows
    ]
    every = {higher_of(each) for each in fell}
    signal = every.pop() if len(every) == 1 and largest == 0 else "open"
    scale = f"6 inputs, {results['steps'][-1]} steps, {results['seeds']} seeds"
    claims = [
        ["a meta-network becomes trainable, which first order leaves without a signal", "trainable",
         f"{text}; largest entry of the first-order gradient: {largest:g}",
         scale, signal],
        ["the cosine is a guide to the end (ours)", "–",
         f"in {crossed} of {len(pairs)} pairs of windows the higher cosine ends higher", scale, judged(not crossed)],
    ]  # fmt: skip
    rows = [
        [name, f"{row['loss'][0]:.3f}", f"{min(row['loss']):.3f}", f"{row['loss'][-1]:.3f}{spread(row)}",
         "no direction" if name == "first order" else f"{row['cosine']:.3f}"]
        for name, row in found.items()
    ]  # fmt: skip
    head = [
        "estimator",
        "loss before",
        "lowest",
        f"after {results['steps'][-1]} outer steps",
        "cosine to exact at first",
    ]
    return claims, (
        f"**A meta-network** that weighs what a target network takes from a source network (arXiv 1905.05901, small); "
        f"means of {results['seeds']} seeds, ±: standard deviation over seeds.\n\n" + table(head, rows)
    )


def spread(row: Results) -> str:
    return f" ± {statistics.stdev(row['final']):.3f}" if len(row["final"]) > 1 else ""


def error_section(results: Results) -> Section:
    windows = [values for name, values in results["rows"].items() if name != "first order"]
    falls = all(values[-1][which] < values[0][which] for values in windows for which in (0, 1))
    ends = (f"{min(of):.2g} to {max(of):.2g}" for of in ([row[place][0] for row in windows] for place in (0, -1)))
    rates = results["rates"]
    here = " at {:g}, ".join(ends).format(rates[0]) + f" at {rates[-1]:g}"
    rows = [[name, *(f"{start:.2g}" for start, _ in values)] for name, values in results["rows"].items()]
    scale = f"{results['draws']} draws of a small network"
    return [["the error falls with the inner rate (ours)", "–", here, scale, judged(falls)]], (
        f"**Error** against the exact meta-gradient for the start, {results['inner steps']} inner steps of a tanh "
        f"network, median of {results['draws']} draws. A window is out of its range where its steps together are too "
        "long: then it is worse than first order.\n\n" + table(["inner rate", *(f"{rate:g}" for rate in rates)], rows)
    )


PARTS = {
    "cost": Part(cost, draw_cost, quick_cost),
    "accuracy": Part(accuracy, draw_accuracy, quick_accuracy),
    "meta_network": Part(meta_network, draw_meta_network, quick_meta_network),
    "error": Part(error, draw_error, quick_error),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
