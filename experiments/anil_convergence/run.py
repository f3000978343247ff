"""Adaptation of part of the parameters (Ji, Lee, Liang and Poor, arXiv 2006.09486): do more inner steps N help?

    python experiments/anil_convergence/run.py [--quick] [--only convex ...]

Claims of the abstract: where the inner loss is strongly convex, training converges faster with larger N; where it is
not convex, slower. The paper's constants, inner rates, penalty weight and figures' values are not known to us, so
directions alone can be compared; the settings are ours. Parts:

convex: the head is the last linear layer, its inner loss has a squared L2 term; FC100 5-way 5-shot. Each N has the
    inner rate that a short search prefers; as controls N = 1's rate for all N, and its rate over N, as the theory of
    multi-step MAML wants it.
nonconvex: the same, with two layers as the head and a ReLU between them, without an L2 term.
decay: how much of the query gradient is left at the head's start, on real features, against (1 - alpha mu)^N.
geometry: ANIL on a quadratic whose inner Hessian has, or has not, a negative eigenvalue.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Part, Results, Section, collect, higher_of, judged, page_of, run

import innerloop as il
from innerloop.errors import Diverged
from innerloop.reporting import table
from innerloop.reporting.figures import DASHED, DOTTED, MARKED, Line, Panel, panels
from innerloop.tasks import TaskSource
from innerloop.training.evaluation import evaluate

FOLDER = Path(__file__).parent
WAYS, FILTERS, HIDDEN, TASKS_PER_BATCH, PENALTY = 5, 16, 32, 8, 0.1
WINDOW, LAST = 10, 5  # outer steps that a point of a curve is the mean of, points that a final loss is the mean of
GUESSING = math.log(WAYS)
NUMBERS = "rate", "loss", "accuracy", "seconds a step"
FORMS = {"final loss": ".3f", "steps": ".0f", "seconds": ".1f", "accuracy": ".1%"}
STYLES = ["-", "--", "-.", ":", (0, (3, 1, 1, 1, 1, 1))]


# --- training curves ------------------------------------------------------------------------------


class Scale(NamedTuple):
    """How much of the training parts is measured; the search is for the inner rate of the lowest loss, for every N."""

    counts: Sequence[int] = (1, 3, 5, 7, 10)
    rates: Sequence[float] = (0.15, 0.5, 1.5, 5.0)
    search: int = 100  # outer steps, with the first seed alone
    training: int = 1000
    filters: int = FILTERS
    outer_lr: float = 1e-3
    validation: int = 100  # tasks
    compile: bool = True  # which pays in long trainings


def trained(sources: Sequence[TaskSource], deep: bool, scale: Scale, key: Results, _: list[Results]) -> Results:
    """ANIL, whose first weights depend on the seed alone; the mean loss of each window, None once it diverged."""
    tasks, adapts = sources[key["seed"]], il.Head()
    torch.manual_seed(key["seed"])
    model = il.models.Conv4(in_channels=tasks.input_shape[0], ways=WAYS, filters=scale.filters, downsample="stride")
    if deep:
        hidden = nn.Sequential(nn.Linear(model.head.in_features, HIDDEN), nn.ReLU())
        layers = OrderedDict(model[:-1].named_children(), hidden=hidden, head=nn.Linear(HIDDEN, WAYS))
        model, adapts = nn.Sequential(layers), il.Named("hidden.*", "head.*")
    inner = il.SGD(lr=key["rate"], steps=key["N"], weight_decay=0.0 if deep else PENALTY)
    anil = il.MetaLearner(model, adapts, inner, compile=scale.compile and key["kind"] == "training")
    adam = torch.optim.Adam(anil.parameters(), lr=scale.outer_lr)
    steps, accuracy, losses, clock = getattr(scale, key["kind"]), None, [], [time.process_time()]

    def log(record: dict) -> None:
        losses.append(record["loss"])
        clock.append(time.process_time())

    with suppress(Diverged):
        il.fit(
            anil, tasks, steps=steps, tasks_per_batch=TASKS_PER_BATCH, optimizer=adam, validation_tasks=0,
            progress=False, log=log,
        )  # fmt: skip
        accuracy = evaluate(anil, tasks, "validation", scale.validation).quality
    means = np.reshape(losses + [math.nan] * (steps - len(losses)), (-1, WINDOW)).mean(1)
    return {
        "seconds a step": float(np.median(np.diff([*clock, time.process_time()]))),
        "accuracy": accuracy and round(accuracy, 4),
        "loss": [None if math.isnan(mean) else round(mean, 4) for mean in means.tolist()],
    }


def curves(name: str, sources: Sequence[TaskSource], deep: bool, scale: Scale, arguments: Namespace) -> Results:
    """A search for the inner rate of every N, then all `cases`, seed after seed."""
    measured = partial(trained, sources, deep, scale)
    file, grid = arguments.out / f"{name}.json", product(scale.counts, scale.rates)
    found = collect(file, [{"kind": "search", "N": count, "rate": rate, "seed": 0} for count, rate in grid], measured)
    wanted = [
        {"kind": "training", "N": count, "rate": rate, "seed": seed}
        for seed in range(len(sources))
        for rates in rates_of(found).values()
        for count, rate in rates.items()
    ]
    return collect(file, wanted, measured)


def final(losses: list[float | None] | np.ndarray) -> np.ndarray:
    """The loss at the end of trainings ``[..., windows]``; one that diverged counts as guessing."""
    return np.nan_to_num(np.array(losses, dtype=float)[..., -LAST:].mean(-1), nan=GUESSING)


def rates_of(results: Results) -> dict[str, dict[int, float]]:
    """The inner rates by N in each case, from the search; of a control for the smallest, middle and largest N."""
    searched = [(row["N"], final(row["loss"]), row["rate"]) for row in results["rows"] if row["kind"] == "search"]
    best = {count: rate for count, _, rate in sorted(searched, reverse=True)}  # the lowest loss of an N comes last
    counts = sorted(best)
    few, first = (counts[0], counts[len(counts) // 2], counts[-1]), best[counts[0]]
    return {
        "best rate of each N": {count: best[count] for count in counts},
        f"rate {first:g} / N": {count: float(f"{first / count:.3g}") for count in few},
        f"rate {first:g} for all": dict.fromkeys(few, first),
    }


def cases(results: Results) -> dict[str, dict[int, dict[str, np.ndarray]]]:
    """By case and N what is in the rows: arrays whose first dimension is the seeds that all N have."""
    rows = {(row["N"], row["rate"], row["seed"]): row for row in results["rows"] if row["kind"] == "training"}
    seeds, found = sorted({seed for _, _, seed in rows}), {}
    for name, rates in rates_of(results).items():
        if shared := [seed for seed in seeds if all((*pair, seed) in rows for pair in rates.items())]:
            found[name] = {
                count: {what: np.array([rows[count, rate, seed][what] for seed in shared], float) for what in NUMBERS}
                for count, rate in rates.items()
            }
    return found


def summary(case: dict[int, dict[str, np.ndarray]]) -> tuple[float, dict[int, dict[str, np.ndarray]]]:
    """A level of the loss; for every N what `FORMS` names, ``[seeds]``: steps and seconds to the level, or infinite.

    The level is the highest loss that the worst seed of an N ends at, of those below guessing that no run has at once.
    Losses are means over as many steps on the way as at the end.
    """
    last = min(LAST, *(found["loss"].shape[1] for found in case.values()))
    view = np.lib.stride_tricks.sliding_window_view
    smooth = {count: view(found["loss"], last, 1).mean(-1) for count, found in case.items()}
    ends = {count: final(found["loss"]) for count, found in case.items()}
    ceiling = min(GUESSING, *(float(np.nanmin(curve[:, 0])) for curve in smooth.values()))
    level = max((float(each.max()) for each in ends.values() if each.max() < ceiling), default=math.nan)
    of_counts = {}
    for count, found in case.items():
        below = smooth[count] <= level
        steps = np.where(below.any(1), WINDOW * (below.argmax(1) + last), math.inf)
        values = ends[count], steps, steps * np.median(found["seconds a step"]), found["accuracy"]
        of_counts[count] = dict(zip(FORMS, values, strict=True))
    return level, of_counts


def spread(values: np.ndarray, form: str) -> str:
    """Mean and standard deviation over the seeds."""
    for of, what in ((np.isnan(values), "diverged"), (np.isinf(values), "never")):
        if of.any():
            return what if of.all() else f"{int(of.sum())} of {len(values)} {what}"
    return f"{values.mean():{form}} ± {values.std(ddof=1):{form}}" if len(values) > 1 else f"{values[0]:{form}}"


def measure_curves(name: str, deep: bool, arguments: Namespace) -> Results:
    return curves(name, [fc100(arguments, seed) for seed in range(arguments.seeds)], deep, Scale(), arguments)


def fc100(arguments: Namespace, seed: int = 0) -> TaskSource:
    return il.tasks.fc100(ways=WAYS, shots=5, queries=5, seed=seed, data=arguments.data)


def quick(name: str, deep: bool, arguments: Namespace, **scale: Sequence[float]) -> tuple[Results, list[Results]]:
    """A small form, in training fast enough for a few seconds, and the loss at the end of each case by N."""
    small = Scale(search=20, training=40, filters=4, outer_lr=1e-2, validation=20, compile=False, **scale)
    found = curves(name, [il.tasks.glyphs(WAYS, 5, 5)], deep, small, arguments)
    return found, [{count: float(row["loss"][0, -1]) for count, row in case.items()} for case in cases(found).values()]


def quick_convex(arguments: Namespace) -> Results:
    found, (_, _, one) = quick("convex", False, arguments, counts=(1, 7), rates=(0.5,))
    assert one[7] < one[1] - 0.2, f"strongly convex head: N = 7 should train faster than N = 1, losses {one}"
    assert one[7] < GUESSING - 0.3, f"strongly convex head: N = 7 should train, losses {one}"
    return found


def quick_nonconvex(arguments: Namespace) -> Results:
    found, (best, falling, one) = quick("nonconvex", True, arguments, counts=(1, 20), rates=(0.1, 2.0))
    rates = rates_of(found)["best rate of each N"]
    assert rates == {1: 2.0, 20: 0.1}, f"two-layer head: N = 20 should train best at the smaller rate, not {rates}"
    slower = one[1] + 0.05 < one[20] < GUESSING
    assert slower, f"two-layer head: N = 20 should train slower than N = 1 at one rate, and still train, losses {one}"
    assert falling[20] < one[1], f"two-layer head: at a rate that falls like 1/N it should not, losses {falling}"
    assert best[20] < GUESSING - 0.3, f"two-layer head: N = 20 should train at its best rate, losses {best}"
    return found


def draw_curves(results: Results) -> Figure:
    """Loss against steps and against seconds; a row a case."""
    shown, counts = [], sorted({row["N"] for row in results["rows"]})
    for name, case in cases(results).items():
        for label in ("outer steps", "seconds of outer steps"):
            lines = {}
            for count, found in case.items():
                curve, pace = found["loss"], np.median(found["seconds a step"])
                x = WINDOW * np.arange(1, curve.shape[1] + 1) * (1 if label == "outer steps" else pace)
                look = {"linestyle": STYLES[counts.index(count)]}
                lines[f"N = {count}"] = Line(x, curve.mean(0), look, curve.min(0), curve.max(0))
            levels = {"guessing": (GUESSING, DOTTED), "level of the table": (summary(case)[0], {"color": "black"})}
            top = min(2.2, max(float(np.nanmax(found["loss"])) for found in case.values()))
            axes = {"xlabel": label, "ylabel": "training query loss", "title": name, "ylim": (None, top)}
            shown.append(Panel(lines, axes, levels))
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
    torch.manual_seed(0)
    model = il.models.Conv4(in_channels=tasks.input_shape[0], ways=tasks.output_size, filters=filters)
    anil = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=5, weight_decay=PENALTY))
    il.fit(anil, tasks, steps=outer_steps, tasks_per_batch=4, validation_tasks=0, progress=False)
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
    return decay(fc100(arguments), 100, 32, (0.0, 0.1, 1.0, 3.0), counts)


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
and only directions can be compared. Settings are ours: Conv4 with {FILTERS} filters and strides, {TASKS_PER_BATCH}
tasks a batch; the images of FC100 are a lossy copy. A seed's batches and first weights do not depend on N."""
TRAINING = f"""Loss: query loss in training, mean over {WINDOW * LAST} outer steps; diverged trainings count as
guessing ({GUESSING:.3f}). Level: the highest final loss of an N in its worst seed, of those below guessing that no run
has at once; steps and processor seconds are those to it. Accuracy: {Scale().validation} validation tasks. ±: standard
deviation over the seeds. Verdicts compare the steps to the level of the smallest and the largest N, seed by seed; where
it is never reached, all steps count."""


def rises(values: Sequence[float]) -> bool:
    return all(one <= other for one, other in pairwise(values))


def pace(losses: Sequence[float]) -> int:
    """Steps to 95 % of the fall from the first loss to the last."""
    return next(step for step, loss in enumerate(losses) if loss <= losses[-1] + 0.05 * (losses[0] - losses[-1]))


def curves_section(deep: bool, results: Results) -> Section:
    claims, rows = [], []
    kind, word = ("nonconvex", "slower") if deep else ("strongly convex", "faster")
    for name, case in cases(results).items():
        level, of_counts = summary(case)
        shown = "none" if math.isnan(level) else f"{level:.3f}"
        here = [f"N = {', '.join(map(str, case))}", f"loss level {shown}"]
        for what in ("steps", "final loss", "accuracy"):
            means = (spread(row[what], FORMS[what]).split(" ± ")[0] for row in of_counts.values())
            here.append(f"{what} {', '.join(means)}")
        most = WINDOW * case[min(case)]["loss"].shape[1]
        few, many = (np.minimum(of_counts[end(case)]["steps"], most) for end in (min, max))
        verdict = "open" if math.isnan(level) else higher_of(list(many - few if deep else few - many))
        outer = f"{most:,} steps of {TASKS_PER_BATCH} tasks, {FILTERS} filters"
        claims.append([
            f"{kind} inner loss: {word} with larger N; {name}", word, "; ".join(here),
            f"FC100 5-way 5-shot, {outer}, {len(few)} seed{'s' * (len(few) > 1)}", verdict,
        ])  # fmt: skip
        for count, row in of_counts.items():
            cells = [f"{case[count]['rate'][0]:g}", f"{np.median(case[count]['seconds a step']):.3f}", shown]
            rows.append([name, str(count), *cells, *(spread(row[what], form) for what, form in FORMS.items())])
    searched, tried = [row for row in results["rows"] if row["kind"] == "search"], {}
    for row in searched:
        tried.setdefault(row["N"], [str(row["N"])]).append(f"{final(row['loss']):.3f}")
    rates = dict.fromkeys(f"rate {row['rate']:g}" for row in searched)
    how = "**Two layers adapt**, without an L2 term" if deep else "**The last layer adapts**, with an L2 term"
    return claims, (
        f"{how}. {TRAINING}\n\n{table(['case', 'N', 'inner rate', 's a step', 'level', *FORMS], rows)}\n\n"
        f"Loss in the search for the rates, after {WINDOW * len(searched[0]['loss'])} outer steps, one seed:\n\n"
        + table(["N", *rates], list(tried.values()))
    )


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
            for rate, found in (("1/L", fixed), ("1/(N L)", falling)):
                paces = [pace(each) for each in found.values()]
                here = f"steps to 95 % of each one's own fall: {', '.join(map(str, paces))}; losses at the end: "
                here += ", ".join(f"{each[-1]:.2f}" for each in found.values())
                verdict = judged(True) if rises(paces[::-1]) else judged(False) if rises(paces) else "open"
                claims.append(
                    [f"strongly convex quadratics: faster with larger N; rate {rate}", "faster", here, scale, verdict]
                )
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
    "convex": Part(partial(measure_curves, "convex", False), draw_curves, quick_convex, grows=True),
    "nonconvex": Part(partial(measure_curves, "nonconvex", True), draw_curves, quick_nonconvex, grows=True),
    "decay": Part(measure_decay, draw_decay, quick_decay),
    "geometry": Part(measure_geometry, draw_geometry, quick_geometry),
}

if __name__ == "__main__":
    run(__doc__, FOLDER, PARTS, page)
