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
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor

import innerloop as il
from innerloop.problem import Tree
from innerloop.reporting import in_fresh_process, peak_memory, percent, points, student, table
from innerloop.reporting.figures import DOTS, MARKED, Line, Panel, panels
from innerloop.training.evaluation import assess, evaluate

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    Part,
    Results,
    Section,
    as_accurate,
    check_learning,
    collect,
    estimate,
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
            lines = {}
            for kind in (kind for kind in found if kind != FIRST):
                look = {"linestyle": "--" if kind == TRUE else "-"}  # where they lie on one another both are seen
                lines[kind] = Line(results["windows"], [cell[key] for cell in found[kind]], MARKED | look)
            first = {FIRST: (found[FIRST][0][key], {})} if FIRST in found else {}
            axes = {"xlabel": f"window, of {results['inner steps']} inner steps", "ylabel": label, "ylim": (0, None)}
            shown.append(Panel(lines, axes | {"title": f"{size}x{size}", "xticks": results["windows"]}, first))
    return panels(shown, height=3.2)


# --- accuracy ---------------------------------------------------------------------------------------------------------

TASKS_PER_BATCH, QUERIES, RATE, STEPS, OUTER_RATE, FILTERS, OUTER_STEPS = 4, 5, 0.1, 5, 3e-3, 32, 1000
EXACT, STEPPED, TIMED = "exact", "equal steps", "equal seconds"
CENTRES, PIXELS = "nearest class mean", "pixels"
METHODS: dict[str, Estimator] = {
    EXACT: il.Unrolled(),  # the gradient of window 1, with kept graphs: in less time
    "window 2, frozen": il.Window(2),
    "window 5, frozen": il.Window(5),
    "window 5, true forward": il.Window(5, "true_forward"),
    FIRST: il.FirstOrder(),
}


def accuracy(arguments: argparse.Namespace) -> Results:
    def measured(key: Results, rows: list[Results]) -> Results:
        tasks = il.tasks.cifar_fs(5, 1, QUERIES, key["seed"], arguments.data)
        first = {} if rows else {"step seconds": step_seconds(tasks, list(METHODS))}
        return trained(key, tasks, (first or rows[0])["step seconds"], OUTER_STEPS, 100, 600) | first

    wanted = [{"method": method, "seed": seed} for seed in range(arguments.seeds) for method in METHODS]
    return collect(arguments.out / "accuracy.json", wanted, measured)


def learner_of(name: str, tasks: il.tasks.Episodes, seed: int) -> il.MetaLearner:
    torch.manual_seed(seed)
    model = il.models.Conv4(in_channels=tasks.input_shape[0], filters=FILTERS, downsample="stride")
    return il.MetaLearner(model, None, il.SGD(lr=RATE, steps=STEPS), METHODS[name], chunk_size=TASKS_PER_BATCH)


def step_seconds(tasks: il.tasks.Episodes, methods: list[str], rounds: int = 30) -> dict[str, float]:
    """Median seconds of the processor that a meta-step takes, the methods in turns."""
    batch, learners = tasks.batch("train", 0, TASKS_PER_BATCH), {name: learner_of(name, tasks, 0) for name in methods}

    def seconds(learner: il.MetaLearner) -> float:
        began = time.process_time()
        learner.meta_step(batch)
        return time.process_time() - began

    _, *turns = [{name: seconds(learner) for name, learner in learners.items()} for _ in range(1 + rounds)]
    return {name: statistics.median(turn[name] for turn in turns) for name in methods}


def trained(
    key: Results, tasks: il.tasks.Episodes, seconds: dict[str, float], steps: int, validation: int, test: int
) -> Results:
    """Tests after so many outer steps, and after as many seconds of meta-steps as the exact method takes for them."""
    learner = learner_of(key["method"], tasks, key["seed"])
    optimizer = torch.optim.Adam(learner.parameters(), lr=OUTER_RATE)
    before = evaluate(learner, tasks, "validation", validation)
    counts = {STEPPED: steps, TIMED: round(steps * seconds[EXACT] / seconds[key["method"]])}
    records, row = [], {"steps": counts[TIMED]}
    with TemporaryDirectory() as folder:
        for when, count in sorted(counts.items(), key=lambda each: each[1]):
            il.fit(
                learner, tasks, steps=count, tasks_per_batch=TASKS_PER_BATCH, optimizer=optimizer, clip=10,
                validate_every=max(10, steps // 5), validation_tasks=validation, folder=folder, resume=True,
                progress=False, seed=key["seed"], log=records.append,
            )  # fmt: skip
            tested = assess(learner, tasks, "test", test).transductive
            row[when] = [round(each, 4) for each in tested.accuracies.tolist()]
            row |= {name: round(tested.baselines[name].accuracy.mean, 4) for name in (CENTRES, PIXELS)}
    return row | {"curve": [[0, before.quality, before.loss.mean], *validations(records)]}


def means(values: list[list[float]]) -> list[float]:
    """Over the seeds."""
    return [statistics.fmean(each) for each in zip(*values, strict=True)]


def by_method(results: Results) -> dict[str, Results]:
    """Of each method its curve, a mean, and its tests ``[seeds, tasks]``, over the seeds that all methods have had."""
    rows = {name: {row["seed"]: row for row in results["rows"] if row["method"] == name} for name in METHODS}
    rows = {name: found for name, found in rows.items() if found}
    seeds, seconds, found = set.intersection(*map(set, rows.values())), results["rows"][0]["step seconds"], {}
    for name, each in rows.items():
        mine = [each[seed] for seed in sorted(seeds)]
        curve = [means(points) for points in zip(*(row["curve"] for row in mine), strict=True)]
        tests = {when: [row[when] for row in mine] for when in (STEPPED, TIMED)}
        found[name] = tests | {"curve": curve, "steps": mine[0]["steps"], "seconds a step": seconds[name]}
        found[name] |= {base: statistics.fmean(row[base] for row in mine) for base in (CENTRES, PIXELS)}
        found[name]["nearest neighbour"] = found[name][PIXELS]
    return found


def quick_accuracy(_: argparse.Namespace) -> Results:
    tasks, least = il.tasks.glyphs(queries=QUERIES), {EXACT: 0.11, "window 5, frozen": 0.09}
    seconds = step_seconds(tasks, list(least), rounds=8)
    assert seconds["window 5, frozen"] < seconds[EXACT], f"window 5 saves no time: seconds of a step {seconds}"
    keys = [{"method": name, "seed": 0} for name in least]
    rows = [key | trained(key, tasks, seconds, 30, 64, 8) | {"step seconds": seconds} for key in keys]
    check_learning({row["method"]: row for row in rows}, least)
    return {"rows": rows}


def draw_accuracy(results: Results) -> Figure:
    shown, found = [], by_method(results)
    for when, by in ((STEPPED, "outer steps"), (TIMED, "seconds of outer steps")):
        most = found[EXACT]["steps"] if when == STEPPED else math.inf
        curves = {name: [point for point in row["curve"] if point[0] <= most] for name, row in found.items()}
        rows = {name: row | {when: estimate(row[when]), "curve": curves[name]} for name, row in found.items()}
        shown.append(learning(rows, when, by))
    return panels(shown)


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
    source network and as a whole, then one step on its own loss; the outer loss is its own loss on the queries after
    that. So the meta-network occurs in the inner loss and nowhere else.

    The source is a Conv4; its channels are those of all blocks, averaged over positions. The target, new in every task,
    has one hidden layer on what the source's first block sees, averaged to 4x4.
    """

    inner = il.Momentum(lr=0.03, steps=10, momentum=0.9, weight_decay=1e-4)

    def __init__(self, tasks: il.tasks.Episodes, source: il.models.Conv4, seed: int) -> None:
        self.tasks, self.blocks, self.seed = tasks, [*source.eval().children()][:4], seed
        self.generator = torch.Generator().manual_seed(seed)
        self.problem = il.Problem(lambda _, support: support["start"], self.matching_loss, self.loss_after_a_step)
        width = self.draw("train", 0, 1).support["source"].shape[-1]
        self.meta = {"what": torch.zeros(width, width), "where": torch.zeros(width), "bias": torch.ones(())}

    def draw(self, split: str, first: int, count: int) -> il.Task:
        """Tasks of a split, each with a new target network; other seeds have others."""
        (images, labels), (asked, answers) = self.tasks.batch(split, 10_000 * self.seed + first, count)
        (inputs, source), hidden = self.seen(images), 32
        shapes = {
            "in": (inputs.shape[-1], hidden), "out": (hidden, self.tasks.ways), "to source": (hidden, source.shape[-1])
        }  # fmt: skip
        start = {name: torch.randn(count, *of, generator=self.generator) / of[0] ** 0.5 for name, of in shapes.items()}
        start |= {"out": start["out"] / 10, "bias": torch.zeros(count, hidden)}
        support = {"start": start, "inputs": inputs, "source": source}
        return il.Task(support, {"support": (inputs, labels), "query": (self.seen(asked)[0], answers)})

    @torch.no_grad()
    def seen(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs and source channels of images ``[tasks, examples, ...]``, of mean 0 and variance 1 in each task."""
        maps, found = images.flatten(0, 1), []
        for block in self.blocks:
            maps = block(maps)
            found.append(maps)
        inputs = F.adaptive_avg_pool2d(found[0], 4).flatten(1)
        source = torch.cat([each.mean((2, 3)) for each in found], 1)
        both = (each.unflatten(0, images.shape[:2]) for each in (inputs, source))
        inputs, source = ((each - each.mean(1, True)) / (each.std(1, keepdim=True) + 1e-3) for each in both)
        return inputs, source

    def hidden(self, params: Tree, inputs: Tensor) -> Tensor:
        return (inputs @ params["in"] + params["bias"]).tanh()

    def scores(self, params: Tree, inputs: Tensor) -> Tensor:
        return self.hidden(params, inputs) @ params["out"]

    def task_loss(self, params: Tree, batch: Any) -> Tensor:
        return F.cross_entropy(self.scores(params, batch[0]), batch[1])

    def matching_loss(self, params: Tree, meta: Tree, batch: Any) -> Tensor:
        source = batch["source"]
        distance = (self.hidden(params, batch["inputs"]) @ params["to source"] - source).square()
        where = F.softplus(source @ meta["where"] + meta["bias"])
        return (where * ((source @ meta["what"]).softmax(1) * distance).sum(1)).mean()

    def loss_after_a_step(self, params: Tree, meta: Tree, batch: Any) -> tuple[Tensor, Tensor]:
        """And the accuracy."""
        grad = torch.func.grad(self.task_loss)(params, batch["support"])
        params = {name: params[name] - grad[name] for name in params}
        right = self.scores(params, batch["query"][0]).argmax(1) == batch["query"][1]
        return self.task_loss(params, batch["query"]), right.float().mean()


def classifier(tasks: il.tasks.Episodes) -> il.models.Conv4:
    """A source network: it has learned for a short time to tell the training classes apart."""
    torch.manual_seed(0)
    model = il.models.Conv4(ways=tasks.single_images().output_size, filters=32, downsample="stride")
    none = il.SGD(lr=0.1, steps=0)
    learner = il.MetaLearner(model, "head", none, il.Supervised(), batch_norm="frozen", start="prototypes")
    adam = torch.optim.Adam(learner.parameters(), lr=3e-3)
    il.fit(learner, tasks, steps=500, tasks_per_batch=1, optimizer=adam, validation_tasks=0, progress=False)
    return learner.model


def meta_network(arguments: argparse.Namespace) -> Results:
    tasks = il.tasks.cifar_fs(5, 5, data=arguments.data)
    return meta_networks(tasks, classifier(tasks), list(SIGNALS), steps=240, seeds=3)


def meta_networks(
    tasks: il.tasks.Episodes, source: il.models.Conv4, names: list[str], steps: int, seeds: int, rate: float = 2e-3
) -> Results:
    """Each estimator trains the meta-network on the same draws; of test tasks loss and accuracy, by seed."""
    rows: dict[str, Results] = {}
    for name in names:
        found = [learn(Transfer(tasks, source, seed), SIGNALS[name], steps, rate) for seed in range(1, seeds + 1)]
        rows[name] = {key: [each[key] for each in found] for key in found[0]}
    return {"steps": list(range(0, steps + 1, steps // 6)), "seeds": seeds, "rows": rows}


def learn(transfer: Transfer, estimator: Estimator, steps: int, rate: float) -> Results:
    """The outer loop: Adam on the meta-network, four tasks a step."""
    held_out, batch = transfer.draw("test", 0, 64), transfer.draw("train", 0, 4)

    def gradient(learner: il.Bilevel, batch: il.Task) -> Tensor:
        learner.zero_grad()
        learner.meta_step(batch)
        return torch.cat([value.grad.flatten() for value in learner.parameters()])

    learner, exact = (
        il.Bilevel(transfer.problem, transfer.meta, transfer.inner, each, stacked=True)
        for each in (estimator, il.Unrolled())
    )
    cosine = F.cosine_similarity(gradient(learner, batch), gradient(exact, batch), 0).item()
    found: Results = {"loss": [], "accuracy": [], "cosine": cosine, "largest": 0.0}
    optimizer = torch.optim.Adam(learner.parameters(), lr=rate)
    for step in range(steps + 1):
        if step % (steps // 6) == 0:
            seen = learner.evaluate(held_out)
            found["loss"].append(seen.loss.mean().item())
            found["accuracy"].append(seen.outputs.mean().item())
        largest = gradient(learner, transfer.draw("train", 4 * step, 4)).abs().max().item()
        found["largest"] = max(found["largest"], largest)
        optimizer.step()
    return found


def falls(row: Results) -> list[float]:
    """How much lower the loss is at the end, by seed."""
    return [curve[0] - curve[-1] for curve in row["loss"]]


def quick_meta_network(_: argparse.Namespace) -> Results:
    """Of what a network that has learned nothing sees of glyphs."""
    torch.manual_seed(0)
    tasks, source = il.tasks.glyphs(5, 5, 5), il.models.Conv4(1, filters=8, downsample="stride")
    least = {"window 5, frozen": 0.6, "window 2, true forward": 0.95}  # cosine to the exact meta-gradient
    results = meta_networks(tasks, source, [*least, "first order"], steps=24, seeds=1, rate=0.03)
    first = results["rows"]["first order"]
    assert first["largest"] == [0.0], f"first order has a gradient: {first}"
    assert len(set(first["loss"][0])) == 1, f"without a gradient the meta-network has moved: {first}"
    for name, cosine in least.items():
        row = results["rows"][name]
        assert row["cosine"][0] > cosine, f"{name} points away from the exact meta-gradient: {row}"
        assert falls(row)[0] > 0.035, f"{name} does not train the meta-network: {row}"
    return results


def draw_meta_network(results: Results) -> Figure:
    label = f"loss of test tasks; bar: {results['seeds']} seeds"
    shown = []
    for reading in (FROZEN, TRUE):
        lines = {}
        for name, row in results["rows"].items():
            if not name.startswith("window") or name.endswith(reading):
                short = name.removesuffix(f", {reading}")
                lines[short] = Line(results["steps"], means(row["loss"]))
                last = [curve[-1] for curve in row["loss"]]
                bar = [statistics.fmean(last)], DOTS, [min(last)], [max(last)]
                lines[f"_{short}"] = Line(results["steps"][-1:], *bar)
        shown.append(Panel(lines, {"xlabel": "outer steps", "ylabel": label, "title": reading}))
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
the paper's, and there is no published number to stand beside ours. Accuracy and meta-network were measured on CIFAR-FS
at 32x32 (a lossy copy: 5-bit luma, subsampled chroma), on one processor thread; at miniImageNet's 84x84 the cost alone
was, on random images. Every 200 outer steps a training is validated, and the best of those is tested: in equal seconds
the cheaper methods have more to choose from. The six comparisons of accuracy are judged one by one."""


def page(results: dict[str, Results]) -> str:
    sections = {"cost": cost_section, "accuracy": accuracy_section}
    sections |= {"meta_network": meta_network_section, "error": error_section}
    how = "`python experiments/multi_step/run.py --threads 1`"
    return page_of(HEADER, sections, results, how)


def cost_section(results: Results) -> Section:
    windows, sizes = results["windows"], results["rows"]
    claims, largest = [], list(sizes)[-1]
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
    claims, found = [], by_method(results)
    exact, seeds = found[EXACT], len(found[EXACT][STEPPED])
    seconds = exact["steps"] * exact["seconds a step"]
    after = {STEPPED: f"{exact['steps']:,} outer steps", TIMED: f"{seconds:.0f} s"}
    scale = f"CIFAR-FS 5-way 1-shot, {FILTERS} filters, {seeds} seed{'s' * (seeds > 1)}"
    for when, words in after.items():
        theirs = torch.tensor(exact[when])  # [seeds, tasks]
        against = {
            name: points(estimate((torch.tensor(row[when]) - theirs).tolist()), "+") + " against exact"
            for name, row in found.items() if name != EXACT
        }  # fmt: skip
        first = against.pop(FIRST, "not measured")
        for name, here in against.items():
            verdict = as_accurate({"accuracies": found[name][when]}, {"accuracies": exact[when]})
            text = f"{here}, which has {percent(estimate(exact[when]))}; first order {first}"
            claims.append([f"accuracy is competitive after {words} ({name})", "competitive", text, scale, verdict])
    rows = [
        [name, *(percent(estimate(row[when]), unit="") for when in after), f"{100 * row[CENTRES]:.1f}",
         f"{row['steps']:,}", f"{1000 * row['seconds a step']:.0f}"]
        for name, row in found.items()
    ]  # fmt: skip
    head = ["method", *(f"after {words}" for words in after.values()), f"{CENTRES}, at the end",
            "outer steps then", "ms a step"]  # fmt: skip
    return claims, (
        f"**Accuracy**, CIFAR-FS 5-way 1-shot, {FILTERS} filters and strides, {STEPS} inner steps at {RATE:g}, "
        f"{TASKS_PER_BATCH} tasks a step, Adam at {OUTER_RATE:g} outside, transductive, % on {len(exact[STEPPED][0])} "
        "test tasks a seed. Seconds are those of the processor, in meta-steps, that exact takes for its steps. ±: 95 % "
        "interval, paired by task in differences, and the wider of that and the one over seeds. Nearest "
        f"class mean is on each one's own features; nearest neighbour on pixels: {100 * exact[PIXELS]:.1f}.\n\n"
        + table(head, rows)
    )


def meta_network_section(results: Results) -> Section:
    found = results["rows"]
    windows = [row for name, row in found.items() if name.startswith("window")]
    before, last = means(windows[0]["loss"])[0], [means(row["loss"])[-1] for row in windows]
    text = f"loss of test tasks {before:.3f} before, {min(last):.3f} to {max(last):.3f} after training"
    largest, verdicts = max(found["first order"]["largest"]), [higher_of(falls(row)) for row in windows]
    text += f"; the fall is above 0 over seeds with {verdicts.count(judged(True))} of {len(windows)} windows"
    claims = [
        ["a meta-network becomes trainable, which first order leaves without a signal", "trainable",
         f"{text}; largest entry of the first-order gradient: {largest:g}",
         f"CIFAR-FS 5-way 5-shot, {results['steps'][-1]} steps, {results['seeds']} seeds",
         verdicts[0] if len(set(verdicts)) == 1 and largest == 0 else "open"],
    ]  # fmt: skip
    rows = [
        [name, *(f"{means(row['loss'])[place]:.3f}" for place in (0, -1)),
         f"{statistics.fmean(falls(row)):.3f} ± {student(falls(row)):.3f}",
         *(f"{100 * means(row['accuracy'])[place]:.1f}" for place in (0, -1)),
         "no direction" if name == "first order" else f"{statistics.fmean(row['cosine']):.3f}"]
        for name, row in found.items()
    ]  # fmt: skip
    after = f"after {results['steps'][-1]} outer steps"
    head = ["estimator", "loss before", after, "falls by", "accuracy before, %", after, "cosine to exact at first"]
    return claims, (
        "**A meta-network** that weighs what a new target network takes from a source network (arXiv 1905.05901, in "
        "small). The source is a Conv4 that has learned to classify the training classes of CIFAR-FS for 500 short "
        "steps. Loss and accuracy are those of a target after ten steps of matching and one on its labels, on 64 test "
        f"tasks of new classes; means of {results['seeds']} seeds, ±: 95 % interval over them. The inner and the outer "
        "rate were chosen in trials of another seed, which has other tasks, exact and windows beside one another.\n\n"
        + table(head, rows)
    )


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
    "accuracy": Part(accuracy, draw_accuracy, quick_accuracy, grows=True),
    "meta_network": Part(meta_network, draw_meta_network, quick_meta_network),
    "error": Part(error, draw_error, quick_error),
}

if __name__ == "__main__":
    run(__doc__, Path(__file__).parent, PARTS, page)
