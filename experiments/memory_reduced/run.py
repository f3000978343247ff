"""Memory-reduced meta-learning (Yang, Ma and Yu, arXiv 2412.12030): memory, accuracy and convergence of Algorithm 1.

    python experiments/memory_reduced/run.py [--quick] [--only memory ...]

Claims: the memory of a meta-step does not grow with the inner steps K, and more than half of it is saved; accuracy is
kept; 0.9 of the best accuracy is reached sooner; with random batches the squared gradient ends on a plateau that goes
like 1/|B|; without randomness it goes to zero, by warm starts. The published baselines compute the features of a task
again in each inner step. Parts:

memory: peak memory of a meta-step, by plain autograd as published, and by the library.
accuracy_cifar_fs, accuracy_fc100: 5-way 5-shot, as many steps and tasks as in the paper, with the inner and outer
    rates and steps of the authors' code; tested as there (the head alone, 20 steps at 0.05) and as the method adapts.
quadratic: convergence on a quadratic with a closed form.
logistic: the same on L2-regularised softmax heads of real tasks.
heads: error of the hypergradient on regularised heads of real tasks, and what becomes of it without the L2 term.
"""

from __future__ import annotations

import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Part, Results, Section, collect, ending, estimate, judged, page_of, references, run
from common import validations as curve_of
from convergence import EVERY, Heads, Quadratic, descend, plateau
from peak import METHODS, measure

import innerloop as il
from innerloop.reporting import in_fresh_process, table, verdict_of
from innerloop.reporting.figures import COLOURS, DOTS, DOTTED, MARKED, Line, Panel, panels
from innerloop.studies.compare import time_to
from innerloop.studies.comparison import Point
from innerloop.tasks import TaskSource
from innerloop.training.evaluation import assess, evaluate

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
    found: Results = {"steps": list(steps), "mib": {}, "gradient_norm": {}}
    for size, filters in shapes:
        shape = f"{size}x{size}, {filters} filters"
        for key in ("mib", "gradient_norm"):
            found[key][shape] = {method: [] for method in methods}
        for method in methods:
            for count in steps:
                one = in_fresh_process(measure, method, size, filters, count)
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
    shown = []
    for shape, found in results["mib"].items():
        lines = {}
        for method, mib in found.items():
            if not method.endswith(", ours"):
                # ITD-BiO and ANIL need the same
                look = {"linewidth": 6, "alpha": 0.4} if method == "ITD-BiO" else {"linewidth": 2}
                lines[method] = Line(results["steps"], mib, MARKED | look)
        published = PUBLISHED_MEMORY.get(shape, {}).values()
        cross = DOTS | {"marker": "x", "color": "black", "markersize": 7, "zorder": 3}
        lines["published"] = Line([*STEPS] * len(published), [each for row in published for each in row], cross)
        axes = {"xlabel": "inner steps K", "ylabel": "peak memory, MiB", "xticks": results["steps"], "ylim": (0, None)}
        shown.append(Panel(lines, axes | {"title": shape}))
    return panels(shown, height=3)


# --- accuracy -------------------------------------------------------------------------------------

WAYS, FILTERS, TASKS_PER_BATCH, STEPS_OF_ALL, VALIDATIONS, TEST_TASKS = 5, 32, 32, 2000, 20, 640
SHARE = 0.9  # of the best validation accuracy, that the time is taken to


class Method(NamedTuple):
    """Settings of the authors' code for CIFAR-FS and FC100, less the L2 norm (not squared) in ITD-BiO's inner loss."""

    inner: il.SGD
    estimator: il.meta_gradient.MetaGradient
    carry: Literal["none", "slot"] = "none"


L2, OUTER_LR = 0.05, 1e-4
PRINTED = "Algorithm 1, as printed"
COMPARED = {  # the claim's two come first
    "ANIL": Method(il.SGD(lr=0.1, steps=10), il.Unrolled()),
    PRINTED: Method(il.SGD(lr=0.1, steps=20, weight_decay=L2), il.MemoryReduced(), carry="slot"),
    "ITD-BiO": Method(il.SGD(lr=0.1, steps=20), il.Unrolled(learn_start=False)),
    "Algorithm 1": Method(il.SGD(lr=0.1, steps=20), il.MemoryReduced()),
}
PUBLISHED_ACCURACY = {
    "accuracy_cifar_fs": {"MAML": "54.85", "ANIL": "63.52", "ITD-BiO": "63.69", "Algorithm 1": "64.24"},
    "accuracy_fc100": {"MAML": "47.50", "ANIL": "47.70", "ITD-BiO": "47.88", "Algorithm 1": "48.52"},
}
PUBLISHED_SECONDS = {
    "accuracy_cifar_fs": {"MAML": "never", "ANIL": "1130", "ITD-BiO": "1741", "Algorithm 1": "832"},
    "accuracy_fc100": {"MAML": "2638", "ANIL": "879", "ITD-BiO": "1608", "Algorithm 1": "622"},
}


def learner_of(*choices: object, **options: object) -> il.MetaLearner:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Implicit.. without weight_decay")  # as the authors' code has it
        return il.MetaLearner(*choices, **options)


def trained(
    method: Method,
    tasks: TaskSource,
    seed: int = 0,
    filters: int = FILTERS,
    batch: int = TASKS_PER_BATCH,
    steps: int = STEPS_OF_ALL,
    validations: int = VALIDATIONS,
    test: int = TEST_TASKS,
    outer_lr: float = OUTER_LR,
) -> Results:
    """One training, tested as the method adapts, by the head alone as the authors do, and by nearest class mean."""
    torch.manual_seed(seed)
    channels, ways = tasks.input_shape[0], tasks.output_size
    model = il.models.Conv4(in_channels=channels, ways=ways, filters=filters, downsample="stride")
    learner = learner_of(model, "head", method.inner, method.estimator, carry=method.carry)
    adam, records, clock = torch.optim.Adam(learner.parameters(), lr=outer_lr), [], []

    def log(record: dict[str, object]) -> None:
        records.append(record)
        clock.append(time.process_time())

    il.fit(
        learner, tasks, steps=steps, tasks_per_batch=batch, optimizer=adam, progress=False, seed=seed,
        validate_every=steps // validations, validation_tasks=2 * batch, log=log,
    )  # fmt: skip
    own = assess(learner, tasks, "test", test).transductive
    head = evaluate(il.MetaLearner(learner.model, il.Head(), il.SGD(lr=0.05, steps=20)), tasks, "test", test)
    percents = {"accuracies": own.accuracies, "head only": head.accuracies}
    return {
        "seconds a step": float(np.median(np.diff(clock))),
        "curve": [(step, accuracy) for step, accuracy, _ in curve_of(records)],
        "nearest class mean": own.baselines["nearest class mean"].accuracy.mean,
        "pixels": own.baselines["pixels"].accuracy.mean,
        **{name: [round(float(each), 4) for each in values] for name, values in percents.items()},
    }


def accuracy(name: str, source: Callable[..., TaskSource], arguments: Namespace) -> Results:
    def measured(key: Results, _: list[Results]) -> Results:
        tasks = source(ways=WAYS, shots=5, queries=5, seed=key["seed"], data=arguments.data)
        return trained(COMPARED[key["method"]], tasks, key["seed"])

    wanted = [{"method": method, "seed": seed} for method in COMPARED for seed in range(arguments.seeds)]
    return collect(arguments.out / f"{name}.json", wanted, measured)


def quick_accuracy(_: Namespace) -> Results:
    """Algorithm 1 learns glyphs, at a higher outer rate than in the full form."""
    tasks = il.tasks.glyphs(5, 5, 5)
    before, after = (
        trained(COMPARED["Algorithm 1"], tasks, 0, 8, 4, steps, validations=1, test=40, outer_lr=1e-2)
        for steps in (1, 30)
    )
    start, end = (np.mean(row["accuracies"]) for row in (before, after))
    assert end > start + 0.1, f"Algorithm 1 should learn glyphs: accuracy {start:.3f} before, {end:.3f} after"
    return {"rows": [{"method": "Algorithm 1", "seed": 0} | after]}


def by_method(results: Results) -> dict[str, list[Results]]:
    """The rows of each method, by seed."""
    return {name: found for name in COMPARED if (found := [r for r in results["rows"] if r["method"] == name])}


def learned(rows: list[Results]) -> list[Point]:
    """Seconds and validation accuracy, mean over the seeds of moving averages of up to three validations."""
    steps = [step for step, _ in rows[0]["curve"]]
    values = np.mean([[accuracy for _, accuracy in row["curve"]] for row in rows], axis=0)
    smooth = [float(values[max(0, place - 2) : place + 1].mean()) for place in range(len(values))]
    seconds = float(np.mean([row["seconds a step"] for row in rows]))
    return [Point(step, step * seconds, *3 * (value,)) for step, value in zip(steps, smooth, strict=True)]


def reached(curves: dict[str, list[Point]]) -> tuple[float, dict[str, float | None]]:
    """The target accuracy, and the seconds of meta-steps until each method is there and stays."""
    target = SHARE * max(point.accuracy for curve in curves.values() for point in curve)
    return target, {name: time_to(curve, target) for name, curve in curves.items()}


def draw_accuracy(results: Results) -> Figure:
    curves = {name: learned(rows) for name, rows in by_method(results).items()}
    lines = {}
    for place, (name, rows) in enumerate(by_method(results).items()):
        seconds = [point.seconds for point in curves[name]]
        lines[name] = Line(seconds, [100 * point.accuracy for point in curves[name]])
        mean, half = seen(rows, "accuracies")
        lines[f"_{name}"] = ending((1 + 0.015 * place) * seconds[-1], (mean / 100, half / 100))
    levels = {f"{SHARE:g} of the best": (100 * reached(curves)[0], {})}
    levels |= references(WAYS, np.mean([row["pixels"] for row in results["rows"]]))
    axes = {"xlabel": "seconds of meta-steps", "ylabel": "validation accuracy, %; bar: test"}
    return panels([Panel(lines, axes, levels)], width=7)


def seen(rows: list[Results], key: str, less: list[Results] | None = None) -> tuple[float, float]:
    """Mean and 95 % interval in percent, over tasks and seeds; less another method's, paired."""
    others = {row["seed"]: row[key] for row in less} if less else {row["seed"]: [0.0] * len(row[key]) for row in rows}
    each = [
        [100 * (one - other) for one, other in zip(row[key], others[row["seed"]], strict=True)]
        for row in rows
        if row["seed"] in others
    ]
    return estimate(each)


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
    lines = {
        name: Line(
            results["every"] * np.arange(len(norms)), norms,
            {"color": COLOURS[place // 2], "linestyle": "--" if name.endswith("cold") else "-"},
        )
        for place, (name, norms) in enumerate(results["descent"].items())
    }  # fmt: skip
    left = {"yscale": "log", "xlabel": "outer steps", "ylabel": "squared norm of the true gradient"}
    shown = [Panel(lines, left | {"title": "12 recurring tasks"})]
    if batches := [int(batch) for batch in results["plateau"]]:
        first = results["plateau"][str(batches[0])] * batches[0]
        plateaus = {
            "plateau": Line(batches, list(results["plateau"].values()), DOTS),
            "1 / |B|": Line(batches, [first / batch for batch in batches], DOTTED | {"color": "black"}),
        }
        right = {"xscale": "log", "yscale": "log", "xlabel": "tasks a batch |B|", "title": "new tasks in every batch"}
        shown.append(Panel(plateaus, right))
    return panels(shown)


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
    both = {"xscale": "log", "yscale": "log"}
    by_steps = {name: Line(results["inner_steps"], results[key], MARKED) for key, name in ESTIMATES.items()}
    by_iterations = {"_Algorithm 1, N = 60": Line(results["iterations"], results["by_iterations"], MARKED)}
    solution = {}
    for place, (penalty, seen) in enumerate(results["penalties"].items(), len(ESTIMATES)):
        look = MARKED | {"color": COLOURS[place]}
        solution[f"|v|, L2 weight {penalty}"] = Line(results["iterations"], seen["solution_norm"], look)
        dots = look | DOTTED | {"marker": "s"}
        solution[f"relative residual, L2 weight {penalty}"] = Line(results["iterations"], seen["residual"], dots)
    label = "relative error of the hypergradient"
    shown = [
        Panel(by_steps, both | {"xlabel": "inner steps K", "ylabel": label}),
        Panel(by_iterations, both | {"xlabel": "CG iterations N, at the solution", "ylabel": label}),
        Panel(solution, both | {"xlabel": "CG iterations N, at K = 20"}),
    ]
    return panels(shown, columns=3, width=4)


# --- page -----------------------------------------------------------------------------------------

HEADER = f"""# Memory-reduced meta-learning: memory, accuracy, convergence (arXiv 2412.12030)

**What differs from the paper.** Of its text only an abstract could be read, with both algorithms, tables and figures
and the authors' code. Memory is resident memory on a CPU or what torch allocates on a GPU, above model and
task; the paper does not say how its "MB" were measured, nor with how many filters: its numbers fit 64, and MiB. The
rows of Algorithm 1 are this library's, those of the others plain autograd, as the authors compute them, unless they say
"ours". Accuracy: {STEPS_OF_ALL:,} steps of {TASKS_PER_BATCH} tasks, as in the paper, on one CPU thread; Conv4 with
{FILTERS} filters (64) and strides in place of max-pooling, {TEST_TASKS} test tasks, the library's initialisation. Inner
and outer rates and steps are those of the authors' code, which has no L2 term in Algorithm 1. "As printed" has it, of
{L2:g}, our value, and warm starts; tested by the head alone, as published, it is without. The published numbers are
probably those of the released form. The L2 norm, not squared, that the code adds to ITD-BiO's inner loss is left out.
The CIFAR images are a lossy copy. ± is a 95 % interval, paired by task in differences, and the wider of that and the
one over seeds. The paper's is not explained. Seconds are those of the processor."""
ESTIMATES = {"by_steps": "Algorithm 1, N = 60", "unrolled": "ITD-BiO", "first_order": "first-order"}


def memory_section(results: Results) -> Section:
    steps, found = results["steps"], results["mib"]
    ours, again, cached = "Algorithm 1", "ANIL, features recomputed", "ANIL, features cached"
    flat = all(abs(slope(row[ours], steps)) < 0.002 * row[ours][0] for row in found.values())
    slopes, saved = (
        [max(kind(row) for row in of) for of in (PUBLISHED_MEMORY.values(), found.values())]
        for kind in (lambda row: abs(slope(row[ours], STEPS)), lambda row: 1 - row[ours][-1] / row[again][-1])
    )
    cause = "against an ANIL that computes its features again in each step, as the published one does"
    if all(cached in row for row in found.values()):
        times = max(row[ours][-1] / row[cached][-1] for row in found.values())
        cause += f"; one that computes them once needs {1 / times:.2f} of it, or in this library the same"
    scale = "5-way 5-shot, 1 task, 32 and 64 filters"
    claims = [
        ["memory flat in the inner steps", *(f"at most {each:.2f} MiB a step" for each in slopes), scale,
         judged(flat, small=False)],
        ["more than half of the memory saved", f"up to {saved[0]:.0%} at K = {steps[-1]}",
         f"up to {saved[1]:.0%}, {cause}", scale,
         judged(saved[1] > 0.5, small=False)],
    ]  # fmt: skip
    shapes = [shape for shape in found if shape in PUBLISHED_MEMORY]
    head, rows = ["peak of a meta-step, MiB (published)"], {method: [method] for method in next(iter(found.values()))}
    for shape in shapes:
        head += [f"{shape}: K = {steps[0]}", f"K = {steps[-1]}", "a step"]
        for method, row in rows.items():
            mib, theirs = found[shape][method], PUBLISHED_MEMORY[shape].get(method)
            row += [f"{mib[0]:.0f}", f"{mib[-1]:.0f}", f"{abs(slope(mib, steps)):.1f}"]
            if theirs:
                beside = f"{theirs[0]:.0f}", f"{theirs[-1]:.0f}", f"{slope(theirs, STEPS):.1f}"
                row[-3:] = [f"{own} ({their})" for own, their in zip(row[-3:], beside, strict=True)]
    return claims, "## Memory\n\n" + table(head, list(rows.values()))


def accuracy_section(name: str, results: Results) -> Section:
    found, published, times = by_method(results), PUBLISHED_ACCURACY[name], PUBLISHED_SECONDS[name]
    title = name.removeprefix("accuracy_").upper().replace("_", "-")
    target, seconds = reached({each: learned(rows) for each, rows in found.items()})
    claims, base = [], found.get("ANIL", [])
    scale = f"{STEPS_OF_ALL:,} steps of {TASKS_PER_BATCH} tasks, {FILTERS} filters, strides"
    gap = f"{float(published['Algorithm 1']) - float(published['ANIL']):+.2f} points"
    for each, words in ((PRINTED, "as printed"), ("Algorithm 1", "as released, without the L2 term")):
        if both := {row["seed"] for row in found.get(each, [])} & {row["seed"] for row in base}:
            seeds = f"{len(both)} seed{'s' * (len(both) > 1)}"
            for key, tested, theirs in (("head only", "as published", gap), ("accuracies", "as each adapts", "–")):
                apart, half = seen(found[each], key, base)
                claims.append([
                    f"{title}: accuracy kept, against ANIL; {words}, tested {tested}", theirs,
                    f"{apart:+.2f} ± {half:.2f} points", f"{scale}, {seeds}",
                    judged(verdict_of(apart, half)) if len(both) > 1 else "open",
                ])  # fmt: skip
    order = [each for each in (PRINTED, "ANIL", "ITD-BiO") if each in found]
    known = {each: seconds[each] for each in order if seconds[each] is not None}
    theirs = ", ".join(f"{each} {times[each]}" for each in ("Algorithm 1", "ANIL", "ITD-BiO"))
    first = min(known, key=known.__getitem__) if known else "none"
    claims.append([f"{title}: Algorithm 1 is first at {SHARE:g} of the best", f"seconds: {theirs}", f"first: {first}",
                   scale, "open"])  # fmt: skip
    rows = []
    for method, mine in found.items():
        cells = ["{:.2f} ± {:.2f}".format(*seen(mine, key)) for key in ("head only", "accuracies")]
        mean = 100 * np.mean([row["nearest class mean"] for row in mine])
        when = "never" if seconds[method] is None else f"{seconds[method]:.0f}"
        known_as = "Algorithm 1" if method == PRINTED else method
        rows.append([method, str(len(mine)), *cells, f"{mean:.2f}", published[known_as], when, times[known_as]])
    head = ["method", "seeds", "head only, 20 steps, as published", "as the method adapts", "nearest class mean",
            "published", f"seconds to {target:.1%} in validation", "published"]  # fmt: skip
    pixels = 100 * np.mean([row["pixels"] for row in results["rows"]])
    return claims, f"## {title}, 5-way 5-shot\n\n{table(head, rows)}\n\nNearest neighbour on pixels: {pixels:.2f}."


def convergence_section(title: str, results: Results) -> Section:
    ends = {case: norms[-1] for case, norms in results["descent"].items()}
    warm, cold = (max(end for case, end in ends.items() if case.endswith(kind)) for kind in ("warm", "cold"))
    here = f"squared at most {warm:.0e} with warm starts, up to {cold:.2g} with cold ones"
    claims = [[f"all tasks in each batch: the gradient vanishes ({title})", "stationary, by warm starts", here,
               "12 tasks", judged(warm < 1e-5)]]  # fmt: skip
    rows = [[case, f"{value:.1e}"] for case, value in ends.items()]
    text = table(["recurring tasks", "squared true gradient at the end"], rows)
    if results["plateau"]:
        batches = np.log([int(batch) for batch in results["plateau"]])
        power = float(np.polyfit(batches, np.log(list(results["plateau"].values())), 1)[0])
        name = f"random batches: a plateau like 1/abs(B) ({title})"
        claims.append(
            [name, "power -1", f"power {power:.2f}", "small problems", judged(abs(power + 1) < 0.1 or "open")]
        )
        scaled = [[batch, f"{int(batch) * value:.3g}"] for batch, value in results["plateau"].items()]
        text += "\n\n" + table(["tasks a batch", "plateau times |B|"], scaled)
    return claims, f"## Convergence: {title}\n\n{text}"


def heads_section(results: Results) -> Section:
    head = ["relative error", *(f"K = {steps}" for steps in results["inner_steps"])]
    cells = [[name, *(f"{value:.2g}" for value in results[key])] for key, name in ESTIMATES.items()]
    last = f"at N = {results['iterations'][-1]}"
    solutions = [
        [penalty, f"{seen['solution_norm'][-1]:.2g}", f"{seen['residual'][-1]:.2g}"]
        for penalty, seen in results["penalties"].items()
    ]
    return [], (
        f"## Heads, L2 weight {results['l2']:g}, inner rate {results['lr']:g}\n\n{table(head, cells)}\n\n"
        "On the features of an untrained backbone, two tasks. Without the L2 term, as in the authors' code, the system "
        "is singular, and few iterations are what keeps the estimate bounded.\n\n"
        + table(["L2 weight", f"norm of v {last}", f"residual {last}"], solutions)
    )


def page(found: dict[str, Results]) -> str:
    sections = {
        "memory": memory_section,
        **{name: partial(accuracy_section, name) for name in PUBLISHED_ACCURACY},
        "quadratic": partial(convergence_section, "a quadratic"),
        "logistic": partial(convergence_section, "logistic heads of CIFAR-FS tasks, on 16 principal components"),
        "heads": heads_section,
    }
    how = "`python experiments/memory_reduced/run.py --threads 1`"
    return page_of(HEADER, sections, found, how)


PARTS = {
    "memory": Part(measure_memory, draw_memory, quick_memory),
    "accuracy_cifar_fs": Part(
        partial(accuracy, "accuracy_cifar_fs", il.tasks.cifar_fs), draw_accuracy, quick_accuracy, grows=True
    ),
    "accuracy_fc100": Part(partial(accuracy, "accuracy_fc100", il.tasks.fc100), draw_accuracy, None, grows=True),
    "quadratic": Part(measure_quadratic, draw_convergence, quick_quadratic),
    "logistic": Part(measure_logistic, draw_convergence, quick_logistic),
    "heads": Part(measure_heads, draw_heads, quick_heads),
}

if __name__ == "__main__":
    run(__doc__, FOLDER, PARTS, page)
