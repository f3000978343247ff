"""Memory-reduced meta-learning (Yang, Ma and Yu, arXiv 2412.12030): memory, accuracy and convergence of Algorithm 1.

    python experiments/memory_reduced/run.py [--quick] [--only memory ...]

Claims: the memory of a meta-step does not grow with the inner steps K, and more than half of it is saved; accuracy is
kept; 0.9 of the best accuracy is reached sooner; with random batches the squared gradient ends on a plateau that goes
like 1/|B|; without randomness it goes to zero, by warm starts. The published baselines compute the features of a task
again in each inner step. Parts:

memory: peak memory of a meta-step, by plain autograd as published, and by the library.
accuracy_cifar_fs, accuracy_fc100: 5-way 5-shot, the same time for each method, with the inner and outer rates and
    steps of the authors' code; tested as there (the head alone, 20 steps at 0.05) and as the method itself adapts.
quadratic: convergence on a quadratic with a closed form.
logistic: the same on L2-regularised softmax heads of real tasks.
heads: error of the hypergradient on regularised heads of real tasks, and what becomes of it without the L2 term.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import COLOURS, Part, Results, details, in_turns, run, table, verdict
from convergence import EVERY, Heads, Quadratic, descend, plateau
from peak import METHODS

import innerloop as il
from innerloop.studies.compare import time_to
from innerloop.studies.comparison import Point
from innerloop.studies.measure import quiet_environment
from innerloop.tasks import TaskSource, nearest_neighbour
from innerloop.training.evaluation import Estimate, evaluate

FOLDER = Path(__file__).parent

# --- memory ---------------------------------------------------------------------------------------

SHAPES, STEPS = ((32, 64), (32, 32), (84, 64), (84, 32)), (5, 10, 15, 20)
PUBLISHED_MEMORY = {  # figure 2, "MB" there, which are MiB; 64 filters fit both sizes
    "84x84, 64 filters": {
        "Algorithm 1": (495.8, 496.6, 497.4, 498.1),
        "ITD-BiO": (1094.1, 1892.7, 2693.1, 3490.8),
        "MAML": (1776.9, 3149.3, 4521.7, 5894.1),
        "ANIL, features recomputed": (1094.1, 1892.7, 2693.2, 3490.9),
    },
    "32x32, 64 filters": {
        "Algorithm 1": (77.5, 77.7, 78.0, 78.2),
        "ITD-BiO": (149.1, 263.3, 377.5, 491.7),
        "MAML": (262.0, 463.6, 665.1, 866.6),
        "ANIL, features recomputed": (149.1, 263.3, 377.5, 491.8),
    },
}


def peaks(methods: Sequence[str], shapes: Sequence[tuple[int, int]], steps: Sequence[int]) -> Results:
    """MiB by shape, method and number of steps, each measured in a process of its own."""
    environment = quiet_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    found: Results = {"steps": list(steps), "mib": {}, "gradient_norm": {}}
    for size, filters in shapes:
        shape = f"{size}x{size}, {filters} filters"
        for key in ("mib", "gradient_norm"):
            found[key][shape] = {method: [] for method in methods}
        for method in methods:
            for count in steps:
                options = [f"--size={size}", f"--filters={filters}", f"--steps={count}"]
                command = [sys.executable, str(FOLDER / "peak.py"), method, *options]
                done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
                one = json.loads(done.stdout)
                found["mib"][shape][method].append(round(one["bytes"] / 2**20, 1))
                found["gradient_norm"][shape][method].append(one["gradient_norm"])
            print(f"  {shape}, {method}: {found['mib'][shape][method]} MiB", flush=True)
    return found


def slope(mib: Sequence[float], steps: Sequence[int]) -> float:
    """MiB an inner step."""
    return (mib[-1] - mib[0]) / (steps[-1] - steps[0])


def measure_memory(arguments: Namespace) -> Results:
    return peaks(METHODS, SHAPES, STEPS)


def quick_memory(arguments: Namespace) -> Results:
    flat, recomputed, cached = "Algorithm 1", "ANIL, features recomputed", "ANIL, features cached"
    found = peaks((flat, recomputed, cached), [(32, 32)], (5, 15))
    ((shape, mib),) = found["mib"].items()
    slopes = {method: slope(values, found["steps"]) for method, values in mib.items()}
    assert slopes[flat] < 0.1 * slopes[recomputed], f"Algorithm 1 should stay flat, MiB a step: {slopes}"
    assert slopes[cached] < 0.1 * slopes[recomputed], f"cached features should stay flat, MiB a step: {slopes}"
    assert mib[flat][-1] < 0.5 * mib[recomputed][-1], f"more than half should be saved, MiB: {mib}"
    norms = [found["gradient_norm"][shape][method][0] for method in (recomputed, cached)]
    assert abs(norms[1] / norms[0] - 1) < 1e-3, f"both ANILs should have one gradient, norms {norms}"
    return found


def draw_memory(results: Results) -> Figure:
    """Without the rows that are this library's exact gradients: they are in the table."""
    shapes = list(results["mib"])
    figure = Figure(figsize=(9, 0.8 + 2.9 * ((len(shapes) + 1) // 2)), layout="constrained")
    grid = figure.subplots((len(shapes) + 1) // 2, 2, squeeze=False, sharex=True)
    for shape, axes in zip(shapes, grid.flat, strict=False):
        for method, mib in reversed(results["mib"][shape].items()):
            if not method.endswith(", ours"):
                # ITD-BiO and ANIL need the same
                look = {"linewidth": 6, "alpha": 0.4} if method == "ITD-BiO" else {"linewidth": 2}
                axes.plot(results["steps"], mib, "o-", color=COLOURS[list(METHODS).index(method)], label=method, **look)
        for method, mib in PUBLISHED_MEMORY.get(shape, {}).items():
            axes.plot(
                STEPS, mib, "x", color="black", markersize=7, zorder=3, label=None if method != "MAML" else "published"
            )
        axes.set(
            title=shape, xlabel="inner steps K", ylabel="peak memory, MiB", xticks=results["steps"], ylim=(0, None)
        )
    for axes in grid.flat[len(shapes) :]:
        axes.set_visible(False)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


# --- accuracy -------------------------------------------------------------------------------------

FILTERS, TASKS_PER_BATCH, SECONDS, VALIDATIONS, VALIDATION_TASKS, TEST_TASKS = 32, 4, 240, 24, 50, 400
SHARE = 0.9  # of the best validation accuracy, that the time is taken to


class Method(NamedTuple):
    """Settings of the authors' code for CIFAR-FS and FC100, less the L2 norm (not squared) in ITD-BiO's inner loss."""

    adapts: str
    inner: il.SGD
    estimator: il.meta_gradient.MetaGradient
    outer_lr: float
    carry: Literal["none", "slot"] = "none"


L2 = 0.05
COMPARED = {
    "MAML": Method("everything", il.SGD(lr=0.5, steps=3), il.Unrolled(), 1e-3),
    "ANIL": Method("head", il.SGD(lr=0.1, steps=10), il.Unrolled(), 1e-4),
    "ITD-BiO": Method("head", il.SGD(lr=0.1, steps=20), il.Unrolled(learn_start=False), 1e-4),
    "Algorithm 1": Method("head", il.SGD(lr=0.1, steps=20), il.MemoryReduced(), 1e-4),
    "Algorithm 1, as printed": Method(
        "head", il.SGD(lr=0.1, steps=20, weight_decay=L2), il.MemoryReduced(), 1e-4, carry="slot"
    ),
}
PUBLISHED_ACCURACY = {
    "accuracy_cifar_fs": {"MAML": "54.85", "ANIL": "63.52", "ITD-BiO": "63.69", "Algorithm 1": "64.24"},
    "accuracy_fc100": {"MAML": "47.50", "ANIL": "47.70", "ITD-BiO": "47.88", "Algorithm 1": "48.52"},
}
PUBLISHED_SECONDS = {
    "accuracy_cifar_fs": {"MAML": "never", "ANIL": "1130", "ITD-BiO": "1741", "Algorithm 1": "832"},
    "accuracy_fc100": {"MAML": "2638", "ANIL": "879", "ITD-BiO": "1608", "Algorithm 1": "622"},
}


def build(method: Method, tasks: TaskSource, filters: int) -> il.MetaLearner:
    torch.manual_seed(0)
    model = il.models.Conv4(in_channels=tasks.input_shape[0], ways=tasks.output_size, filters=filters)
    return learner_of(model, method.adapts, method.inner, method.estimator, carry=method.carry)


def learner_of(*choices: object, **options: object) -> il.MetaLearner:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Implicit.. without weight_decay")  # as the authors' code has it
        return il.MetaLearner(*choices, **options)


def paces(methods: dict[str, Method], tasks: TaskSource, filters: int, rounds: int = 15) -> dict[str, float]:
    """Seconds of one meta-step of each method."""
    batch = tasks.batch("train", 0, TASKS_PER_BATCH)
    learners = {name: build(method, tasks, filters) for name, method in methods.items()}
    return in_turns({name: partial(learner.meta_step, batch) for name, learner in learners.items()}, rounds)


def train(
    method: Method, tasks: TaskSource, filters: int, steps: int, validations: int, validation_tasks: int, test: int
) -> Results:
    """Train, validating so many times on the way, and test."""
    learner, curve = build(method, tasks, filters), []

    def log(record: dict) -> None:
        if record["kind"] == "validation":
            curve.append((record["step"], record["accuracy"]))

    il.fit(
        learner,
        tasks,
        steps=steps,
        tasks_per_batch=TASKS_PER_BATCH,
        optimizer=torch.optim.Adam(learner.parameters(), lr=method.outer_lr),
        validate_every=steps // validations,
        validation_tasks=validation_tasks,
        progress=False,
        log=log,
    )
    authors = il.MetaLearner(learner.model, il.Head(), il.SGD(lr=0.05, steps=20))
    return {
        "steps": steps,
        "curve": curve,
        "authors": evaluate(authors, tasks, "test", test).accuracy,
        "own": evaluate(learner, tasks, "test", test).accuracy,
    }


def smooth(curve: Sequence[Sequence[float]]) -> np.ndarray:
    """Validation accuracy, the moving average of up to three validations before each point."""
    values = np.array([accuracy for _, accuracy in curve])
    return np.array([values[max(0, place - 2) : place + 1].mean() for place in range(len(values))])


def reached(methods: Results) -> tuple[float, dict[str, float | None]]:
    """The target accuracy, and the seconds of meta-steps until each method is there and stays."""
    target = SHARE * max(float(smooth(found["curve"]).max()) for found in methods.values())
    points = {
        name: [Point(step, step * found["seconds_a_step"], *3 * (accuracy,)) for step, accuracy in found["curve"]]
        for name, found in methods.items()
    }
    return target, {name: time_to(curve, target) for name, curve in points.items()}


def accuracy(tasks: TaskSource) -> Results:
    settings = {
        "seconds": SECONDS, "filters": FILTERS, "tasks a batch": TASKS_PER_BATCH, "validation tasks": VALIDATION_TASKS,
        "test tasks": TEST_TASKS,
    }  # fmt: skip
    found: Results = {"settings": settings, "methods": {}}
    seconds = paces(COMPARED, tasks, FILTERS)
    for name, method in COMPARED.items():
        steps = max(VALIDATIONS, round(SECONDS / seconds[name]))
        trained = train(method, tasks, FILTERS, steps, VALIDATIONS, VALIDATION_TASKS, TEST_TASKS)
        found["methods"][name] = {"seconds_a_step": seconds[name], **trained}
        print(f"  {name}: {found['methods'][name]['own'].mean:.1%}", flush=True)
    parts = [nearest_neighbour(batch) for batch in tasks.test(TEST_TASKS)]
    return found | {"nearest_neighbour": Estimate.of(torch.cat(parts))}


def measure_cifar_fs(arguments: Namespace) -> Results:
    return accuracy(il.tasks.cifar_fs(ways=5, shots=5, queries=5, data=arguments.data))


def measure_fc100(arguments: Namespace) -> Results:
    return accuracy(il.tasks.fc100(ways=5, shots=5, queries=5, data=arguments.data))


def quick_accuracy(arguments: Namespace) -> Results:
    """Algorithm 1 learns glyphs, at a higher outer rate than in the full form."""
    tasks, method = il.tasks.glyphs(5, 5, 5), COMPARED["Algorithm 1"]._replace(outer_lr=1e-2)
    before = evaluate(build(method, tasks, 8), tasks, "test", 40).accuracy.mean
    found = train(method, tasks, 8, steps=30, validations=3, validation_tasks=20, test=40)
    after = found["own"].mean
    assert after > before + 0.1, f"Algorithm 1 should learn glyphs: accuracy {before:.3f} before, {after:.3f} after"
    row = {"seconds_a_step": paces({"Algorithm 1": method}, tasks, 8, 5)["Algorithm 1"], **found}
    settings = {"seconds": None, "filters": 8, "tasks a batch": TASKS_PER_BATCH, "test tasks": 40}
    return {"settings": settings, "methods": {"Algorithm 1": row}}


def draw_accuracy(results: Results) -> Figure:
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots()
    for (name, found), colour in zip(results["methods"].items(), COLOURS, strict=False):
        seconds = [step * found["seconds_a_step"] for step, _ in found["curve"]]
        axes.plot(seconds, 100 * smooth(found["curve"]), color=colour, label=name)
        axes.plot(seconds, [100 * value for _, value in found["curve"]], ".", color=colour, alpha=0.4)
    target, _ = reached(results["methods"])
    axes.axhline(100 * target, color="black", linestyle=":", linewidth=1, label=f"{SHARE:g} of the best")
    axes.set(xlabel="seconds of meta-steps", ylabel="validation accuracy, %")
    figure.legend(loc="outside right center")
    return figure


# --- convergence ------------------------------------------------------------------------------------


Cases = Sequence[tuple[int, int]]


def descents(
    case: Quadratic | Heads, tasks: il.Task, cases: Cases, inner_lr: float, steps: int, rate: float
) -> dict[str, list[float]]:
    """Squared norms of the true gradient on recurring tasks, for each K and N, with warm and with cold starts."""
    found = {}
    for inner, iterations in cases:
        for warm in (True, False):
            name = f"K = {inner}, N = {iterations}, {'warm' if warm else 'cold'}"
            solver = il.SGD(lr=inner_lr, steps=inner, weight_decay=case.l2)
            thetas = descend(case, tasks, solver, iterations, warm, steps, rate)
            found[name] = case.gradient(thetas, tasks).flatten(1).square().sum(1).tolist()
            print(f"  {name}: squared gradient {found[name][-1]:.2g}", flush=True)
    return found


def quadratic(cases: Cases, steps: int, batches: Sequence[int], replicas: int) -> Results:
    case = Quadratic(heads=8, thetas=2)
    rate = 0.3 / float(torch.linalg.eigvalsh(case.curvature)[-1])
    found: Results = {"every": EVERY, "descent": descents(case, case.tasks(12), cases, 1 / 8, steps, rate)}
    # one direction, and from where the gradient is zero, so that every plateau is reached in a few steps
    narrow = Quadratic(heads=5, thetas=1)
    narrow.theta = torch.zeros_like(narrow.theta)
    rate = 0.5 / float(narrow.curvature.max())
    return found | {"plateau": {str(batch): plateau(narrow, batch, replicas, 20, rate) for batch in batches}}


def measure_quadratic(arguments: Namespace) -> Results:
    return quadratic([(1, 1), (3, 2), (20, 8)], 1500, (1, 4, 16, 64), 1000)


def quick_quadratic(arguments: Namespace) -> Results:
    found = quadratic([(1, 1)], 100, (1, 16), 100)
    assert_warm_starts_win(found)
    ratio = found["plateau"]["1"] / found["plateau"]["16"]
    assert 10 < ratio < 25, f"a batch of 16 should lower the plateau about 16 times, not {ratio:.1f}"
    return found


def assert_warm_starts_win(found: Results) -> None:
    warm, cold = found["descent"].values()
    assert warm[-1] < 1e-2 * cold[-1], f"warm starts should pass the floor of cold ones: {warm[-1]}, {cold[-1]}"


def measure_logistic(arguments: Namespace) -> Results:
    case = Heads(il.tasks.cifar_fs(ways=5, shots=5, queries=5, data=arguments.data), 48, inputs=16, features=8)
    cases = [(1, 1), (5, 5)]
    found: Results = {"every": EVERY}
    found["descent"] = descents(case, case.chosen(torch.arange(12)), cases, 0.5, 1500, 1.0)
    inner = il.SGD(lr=0.5, steps=1, weight_decay=case.l2)
    case.theta = descend(case, case.pool, inner, 1, True, 1500, 1.0)[-1]
    return found | {"plateau": {str(batch): plateau(case, batch, 16, 60, 0.5, every=6) for batch in (1, 4, 16)}}


def quick_logistic(arguments: Namespace) -> Results:
    case = Heads(il.tasks.glyphs(5, 5, 5), 6, inputs=6, features=4)
    found = {"every": EVERY, "descent": descents(case, case.pool, [(1, 1)], 0.5, 200, 1.0), "plateau": {}}
    assert_warm_starts_win(found)
    return found


def draw_convergence(results: Results) -> Figure:
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for place, (name, norms) in enumerate(results["descent"].items()):
        steps = results["every"] * np.arange(len(norms))
        left.plot(steps, norms, "--" if name.endswith("cold") else "-", color=COLOURS[place // 2], label=name)
    left.set(yscale="log", xlabel="outer steps", ylabel="squared norm of the true gradient", title="12 recurring tasks")
    if batches := [int(batch) for batch in results["plateau"]]:
        right.plot(batches, list(results["plateau"].values()), "o", color=COLOURS[0], label="plateau")
        first = results["plateau"][str(batches[0])] * batches[0]
        right.plot(batches, [first / batch for batch in batches], ":", color="black", label="1 / |B|")
    right.set(xscale="log", yscale="log", xlabel="tasks a batch |B|", title="new tasks in every batch")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


# --- heads ----------------------------------------------------------------------------------------

RATE = 0.1


def body_gradient(
    tasks: TaskSource, filters: int, inner: object, estimator: object, count: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """The meta-gradient in an untrained backbone in float64, and the estimator's diagnostics."""
    torch.manual_seed(0)
    model = il.models.Conv4(in_channels=tasks.input_shape[0], ways=tasks.output_size, filters=filters).double()
    learner = learner_of(model, il.Head(), inner, estimator)
    diagnostics = learner.meta_step(tasks.batch("train", 0, count)).diagnostics
    body = [p.grad.flatten() for name, p in learner.model.named_parameters() if name not in learner.adapted]
    return torch.cat(body), diagnostics


def heads(
    tasks: TaskSource,
    filters: int,
    count: int,
    inner_steps: Sequence[int],
    iterations: Sequence[int],
    penalties: Sequence[float],
    newton: il.NewtonCG,
) -> Results:
    """Errors against K with many iterations, against N at the solution, and ``v`` for several L2 weights."""
    exact, diagnostics = body_gradient(tasks, filters, newton, il.MemoryReduced(il.CG(200)), count)
    last = diagnostics["support_loss"].flatten()[-2:].tolist()
    assert abs(last[1] - last[0]) < 1e-8, f"Newton's method has not arrived, the inner loss still falls: {last}"

    def error(inner: object, estimator: object) -> float:
        found, _ = body_gradient(tasks, filters, inner, estimator, count)
        return float((found - exact).norm() / exact.norm())

    def gradient_steps(steps: int, penalty: float = L2) -> il.SGD:
        return il.SGD(lr=RATE, steps=steps, weight_decay=penalty)

    found: Results = {
        "l2": L2,
        "lr": RATE,
        "inner_steps": list(inner_steps),
        "iterations": list(iterations),
        "by_steps": [error(gradient_steps(steps), il.MemoryReduced(il.CG(60))) for steps in inner_steps],
        "first_order": [error(gradient_steps(steps), il.FirstOrder()) for steps in inner_steps],
        "unrolled": [error(gradient_steps(steps), il.Unrolled(learn_start=False)) for steps in inner_steps],
        "by_iterations": [error(newton, il.MemoryReduced(il.CG(number))) for number in iterations],
        "penalties": {},
    }
    for penalty in penalties:
        seen = [
            body_gradient(tasks, filters, gradient_steps(20, penalty), il.MemoryReduced(il.CG(number)), count)[1]
            for number in iterations
        ]
        found["penalties"][str(penalty)] = {
            name: [float(one[name]) for one in seen] for name in ("solution_norm", "residual")
        }
    return found


def measure_heads(arguments: Namespace) -> Results:
    tasks = il.tasks.cifar_fs(ways=5, shots=5, queries=5, data=arguments.data)
    iterations = (1, 2, 5, 10, 20, 40, 80, 160)
    newton = il.NewtonCG(steps=30, iterations=150, weight_decay=L2)
    return heads(tasks, 32, 2, (5, 20, 100, 500, 2000), iterations, (0.0, 0.005, L2), newton)


def quick_heads(arguments: Namespace) -> Results:
    # more features than support examples, as in the full form: without the L2 term the system is singular
    newton = il.NewtonCG(steps=10, iterations=40, weight_decay=L2)
    found = heads(il.tasks.glyphs(5, 1, 5), 8, 1, (5, 200), (1, 5, 20, 40), (0.0, L2), newton)
    few, many = found["by_steps"]
    assert many < 0.2 * few, f"the error should fall with the inner steps: {few:.3g}, {many:.3g}"
    errors = found["by_iterations"]
    assert errors[-1] < 1e-3 * errors[0], f"the error should fall with CG's iterations: {errors}"
    plain, convex = (found["penalties"][name]["solution_norm"] for name in ("0.0", str(L2)))
    assert plain[-1] > 10 * plain[1] and convex[-1] < 2 * convex[1] + 1, (  # noqa: PT018
        f"v should grow without bound only where there is no L2 term: {plain}, {convex}"
    )
    return found


def draw_heads(results: Results) -> Figure:
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    steps, iterations, solution = figure.subplots(1, 3)
    names = {"by_steps": "Algorithm 1", "unrolled": "ITD-BiO", "first_order": "first-order"}
    for (key, name), colour in zip(names.items(), COLOURS, strict=False):
        steps.plot(results["inner_steps"], results[key], "o-", color=colour, label=name)
    steps.set(xscale="log", yscale="log", xlabel="inner steps K", ylabel="relative error of the hypergradient")
    iterations.plot(results["iterations"], results["by_iterations"], "o-", color=COLOURS[0])
    iterations.set(xscale="log", yscale="log", xlabel="CG iterations N, at the solution")
    for (penalty, seen), colour in zip(results["penalties"].items(), COLOURS[3:], strict=False):
        solution.plot(
            results["iterations"], seen["solution_norm"], "o-", color=colour, label=f"|v|, L2 weight {penalty}"
        )
        solution.plot(
            results["iterations"], seen["residual"], "s:", color=colour, label=f"relative residual, L2 weight {penalty}"
        )
    solution.set(xscale="log", yscale="log", xlabel="CG iterations N, at K = 20")
    figure.legend(loc="outside lower center", ncols=3)
    return figure


# --- page -----------------------------------------------------------------------------------------

HEADER = """# Memory-reduced meta-learning: memory, accuracy, convergence (arXiv 2412.12030)

**What differs from the paper.** Memory is {memory}, above model and task; the paper does not say how its "MB" were
measured, nor with how many filters: its numbers fit 64, and MiB. The rows of Algorithm 1 are this library's, those of
the others plain autograd, as the authors compute them, unless they say "ours".{accuracy} The CIFAR images are a lossy
copy. ± is a 95 % interval over tasks; the paper's is not explained.
"""
ACCURACY = """ Accuracy: {seconds} s of meta-steps a method on one CPU thread (the paper: 2,000 iterations, hardware
unknown), Conv4 with {filters} filters (64), {tasks} tasks a batch (32), {test} test tasks, one seed, the library's
initialisation; inner and outer rates and steps are those of the authors' code, which has no L2 term in Algorithm 1 ("as
printed" has it, and warm starts); the L2 norm, not squared, that it adds to ITD-BiO's inner loss is left out."""
TITLES = {"accuracy_cifar_fs": "CIFAR-FS", "accuracy_fc100": "FC100"}
PRINTED = "Algorithm 1, as printed"
CONVERGENCE = {
    "quadratic": "on a quadratic",
    "logistic": "on regularised logistic heads of CIFAR-FS tasks, features learned from 16 principal components",
}


def claims(found: dict[str, Results]) -> str:
    """The paper's claims beside what was found."""
    rows = memory_claims(found["memory"]) if "memory" in found else []
    for name, title in TITLES.items():
        if name in found:
            rows += accuracy_claims(name, title, found[name])
    known = {name: found[name] for name in CONVERGENCE if name in found}
    if powers := {name: power(results) for name, results in known.items() if results["plateau"]}:
        here = ", ".join(f"{value:.2f} ({name})" for name, value in powers.items())
        holds = "; ".join(f"{verdict(abs(value + 1) < 0.1)} ({name})" for name, value in powers.items())
        if "logistic" in powers and holds.endswith("does not hold (logistic)"):
            holds += ", where a single task a batch stays below the line"
        rows.append(["random batches: a plateau like 1/abs(B)", "power -1", f"power {here}", holds])
    if known:
        ends = [results["descent"].items() for results in known.values()]
        warm, cold = (
            max(norms[-1] for each in ends for name, norms in each if name.endswith(kind)) for kind in ("warm", "cold")
        )
        rows.append(
            ["all tasks in each batch: the gradient vanishes", "stationary", f"squared at most {warm:.0e} with warm "
             f"starts, up to {cold:.2g} with cold ones", "holds with warm starts" if warm < 1e-5 else "does not hold"]
        )  # fmt: skip
    return table(["claim", "published", "here", "verdict"], rows)


def memory_claims(results: Results) -> list[list[str]]:
    steps, rows = results["steps"], list(results["mib"].values())
    published = list(PUBLISHED_MEMORY.values())
    slopes = [abs(slope(row["Algorithm 1"], steps)) for row in rows]
    again = "ANIL, features recomputed"
    shares = [[1 - row["Algorithm 1"][place] / row[again][place] for place in (0, -1)] for row in rows]
    theirs = [[1 - row["Algorithm 1"][place] / row[again][place] for place in (0, -1)] for row in published]
    flat = all(each < 0.002 * row["Algorithm 1"][0] for each, row in zip(slopes, rows, strict=True))
    published_slope = max(slope(row["Algorithm 1"], STEPS) for row in published)
    found = [
        [
            "memory flat in the inner steps",
            f"at most {published_slope:.2f} MiB a step",
            f"at most {max(slopes):.2f} MiB a step",
            verdict(flat),
        ]
    ]
    text = [
        f"{min(few for few, _ in each):.0%} to {max(few for few, _ in each):.0%} at K = {steps[0]}, up to "
        f"{max(many for _, many in each):.0%} at {steps[-1]}"
        for each in (theirs, shares)
    ]
    cached = [
        row["Algorithm 1"][-1] / row["ANIL, features cached"][-1] for row in rows if "ANIL, features cached" in row
    ]
    cause = "holds against an ANIL that computes its features again in each step, as the published one does"
    if cached:
        cause += f"; one that computes them once needs {1 / max(cached):.2f} of it, or in this library the same"
    return [*found, ["more than half of the memory saved", text[0], text[1], cause]]


def accuracy_claims(name: str, title: str, results: Results) -> list[list[str]]:
    methods, published = results["methods"], PUBLISHED_ACCURACY[name]
    if "ANIL" not in methods:
        return []
    anil = methods["ANIL"]["own"]
    differences = {
        name: (100 * (methods[name]["own"][0] - anil[0]), 100 * (methods[name]["own"][1] ** 2 + anil[1] ** 2) ** 0.5)
        for name in ("Algorithm 1", PRINTED)
    }
    here = "released {:+.1f} ± {:.1f}, printed {:+.1f} ± {:.1f}".format(
        *differences["Algorithm 1"], *differences[PRINTED]
    )
    released, printed = (value > -half for value, half in differences.values())
    kept = verdict(released)
    if printed > released:
        kept += " as released, without the L2 term, where the linear system is singular; holds as printed"
    _, seconds = reached(methods)
    first = min((value for value in seconds.values() if value is not None), default=None)
    between = max(row["curve"][0][0] * row["seconds_a_step"] for row in methods.values())  # two validations
    leaders = [method for method, value in seconds.items() if value is not None and value < first + between]
    sooner = "holds" if leaders == ["Algorithm 1"] else "a tie" if "Algorithm 1" in leaders else "does not hold"
    order = ("Algorithm 1", "ANIL", "ITD-BiO")
    *times, late = ("never" if seconds[method] is None else f"{seconds[method]:.0f}" for method in (*order, PRINTED))
    return [
        [f"{title}: accuracy kept, against ANIL", f"{float(published['Algorithm 1']) - float(published['ANIL']):+.2f}",
         here, kept],
        [f"{title}: seconds to {SHARE:g} of the best, {', '.join(order)}",
         ", ".join(PUBLISHED_SECONDS[name][method] for method in order), f"{', '.join(times)}; as printed {late}",
         sooner],
    ]  # fmt: skip


def power(results: Results) -> float:
    """Of the batch, with which the plateau goes; by least squares in logarithms."""
    batches = np.array([int(batch) for batch in results["plateau"]])
    return float(np.polyfit(np.log(batches), np.log(list(results["plateau"].values())), 1)[0])


def memory_section(results: Results) -> list[str]:
    steps = results["steps"]
    shapes = [shape for shape in results["mib"] if shape in PUBLISHED_MEMORY]
    if not shapes:
        return []
    head = ["peak of a meta-step, MiB (published)"]
    for shape in shapes:
        head += [f"{shape}: K = {steps[0]}", f"K = {steps[-1]}", "a step"]
    cells = []
    for method in results["mib"][shapes[0]]:
        cells.append([method])
        for shape in shapes:
            mib, theirs = results["mib"][shape][method], PUBLISHED_MEMORY[shape].get(method)
            values = [f"{mib[0]:.0f}", f"{mib[-1]:.0f}", f"{abs(slope(mib, steps)):.1f}"]
            if theirs:
                published = f"{theirs[0]:.0f}", f"{theirs[-1]:.0f}", f"{slope(theirs, STEPS):.1f}"
                values = [f"{own} ({their})" for own, their in zip(values, published, strict=True)]
            cells[-1] += values
    return ["## Memory\n", table(head, cells) + "\n", "![memory](memory.png)\n"]


def accuracy_section(name: str, results: Results) -> list[str]:
    target, seconds = reached(results["methods"])
    head = [
        f"{TITLES[name]}, 5-way 5-shot", "head only, 20 steps, as published", "as the method adapts", "published",
        f"seconds to {target:.1%} in validation", "published", "meta-steps",
    ]  # fmt: skip
    cells = [
        [
            method,
            *(f"{100 * found[key][0]:.1f} ± {100 * found[key][1]:.1f}" for key in ("authors", "own")),
            PUBLISHED_ACCURACY[name].get(method, ""),
            "never" if seconds[method] is None else f"{seconds[method]:.0f}",
            PUBLISHED_SECONDS[name].get(method, ""),
            str(found["steps"]),
        ]
        for method, found in results["methods"].items()
    ]
    parts = [f"## {TITLES[name]}\n", table(head, cells) + "\n"]
    if "nearest_neighbour" in results:
        parts.append(f"Nearest neighbour on pixels: {100 * results['nearest_neighbour'][0]:.1f} %.\n")
    return [*parts, f"![validation accuracy]({name}.png)\n"]


def convergence_section(name: str, results: Results) -> list[str]:
    ends = {case: norms[-1] for case, norms in results["descent"].items()}
    head = ["squared true gradient at the end", *ends]
    parts = [
        f"## Convergence {CONVERGENCE[name]}\n",
        table(head, [["", *(f"{value:.1e}" for value in ends.values())]]) + "\n",
    ]
    if results["plateau"]:
        scaled = ", ".join(f"{int(batch) * value:.3g}" for batch, value in results["plateau"].items())
        parts.append(f"Random batches: the plateau times |B| is {scaled} for |B| = {', '.join(results['plateau'])}.\n")
    return [*parts, f"![convergence]({name}.png)\n"]


def heads_section(results: Results) -> list[str]:
    head = ["relative error", *(f"K = {steps}" for steps in results["inner_steps"])]
    names = {"by_steps": "Algorithm 1, N = 60", "unrolled": "ITD-BiO", "first_order": "first-order"}
    cells = [[name, *(f"{value:.2g}" for value in results[key])] for key, name in names.items()]
    plain, last = results["penalties"]["0.0"], results["iterations"][-1]
    worse = [
        steps
        for steps, ours, first in zip(results["inner_steps"], results["by_steps"], results["first_order"], strict=True)
        if ours > first
    ]
    return [
        f"## Heads, L2 weight {results['l2']:g}, inner rate {results['lr']:g}\n",
        table(head, cells) + "\n",
        "On the features of an untrained backbone, two tasks. Algorithm 1 is worse than the first-order estimate at "
        f"K = {', '.join(map(str, worse)) or 'none of these'}. "
        f"Without the L2 term, as in the authors' code, |v| is {plain['solution_norm'][-1]:.2g} and the residual "
        f"{plain['residual'][-1]:.2g} after {last} CG iterations: the system is singular, and few iterations are what "
        "keeps the estimate bounded.\n",
        "![heads](heads.png)\n",
    ]


def page(found: dict[str, Results]) -> str:
    on_gpu = "memory" in found and found["memory"]["made"]["machine"]["gpu"]
    measured = "what torch allocates on a GPU" if on_gpu else "resident memory on a CPU"
    trained = [found[name]["settings"] for name in TITLES if name in found]
    accuracy = "".join(
        ACCURACY.format(
            seconds=each["seconds"], filters=each["filters"], tasks=each["tasks a batch"], test=each["test tasks"]
        )
        for each in trained[:1]
    )
    parts = [HEADER.format(memory=measured, accuracy=accuracy), claims(found) + "\n"]
    if "memory" in found:
        parts += memory_section(found["memory"])
    for name in TITLES:
        if name in found:
            parts += accuracy_section(name, found[name])
    for name in CONVERGENCE:
        if name in found:
            parts += convergence_section(name, found[name])
    if "heads" in found:
        parts += heads_section(found["heads"])
    parts.append(details(found, "`python experiments/memory_reduced/run.py --threads 1`"))
    return "\n".join(parts)


PARTS = {
    "memory": Part(measure_memory, draw_memory, quick_memory),
    "accuracy_cifar_fs": Part(measure_cifar_fs, draw_accuracy, quick_accuracy),
    "accuracy_fc100": Part(measure_fc100, draw_accuracy, None),
    "quadratic": Part(measure_quadratic, draw_convergence, quick_quadratic),
    "logistic": Part(measure_logistic, draw_convergence, quick_logistic),
    "heads": Part(measure_heads, draw_heads, quick_heads),
}

if __name__ == "__main__":
    run(__doc__, FOLDER, PARTS, page)
