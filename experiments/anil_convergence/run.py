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

import math
import sys
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Part, Results, Section, higher_of, in_turns, judged, page_of, run

import innerloop as il
from innerloop.errors import Diverged
from innerloop.reporting import table
from innerloop.reporting.figures import DASHED, DOTTED, MARKED, Line, Panel, panels
from innerloop.tasks import TaskSource

FOLDER = Path(__file__).parent
WAYS, FILTERS, HIDDEN, TASKS_PER_BATCH, OUTER_LR = 5, 16, 32, 4, 1e-3
CONVEX, NONCONVEX, SEEDS = (1, 3, 5, 7, 10), (1, 5, 10, 20), 3
CONVEX_LR, PENALTY = 0.1, 0.1
NONCONVEX_LR = ((0.5, False), (0.5, True))  # and whether it falls like 1/N
WINDOW, LAST = 5, 10  # outer steps that a point of a curve and a final loss are the mean of
GUESSING = math.log(WAYS)
STYLES = ["-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1))]


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


def training_loss(
    tasks: TaskSource, learner: il.MetaLearner, outer_steps: int, outer_lr: float = OUTER_LR
) -> list[float | None]:
    """Query loss of each outer step's batch; None from where training diverged."""
    losses: list[float | None] = []

    def log(record: dict) -> None:
        losses.append(round(record["loss"], 4))

    adam = torch.optim.Adam(learner.parameters(), lr=outer_lr)
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
    outer_lr: float = OUTER_LR,
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
                training_loss(tasks, learner(tasks, filters, deep, rate, count, seed), outer_steps, outer_lr)
                for seed, tasks in enumerate(sources)
            ]
            final = final_losses(case["curves"][str(count)]).round(3)
            print(f"  inner rate {case['name']}, N = {count}: final loss {final}", flush=True)
        found["rates"].append(case)
    return found


def smooth(losses: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Mean over the last steps before each, ``[seeds, steps - WINDOW + 1]``; NaN once diverged."""
    return np.lib.stride_tricks.sliding_window_view(np.array(losses, dtype=float), WINDOW, axis=1).mean(-1)


def final_losses(losses: Sequence[Sequence[float | None]]) -> np.ndarray:
    """Of each seed."""
    return np.array(losses, dtype=float)[:, -LAST:].mean(1)


def summary(found: Results) -> tuple[float, dict[int, Results]]:
    """A level of the loss; for every N and seed the final loss, and steps and seconds to the level, infinite if never.

    The level is the highest loss that the worst seed of an N ends at, of those below guessing that no run has at once.
    """
    curves = {int(count): smooth(losses) for count, losses in found["curves"].items()}
    final = {int(count): final_losses(losses) for count, losses in found["curves"].items()}
    ceiling = min(GUESSING, *(float(np.nanmin(curve[:, 0])) for curve in curves.values()))
    level = max((float(each.max()) for each in final.values() if each.max() < ceiling), default=math.nan)
    rows = {}
    for count, curve in curves.items():
        below = curve <= level
        steps = np.where(below.any(1), below.argmax(1) + WINDOW, math.inf)
        rows[count] = {"final": final[count], "steps": steps, "seconds": steps * found["seconds"][str(count)]}
    return level, rows


def spread(values: np.ndarray, form: str) -> str:
    """Mean and standard deviation over the seeds."""
    for of, what in ((np.isnan(values), "diverged"), (np.isinf(values), "never")):
        if of.any():
            return what if of.all() else f"{int(of.sum())} of {len(values)} {what}"
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def fc100(arguments: Namespace) -> list[TaskSource]:
    """One stream of tasks a seed."""
    return [il.tasks.fc100(ways=WAYS, shots=5, queries=5, seed=seed, data=arguments.data) for seed in range(SEEDS)]


def measure_convex(arguments: Namespace) -> Results:
    return curves(fc100(arguments), CONVEX, [(CONVEX_LR, False)], False, outer_steps=150, filters=FILTERS)


def measure_nonconvex(arguments: Namespace) -> Results:
    return curves(fc100(arguments), NONCONVEX, NONCONVEX_LR, True, outer_steps=100, filters=FILTERS)


def quick(deep: bool, counts: Sequence[int], rates: Sequence[tuple[float, bool]]) -> tuple[Results, list[Results]]:
    """A small form of `curves`, and for each rate the final loss by N, in training fast enough for a few seconds."""
    found = curves([il.tasks.glyphs(WAYS, 5, 5)], counts, rates, deep, outer_steps=40, filters=4, outer_lr=1e-2)
    ends = [{count: float(row["final"][0]) for count, row in summary(case)[1].items()} for case in found["rates"]]
    return found, ends


def quick_convex(arguments: Namespace) -> Results:
    found, (final,) = quick(False, (1, 7), [(0.5, False)])
    first = smooth(found["rates"][0]["curves"]["7"])[0, 0]
    assert final[7] < final[1] - 0.2, f"strongly convex head: N = 7 should train faster than N = 1, losses {final}"
    assert final[7] < first - 0.2, f"strongly convex head: N = 7 should train, loss {first} at first, then {final}"
    return found


def quick_nonconvex(arguments: Namespace) -> Results:
    found, (fixed, falling) = quick(True, (1, 20), [(1.0, False), (1.0, True)])
    slower = fixed[1] + 0.05 < fixed[20] < GUESSING
    assert slower, f"two-layer head: N = 20 should train slower than N = 1 at one rate, and still train, losses {fixed}"
    assert falling[20] < fixed[1], f"two-layer head: at a rate that falls like 1/N it should not, losses {falling}"
    assert falling[20] < GUESSING - 0.3, f"two-layer head: N = 20 should train at a small rate, losses {falling}"
    return found


def draw_curves(results: Results) -> Figure:
    """Loss against steps and against seconds; a row an inner rate."""
    shown = []
    for case in results["rates"]:
        smoothed = {count: smooth(losses) for count, losses in case["curves"].items()}
        for label in ("outer steps", "seconds of meta-steps"):
            lines = {}
            for place, (count, curve) in enumerate(smoothed.items()):
                steps = np.arange(curve.shape[1]) + WINDOW
                x = steps * (1 if label == "outer steps" else case["seconds"][count])
                look = {"linestyle": STYLES[place]}
                lines[f"N = {count}"] = Line(x, curve.mean(0), look, curve.min(0), curve.max(0))
            levels = {"guessing": (GUESSING, DOTTED), "level of the table": (summary(case)[0], {"color": "black"})}
            axes = {"xlabel": label, "ylabel": "training query loss", "title": f"inner rate {case['name']}"}
            top = min(2.2, max(float(np.nanmax(curve)) for curve in smoothed.values()))
            shown.append(Panel(lines, axes | {"ylim": (None, top)}, levels))
    return panels(shown, height=3)


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
    lines = {}
    for penalty, row in results["penalties"].items():
        name = f"L2 weight {float(penalty):g}"
        lines[name] = Line(row["steps"], row["left"], MARKED)
        lines[f"_{name}"] = Line(row["steps"], row["bound"], DASHED)
    lines[r"$(1-\alpha\mu)^N$, $\mu$ = L2 weight"] = Line([], [], DASHED | {"color": "black"})
    lowest = min(min(row["left"]) for row in results["penalties"].values())
    axes = {"xlabel": "inner steps N", "ylabel": "|gradient at the start| / |at the end|"}
    scales = {"xscale": "log", "yscale": "log", "ylim": (max(lowest, 1e-12) / 3, 2)}
    return panels([Panel(lines, axes | scales)], width=6)


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
    shown = []
    for case, rows in results["losses"].items():
        lines = {}
        for place, (count, losses) in enumerate(rows.items()):
            # from thick to thin, so that lines on one another can be told apart; one that diverges ends with a cross
            kept = [loss for loss in losses if loss is not None]
            look = {"linestyle": STYLES[place], "linewidth": 5 - 0.9 * place, "markersize": 8}
            look |= {"marker": "x", "markevery": [len(kept) - 1]} if len(kept) < len(losses) else {}
            lines[f"N = {count}"] = Line(range(1, len(kept) + 1), kept, look)
        axes = {"xscale": "log", "yscale": "log", "xlabel": "outer step", "ylabel": "outer loss"}
        axes |= {} if gone(rows) else {"ylim": (0.5, 7)}
        axes["title"] = "{}, inner rate {}".format(*case.rsplit(", ", 1))
        shown.append(Panel(lines, axes, ticks={"y": "{:g}".format}))
    return panels(shown, height=3)


def gone(rows: Results) -> list[str]:
    """The N that diverged."""
    return [count for count, losses in rows.items() if losses[-1] is None]


# --- page -----------------------------------------------------------------------------------------

HEADER = f"""# Adaptation of part of the parameters: do more inner steps help? (arXiv 2006.09486)

**What differs from the paper.** Only an abstract could be read: inner rates, penalty and plotted values are not known,
and only directions can be compared. Settings are ours: Conv4 with {FILTERS} filters, {TASKS_PER_BATCH} tasks a
batch, {SEEDS} seeds; the images of FC100 are a lossy copy. A seed's batches and first weights do not depend on N."""
TRAINING = f"""Loss: query loss in training, mean over {WINDOW} outer steps, over {LAST} at the end. Level: the highest
loss that an N ends at in its worst seed, of those below guessing ({GUESSING:.3f}) that no run has in its first {WINDOW}
steps. ±: standard deviation over the seeds."""
FORGET = f""" L2 weight ({PENALTY:g}) and rate contract the inner loop by
{100 * (1 - (1 - CONVEX_LR * PENALTY) ** max(CONVEX)):.0f} % in {max(CONVEX)} steps, too little to forget its start: the
likely reason where even the largest N gains."""


def rises(values: Sequence[float]) -> bool:
    return all(one <= other for one, other in pairwise(values))


def curves_section(deep: bool, results: Results) -> Section:
    claims, rows = [], []
    outer = len(next(iter(results["rates"][0]["curves"].values()))[0])
    for case in results["rates"]:
        level, of_counts = summary(case)
        steps, seconds = (
            {count: float(row[what].mean()) for count, row in of_counts.items()} for what in ("steps", "seconds")
        )
        listed = ", ".join("never" if math.isinf(value) else f"{value:.0f}" for value in steps.values())
        here = f"outer steps to a loss of {level:.3f}: {listed} (N = {', '.join(map(str, steps))})"
        few, many = min(of_counts), max(of_counts)
        apart = list(of_counts[few]["final"] - of_counts[many]["final"])  # of each seed, above 0 where many are faster
        scale = f"FC100 5-way 5-shot, {outer} steps of {TASKS_PER_BATCH} tasks, {FILTERS} filters, {len(apart)} seeds"
        if deep:
            claim = f"nonconvex inner loss: slower with larger N; rate {case['name']}"
            claims.append([claim, "slower", here, scale, higher_of([-each for each in apart])])
        else:
            claims.append(["strongly convex inner loss: faster with larger N", "faster", here, scale, higher_of(apart)])
            cheapest = min(seconds, key=seconds.__getitem__)
            moderate = min((each for each in seconds if each not in (few, many)), key=seconds.__getitem__, default=many)
            saved = list(of_counts[many]["seconds"] - of_counts[moderate]["seconds"])
            claim = "the same: a moderate N costs least in all (a third party's summary of the paper)"
            known = len(saved) > 1 and np.isfinite(saved).all()
            claims.append(
                [claim, "moderate", f"least seconds: N = {cheapest}", scale, higher_of(saved) if known else "open"]
            )
        rows += [
            [case["name"], str(count), f"{case['seconds'][str(count)]:.3f}", spread(row["final"], ".3f"),
             f"{level:.3f}", spread(row["steps"], ".0f"), spread(row["seconds"], ".1f")]
            for count, row in of_counts.items()
        ]  # fmt: skip
    title = f"**Two layers adapt**, without an L2 term, {outer} outer steps. {TRAINING}"
    if not deep:
        title = f"**The last layer adapts**, with an L2 term, {outer} outer steps. {TRAINING}{FORGET}"
    head = ["inner rate", "N", "s a meta-step", "final loss", "level", "outer steps to it", "seconds to it"]
    return claims, f"{title}\n\n{table(head, rows)}"


def decay_section(results: Results) -> Section:
    found = results["penalties"].values()
    worst = max(left / bound for row in found for left, bound in zip(row["left"], row["bound"], strict=True))
    claim = "the gradient at the head's start shrinks at least like (1 - alpha mu)^N (our derivation)"
    here = f"at most {worst:.2f} times that, inner rate 1/L, L = {results['smoothness']:.0f}"
    text = "**What is left of the query gradient at the head's start**, on features after"
    scale = "4 tasks"
    return [[claim, "–", here, scale, judged(worst <= 1 + 1e-9)]], f"{text} {results['outer_steps']} outer steps."


def geometry_section(results: Results) -> Section:
    losses, claims, scale = results["losses"], [], f"{COUNT} quadratics, no noise"
    for spectrum, least in GEOMETRIES.items():
        fixed, falling = (losses[f"{spectrum}, {rate}"] for rate in ("1/L", "1/(N L)"))
        if least < 0:
            claim = "negative curvature: the inner rate must fall like 1/N (2002.07836, of multi-step MAML)"
            here = "diverge: {} at 1/L, {} at 1/(N L)".format(
                *(", ".join(gone(each)) or "none" for each in (fixed, falling))
            )
            claims.append([claim, "1/N", here, scale, judged(bool(gone(fixed)) and not gone(falling))])
        else:
            ends = [each[-1] for each in fixed.values()]
            here = f"outer loss at the end, rate 1/L: {', '.join(f'{end:.2f}' for end in ends)}"
            claim = "strongly convex quadratics: faster with larger N"
            claims.append([claim, "faster", here, scale, judged(rises([-end for end in ends]))])
    rows = [
        [case, *("diverges" if each[-1] is None else f"{each[-1]:.2f}" for each in found.values())]
        for case, found in losses.items()
    ]
    return claims, (
        f"**Curvature alone**: {COUNT} quadratic tasks, gradient descent outside; outer loss at the end. Where the "
        "inner loss is strongly convex every N converges, but to different ends at 1/L: probably because long inner "
        "loops forget the head's start, and fewer parameters are left that matter.\n\n"
        + table(["curvature, inner rate", *(f"N = {count}" for count in results["counts"])], rows)
    )


def page(found: dict[str, Results]) -> str:
    sections = {"convex": partial(curves_section, False), "nonconvex": partial(curves_section, True)}
    sections |= {"decay": decay_section, "geometry": geometry_section}
    how = "`python experiments/anil_convergence/run.py --threads 1`"
    return page_of(HEADER, sections, found, how)


PARTS = {
    "convex": Part(measure_convex, draw_curves, quick_convex),
    "nonconvex": Part(measure_nonconvex, draw_curves, quick_nonconvex),
    "decay": Part(measure_decay, draw_decay, quick_decay),
    "geometry": Part(measure_geometry, draw_geometry, quick_geometry),
}

if __name__ == "__main__":
    run(__doc__, FOLDER, PARTS, page)
