"""Adaptation of part of the parameters (Ji, Lee, Liang and Poor, arXiv 2006.09486): do more inner steps N help?

    python experiments/anil_convergence/run.py [--quick] [--only convex ...]

Claims of the abstract: where the inner loss is strongly convex, training converges faster with larger N; where it is
not convex, slower. The paper's constants, inner rates, penalty weight and figures' values are not known to us, so
directions alone can be compared; the settings are ours. Parts:

convex: the head is the last linear layer, its inner loss has a squared L2 term; FC100 5-way 5-shot.
nonconvex: the head is two layers with a ReLU between them, without an L2 term; the same tasks; at one inner
    rate for all N, and at a rate that falls like 1/N, as the theory of multi-step MAML wants it.
decay: how much of the query gradient is left at the head's start, on real features, against (1 - alpha mu)^N.
geometry: ANIL on a quadratic whose inner Hessian has, or has not, a negative eigenvalue.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import COLOURS, Part, Results, in_turns, made, run, table

import innerloop as il
from innerloop.tasks import TaskSource
from innerloop.training import Diverged

FOLDER = Path(__file__).parent
FILTERS, HIDDEN, TASKS_PER_BATCH, OUTER_LR = 16, 32, 4, 1e-3
CONVEX, NONCONVEX, SEEDS = (1, 3, 5, 7, 10), (1, 5, 10, 20), 3
CONVEX_LR, PENALTY = 0.1, 0.1
NONCONVEX_LR = ((0.5, False), (0.5, True))  # and whether it falls like 1/N


# --- training curves ------------------------------------------------------------------------------


def network(tasks: TaskSource, filters: int, deep: bool) -> nn.Module:
    """A Conv4, whose head has two layers where ``deep``."""
    model = il.models.Conv4(in_channels=tasks.input_shape[0], ways=tasks.output_size, filters=filters)
    if not deep:
        return model
    width = model.head.in_features
    hidden = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU())
    return nn.Sequential(
        OrderedDict(model[:-1].named_children(), hidden=hidden, head=nn.Linear(HIDDEN, tasks.output_size))
    )


def learner(tasks: TaskSource, filters: int, deep: bool, lr: float, steps: int, seed: int) -> il.MetaLearner:
    """ANIL; the network depends on the seed alone, not on the inner loop."""
    torch.manual_seed(seed)
    adapts = il.Named("hidden.*", "head.*") if deep else il.Head()
    inner = il.SGD(lr=lr, steps=steps, weight_decay=0.0 if deep else PENALTY)
    return il.MetaLearner(network(tasks, filters, deep), adapts, inner)


def training_loss(tasks: TaskSource, learner: il.MetaLearner, outer_steps: int) -> list[float | None]:
    """Query loss of each outer step's batch; None from where training diverged."""
    losses: list[float | None] = []

    def log(record: dict) -> None:
        losses.append(round(record["loss"], 4))

    adam = torch.optim.Adam(learner.parameters(), lr=OUTER_LR)
    try:
        il.fit(
            learner, tasks, steps=outer_steps, tasks_per_batch=TASKS_PER_BATCH, optimizer=adam, validation_tasks=0,
            progress=False, log=log,
        )  # fmt: skip
    except Diverged:
        losses += [None] * (outer_steps - len(losses))
    return losses


def paces(tasks: TaskSource, counts: Sequence[int], deep: bool, filters: int, rounds: int = 15) -> dict[str, float]:
    """Median seconds of a meta-step for every N."""
    batch = tasks.batch("train", 0, TASKS_PER_BATCH)
    learners = {str(count): learner(tasks, filters, deep, 0.01, count, seed=0) for count in counts}
    return in_turns({count: partial(timed.meta_step, batch) for count, timed in learners.items()}, rounds)


def curves(
    sources: Sequence[TaskSource],
    counts: Sequence[int],
    rates: Sequence[tuple[float, bool]],
    deep: bool,
    outer_steps: int,
    filters: int,
) -> Results:
    """Training curves of every N over the seeds, for each inner rate.

    The n-th seed's batches and first weights are the same for all of them.
    """
    found: Results = {"rates": []}
    for lr, falling in rates:
        case: Results = {"name": f"{lr:g} / N" if falling else f"{lr:g}", "curves": {}}
        case["seconds"] = paces(sources[0], counts, deep, filters)
        for count in counts:
            rate = lr / count if falling else lr
            case["curves"][str(count)] = [
                training_loss(tasks, learner(tasks, filters, deep, rate, count, seed), outer_steps)
                for seed, tasks in enumerate(sources)
            ]
            final = smooth(case["curves"][str(count)])[:, -1].round(3)
            print(f"  inner rate {case['name']}, N = {count}: final loss {final}", flush=True)
        found["rates"].append(case)
    return found


def smooth(losses: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Mean over the last tenth of training before each step, ``[seeds, steps - window + 1]``; NaN once diverged."""
    values = np.array(losses, dtype=float)
    window = max(1, values.shape[1] // 10)
    return np.lib.stride_tricks.sliding_window_view(values, window, axis=1).mean(-1)


def summary(found: Results) -> dict[int, Results]:
    """For every N: the final loss, and steps and seconds until the loss that every run reaches in the end."""
    smoothed = {int(count): smooth(losses) for count, losses in found["curves"].items()}
    level = max(float(np.nanmax(curve[:, -1])) for curve in smoothed.values())
    rows = {}
    for count, curve in smoothed.items():
        window = len(found["curves"][str(count)][0]) - curve.shape[1] + 1
        reached = np.where(np.isnan(curve[:, -1]), np.nan, (curve <= level).argmax(1) + window)
        rows[count] = {
            "final": curve[:, -1], "steps": reached, "seconds": reached * found["seconds"][str(count)], "level": level
        }  # fmt: skip
    return rows


def spread(values: np.ndarray, form: str) -> str:
    """Mean and standard deviation over the seeds."""
    if np.isnan(values).any():
        return f"{int(np.isnan(values).sum())} of {len(values)} diverged"
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def fc100(arguments: Namespace) -> list[TaskSource]:
    """One stream of tasks a seed."""
    return [il.tasks.fc100(ways=5, shots=5, queries=5, seed=seed, data=arguments.data) for seed in range(SEEDS)]


def measure_convex(arguments: Namespace) -> Results:
    return curves(fc100(arguments), CONVEX, [(CONVEX_LR, False)], False, outer_steps=150, filters=FILTERS)


def measure_nonconvex(arguments: Namespace) -> Results:
    return curves(fc100(arguments), NONCONVEX, NONCONVEX_LR, True, outer_steps=100, filters=FILTERS)


def quick_convex(arguments: Namespace) -> Results:
    found = curves([il.tasks.glyphs(5, 5, 5)], (1, 7), [(CONVEX_LR, False)], False, outer_steps=25, filters=4)
    final = {count: float(row["final"][0]) for count, row in summary(found["rates"][0]).items()}
    assert final[7] < final[1] - 0.05, f"strongly convex head: N = 7 should train faster than N = 1, losses {final}"
    return found


def quick_nonconvex(arguments: Namespace) -> Results:
    found = curves([il.tasks.glyphs(5, 5, 5)], (1, 20), [(2.0, False)], True, outer_steps=20, filters=4)
    final = {count: float(row["final"][0]) for count, row in summary(found["rates"][0]).items()}
    assert final[20] > final[1] + 0.05, f"two-layer head: N = 20 should train slower than N = 1, losses {final}"
    return found


def draw_curves(results: Results) -> Figure:
    """Loss against steps and against seconds; a row an inner rate."""
    cases = results["rates"]
    figure = Figure(figsize=(9, 0.6 + 2.7 * len(cases)), layout="constrained")
    grid = figure.subplots(len(cases), 2, squeeze=False, sharex="col", sharey=True)
    for case, row in zip(cases, grid, strict=True):
        for (count, losses), colour in zip(case["curves"].items(), COLOURS, strict=False):
            curve = smooth(losses)
            steps = np.arange(curve.shape[1]) + len(losses[0]) - curve.shape[1] + 1
            for axes, x in zip(row, (steps, steps * case["seconds"][count]), strict=True):
                axes.plot(x, curve.mean(0), color=colour, label=f"N = {count}")
                axes.fill_between(x, curve.min(0), curve.max(0), color=colour, alpha=0.12, linewidth=0)
        row[0].set(ylabel="training query loss", title=f"inner rate {case['name']}")
    grid[-1, 0].set(xlabel="outer steps")
    grid[-1, 1].set(xlabel="seconds of meta-steps")
    grid[0, 0].set_ylim(top=min(grid[0, 0].get_ylim()[1], 2.2))  # guessing is at log 5 = 1.6; above, it goes astray
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


# --- decay of the head's gradient -----------------------------------------------------------------


def features(learner: il.MetaLearner, batch: il.Task) -> list[il.Task]:
    """The tasks of a batch with features in place of images, in float64."""
    backbone = learner.model[:-1]
    with torch.no_grad():
        return [
            il.Task(*((backbone(inputs[task]).double(), targets[task]) for inputs, targets in batch))
            for task in range(len(batch.support[1]))
        ]


def head_loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(F.linear(batch[0], params["weight"], params["bias"]), batch[1])


def norm(tree: dict[str, Tensor]) -> float:
    return float(torch.cat([value.flatten() for value in tree.values()]).norm())


def decay(
    tasks: TaskSource, outer_steps: int, filters: int, penalties: Sequence[float], counts: Sequence[int]
) -> Results:
    """Norm of the exact gradient at the head's start over that of the query gradient at its end."""
    anil = learner(tasks, filters, False, CONVEX_LR, 5, seed=0)
    training_loss(tasks, anil, outer_steps)
    heads = {name: value.detach().double() for name, value in anil.model.head.named_parameters()}
    problem = il.Problem(lambda meta: meta, head_loss, head_loss)
    of_tasks = features(anil, tasks.batch("test", 0, 4))
    rows = [F.pad(task.support[0], (0, 1), value=1.0) for task in of_tasks]
    # the softmax contributes at most 1/2 to any eigenvalue of the cross-entropy's Hessian
    largest = max(float(torch.linalg.matrix_norm(row, 2).square() / len(row) / 2) for row in rows)
    found: Results = {"smoothness": largest, "outer_steps": outer_steps, "penalties": {}}
    for penalty in penalties:
        rate = 1 / (largest + penalty)
        row: Results = {"steps": list(counts), "bound": [(1 - rate * penalty) ** count for count in counts]}
        for name in ("left", "norm"):
            row[name] = []
        for count in counts:
            inner = il.SGD(lr=rate, steps=count, weight_decay=penalty)
            norms = []
            for task in of_tasks:
                result = il.hypergradient(problem, heads, task, inner)
                query = torch.func.grad(head_loss)(result.params, {}, task.query)
                norms.append((norm(result.grad), norm(query)))
            row["left"].append(float(np.mean([start / end for start, end in norms])))
            row["norm"].append(float(np.mean([start for start, _ in norms])))
        found["penalties"][str(penalty)] = row
    return found


def measure_decay(arguments: Namespace) -> Results:
    counts = (1, 3, 10, 30, 100, 300, 1000)
    return decay(fc100(arguments)[0], 100, 32, (0.0, 0.1, 1.0, 3.0), counts)


def quick_decay(arguments: Namespace) -> Results:
    found = decay(il.tasks.glyphs(5, 5, 5), 5, 4, (0.0, 1.0), (1, 10, 60))
    flat, convex = (found["penalties"][name] for name in ("0.0", "1.0"))
    assert all(left <= bound for left, bound in zip(convex["left"], convex["bound"], strict=True)), (
        f"the head's gradient should shrink at least like (1 - alpha mu)^N: {convex}"
    )
    assert flat["left"][-1] > 3 * convex["left"][-1], f"without a penalty it should not vanish: {found['penalties']}"
    return found


def draw_decay(results: Results) -> Figure:
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for (penalty, row), colour in zip(results["penalties"].items(), COLOURS, strict=False):
        axes.plot(row["steps"], row["left"], "o-", color=colour, label=f"L2 weight {float(penalty):g}")
        axes.plot(row["steps"], row["bound"], "--", color=colour, linewidth=1)
    axes.plot([], [], "--", color="black", linewidth=1, label=r"$(1-\alpha\mu)^N$, $\mu$ = L2 weight")
    lowest = min(min(row["left"]) for row in results["penalties"].values())
    axes.set(xscale="log", yscale="log", xlabel="inner steps N", ylabel="|gradient at the start| / |at the end|")
    axes.set(ylim=(max(lowest, 1e-12) / 3, 2))
    figure.legend(loc="outside right center")
    return figure


# --- geometry -------------------------------------------------------------------------------------

GEOMETRIES = {"H in [-1, 4]": -1.0, "H in [0.4, 4]": 0.4}
SMOOTHNESS, COUNT, HEADS, PHIS, RATE = 4.0, 12, 8, 6, 0.25
DIVERGED = 1e6


def draw_normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quadratic_inner(params: dict[str, Tensor], meta: dict[str, Tensor], support: tuple[Tensor, ...]) -> Tensor:
    """``rate (w'H w / 2 - (J phi + c)'w)``: the inner rate is the task's own, so that all cases run as one batch."""
    hessian, mixed, shift, rate = support
    w = params["w"]
    return rate * (w @ hessian @ w / 2 - (mixed @ meta["phi"] + shift) @ w)


def quadratic_outer(params: dict[str, Tensor], meta: dict[str, Tensor], query: Tensor) -> Tensor:
    return (params["w"] - query).square().sum() / 2


def geometry(counts: Sequence[int], outer_steps: int) -> Results:
    """Outer loss of ANIL with plain gradient descent outside, for both spectra and both inner rates."""
    basis = torch.linalg.qr(draw_normal(COUNT, HEADS, HEADS, seed=0)).Q
    mixed, shift, query = draw_normal(COUNT, HEADS, PHIS, seed=1) / 4, *draw_normal(2, COUNT, HEADS, seed=2) / 2
    problem = il.Problem(lambda meta: {"w": meta["w"]}, quadratic_inner, quadratic_outer)
    hessians = torch.stack(
        [basis @ torch.linspace(low, SMOOTHNESS, HEADS).double().diag() @ basis.mT for low in GEOMETRIES.values()]
    )
    found: Results = {
        "counts": list(counts),
        "losses": {f"{name}, {rate}": {} for name in GEOMETRIES for rate in ("1/L", "1/(N L)")},
    }
    for count in counts:
        rates = torch.tensor([1 / SMOOTHNESS, 1 / (count * SMOOTHNESS)]).double()
        # cases, tasks: the spectra outside, the rates inside
        cases = hessians.repeat_interleave(2, 0), rates.repeat(2)[:, None].expand(-1, COUNT)
        task = il.Task(
            (cases[0], mixed.expand(4, *mixed.shape), shift.expand(4, *shift.shape), cases[1]),
            query.expand(4, *query.shape),
        )
        meta = {"w": draw_normal(HEADS, seed=4).expand(4, -1), "phi": draw_normal(PHIS, seed=5).expand(4, -1)}

        def step(meta: dict[str, Tensor], task: il.Task, count: int = count) -> tuple[dict[str, Tensor], Tensor]:
            result = il.hypergradient(problem, meta, task, il.SGD(lr=1.0, steps=count))
            return result.grad, result.loss

        losses = []
        for _ in range(outer_steps):
            grad, loss = torch.func.vmap(torch.func.vmap(step, (None, 0)))(meta, task)
            losses.append(loss.mean(1))
            meta = {name: value - RATE * grad[name].mean(1) for name, value in meta.items()}
        for case, row in zip(found["losses"].values(), torch.stack(losses).T.tolist(), strict=True):
            case[str(count)] = [loss if loss < DIVERGED else None for loss in row]
    return found


def measure_geometry(arguments: Namespace) -> Results:
    return geometry((1, 3, 7, 15, 30), outer_steps=300)


def quick_geometry(arguments: Namespace) -> Results:
    found = geometry((1, 15), outer_steps=12)
    last = {case: {count: losses[-1] for count, losses in rows.items()} for case, rows in found["losses"].items()}
    assert last["H in [-1, 4], 1/L"]["15"] is None, f"15 steps of 1/L along negative curvature should diverge: {last}"
    assert all(loss is not None for case in list(last)[1:] for loss in last[case].values()), f"should converge: {last}"
    return found


def draw_geometry(results: Results) -> Figure:
    figure = Figure(figsize=(9, 5.4), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    for (case, rows), axes in zip(results["losses"].items(), grid.flat, strict=True):
        for (count, losses), colour in zip(rows.items(), COLOURS, strict=False):
            axes.plot(np.array(losses, dtype=float), color=colour, label=f"N = {count}")
        spectrum, _, rate = case.rpartition(", ")
        axes.set(title=f"{spectrum}, inner rate {rate}", yscale="log", ylim=(0.3, 1e3))
    for axes in grid[-1]:
        axes.set(xlabel="outer steps")
    for axes in grid[:, 0]:
        axes.set(ylabel="outer loss")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside right center")
    return figure


# --- page -----------------------------------------------------------------------------------------

HEADER = """# Adaptation of part of the parameters: do more inner steps help? (arXiv 2006.09486)

**What differs from the paper.** Its inner rates, penalty and plotted values are not known to us, so only the directions
that its abstract claims can be compared. Settings are ours: Conv4 with {filters} filters, {tasks} tasks a batch,
{seeds} seeds, short runs, one thread of a CPU; the images of FC100 are a lossy copy. A seed's batches and first weights
are the same for every N. Loss: query loss in training, mean over a tenth of the run. ±: standard deviation over seeds.
"""


def verdict(rows: dict[int, Results], claim: str) -> str:
    """Which N was fastest, and whether that is what the paper claims: ``"faster"`` or ``"slower"`` with larger N."""
    kept = {count: row for count, row in rows.items() if np.isfinite(row["steps"]).all()}
    steps, seconds, final = (
        {count: float(row[what].mean()) for count, row in kept.items()} for what in ("steps", "seconds", "final")
    )
    lowest, highest, fastest = min(kept), max(kept), min(steps, key=steps.__getitem__)
    ratio = steps[highest] / steps[lowest]
    if not (ratio < 0.9 if claim == "faster" else ratio > 1.1 or len(kept) < len(rows)):
        outcome = "does not hold here"
    elif fastest == (highest if claim == "faster" else lowest):
        outcome = "holds"
    else:
        outcome = f"holds {'up to' if claim == 'faster' else 'from'} N = {fastest}{'' if claim == 'faster' else ' on'}"
    diverged = ", ".join(str(count) for count in rows if count not in kept)
    return (
        f'"{claim.capitalize()} with larger N" {outcome}: to the loss that all runs reach N = {lowest} takes '
        f"{steps[lowest]:.0f} outer steps, N = {highest} takes {steps[highest]:.0f}. Fewest seconds: N = "
        f"{min(seconds, key=seconds.__getitem__)}. Lowest final loss: N = {min(final, key=final.__getitem__)}."
        + (f" Diverged: N = {diverged}." if diverged else "")
    )


def section(title: str, name: str, results: Results, claim: str) -> list[str]:
    parts = [f"## {title}\n"]
    for case in results["rates"]:
        rows = summary(case)
        level = next(iter(rows.values()))["level"]
        parts.append(f"Inner rate {case['name']}. {verdict(rows, claim)}\n")
        head = ["N", "s a meta-step", "final loss", f"outer steps to loss {level:.3f}", "seconds to it"]
        cells = [
            [
                str(count),
                f"{case['seconds'][str(count)]:.3f}",
                spread(row["final"], ".3f"),
                spread(row["steps"], ".0f"),
                spread(row["seconds"], ".1f"),
            ]
            for count, row in rows.items()
        ]
        parts.append(table(head, cells) + "\n")
    parts.append(f"![training loss]({name}.png)\n")
    return parts


def page(found: dict[str, Results]) -> str:
    parts = [HEADER.format(filters=FILTERS, tasks=TASKS_PER_BATCH, seeds=SEEDS)]
    if "convex" in found:
        title = f"Strongly convex inner loss: last layer, L2 weight {PENALTY:g} (claimed: faster with larger N)"
        parts += section(title, "convex", found["convex"], "faster")
    if "nonconvex" in found:
        title = "Nonconvex inner loss: two layers, no penalty (claimed: slower with larger N)"
        parts += section(title, "nonconvex", found["nonconvex"], "slower")
    if "decay" in found:
        rows = found["decay"]["penalties"]
        worst = max(
            left / bound for row in rows.values() for left, bound in zip(row["left"], row["bound"], strict=True)
        )
        parts.append("## What is left of the query gradient at the head's start\n")
        parts.append(
            f"Inner rate 1/L, L = {found['decay']['smoothness']:.0f}; features after "
            f"{found['decay']['outer_steps']} outer steps, four test tasks. What is left is at most "
            f"{worst:.3g} times (1 - alpha mu)^N: the bound {'holds' if worst <= 1 + 1e-9 else 'is broken'}.\n"
        )
        head = ["L2 weight", *(f"N = {count}" for count in next(iter(rows.values()))["steps"])]
        cells = [
            [
                f"{float(name):g}",
                *(f"{left:.2g} (≤ {bound:.2g})" for left, bound in zip(row["left"], row["bound"], strict=True)),
            ]
            for name, row in rows.items()
        ]
        parts.append(table(head, cells) + "\n\n![decay](decay.png)\n")
    if "geometry" in found:
        counts = found["geometry"]["counts"]
        parts.append("## Curvature alone: ANIL on 12 quadratic tasks, plain gradient descent outside\n")
        head = ["outer loss at the end", *(f"N = {count}" for count in counts)]
        cells = [
            [case, *("diverges" if losses[-1] is None else f"{losses[-1]:.2f}" for losses in rows.values())]
            for case, rows in found["geometry"]["losses"].items()
        ]
        parts.append(table(head, cells) + "\n")
        parts.append(
            "Along negative curvature N steps at 1/L grow like 1.25^N; at 1/(N L) they stay bounded. With a strongly "
            "convex inner loss any N converges.\n\n![geometry](geometry.png)\n"
        )
    parts += ["```\npython experiments/anil_convergence/run.py --threads 1\n```\n", made(found) + "\n"]
    return "\n".join(parts)


PARTS = {
    "convex": Part(measure_convex, draw_curves, quick_convex),
    "nonconvex": Part(measure_nonconvex, draw_curves, quick_nonconvex),
    "decay": Part(measure_decay, draw_decay, quick_decay),
    "geometry": Part(measure_geometry, draw_geometry, quick_geometry),
}

if __name__ == "__main__":
    run(__doc__, FOLDER, PARTS, page)
