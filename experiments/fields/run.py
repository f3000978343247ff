"""Neural fields by meta-learning, with and without context pruning (GradNCP, Tack et al., arXiv 2302.00617).

    python experiments/fields/run.py [--quick] [--only memory ...]

Inner steps that read only the pixels that matter most to each of them need less memory. What do they fit? Here stands
beside it an exact meta-gradient whose memory does not grow with the steps, all pixels read. Parts:

memory: peak memory of a meta-step against the inner steps.
fits: PSNR on new images after each inner step, and pictures of the fits.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Part, Results, Section, higher_of, judged, page_of, run

import innerloop as il
from innerloop.reporting import in_fresh_process, peak_memory, table
from innerloop.reporting.figures import MARKED, STYLE, Line, Panel, panels
from innerloop.tasks import TaskSource

FOLDER = Path(__file__).parent
KEEP, RATES, STEPS, SHOWN = 0.25, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1), 3, (0, 1, 3)
METHODS: dict[str, tuple[float | None, dict[str, Any]]] = {
    "all pixels, recorded": (None, {"meta_gradient": il.Unrolled(record=True)}),
    "a quarter of them, recorded": (KEEP, {"meta_gradient": il.Unrolled(record=True)}),
    "all pixels, nothing recorded": (None, {"memory": 0}),
    "all pixels, first order": (None, {"meta_gradient": il.FirstOrder()}),
}
LEARNED = [name for name in METHODS if name != "all pixels, nothing recorded"]  # whose gradient is that of the first


def learner(method: str, width: int, steps: int, rate: float = RATES[0]) -> il.Bilevel:
    """A SIREN of three layers whose start is learned."""
    keep, choices = METHODS[method]
    model = il.models.SIREN([2, width, width, 1])
    call = partial(functional_call, model)
    *body, (head, last) = model.named_children()
    below = torch.nn.Sequential(OrderedDict(body))

    def loss(params: il.Tree, meta: il.Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (call(params, batch[0]) - batch[1]).square().mean()

    def score(params: il.Tree, meta: il.Tree, batch: tuple[Tensor, Tensor]) -> Tensor:
        above = {name.removeprefix(f"{head}."): value for name, value in params.items() if name.startswith(f"{head}.")}
        features = functional_call(below, {name: params[name] for name, _ in below.named_parameters()}, batch[0])
        error = functional_call(last, above, features) - batch[1]
        return error.norm(dim=1) * (features.square().sum(1) + 1).sqrt()

    problem = il.Problem(dict, loss, loss)
    problem = problem if keep is None else il.pruned(problem, score, keep)
    return il.Bilevel(problem, model, il.SGD(lr=rate, steps=steps), stacked=True, **choices)


# --- memory ---------------------------------------------------------------------------------------


def peak(method: str, side: int, width: int, steps: int) -> float:
    """MiB of one meta-step on one image above model and image; in this process, which should be a fresh one."""
    torch.manual_seed(0)
    sides = torch.linspace(-1, 1, side)
    where = torch.stack(torch.meshgrid(sides, sides, indexing="ij"), -1).flatten(0, 1)[None]
    task = il.Task(*[(where, torch.rand(1, side * side, 1))] * 2)
    small = il.Task(*[(where[:, :64], torch.rand(1, 64, 1))] * 2)
    learner(method, 8, 1).meta_step(small)  # kernels are loaded on first use
    measured = learner(method, width, steps)
    return peak_memory(lambda: measured.meta_step(small if steps == 0 else task), "cpu") / 2**20


def peaks(side: int, width: int, steps: list[int]) -> Results:
    found: Results = {"side": side, "width": width, "steps": steps, "mib": {}}
    for method in METHODS:
        found["mib"][method] = [round(in_fresh_process(peak, method, side, width, count), 1) for count in steps]
        print(f"  {method}: {found['mib'][method]} MiB", flush=True)
    return found


def measure_memory(arguments: Namespace) -> Results:
    return peaks(64, 256, [1, 4, 16, 64])


def quick_memory(arguments: Namespace) -> Results:
    found = peaks(32, 64, [2, 10])
    grown = {method: mib[-1] - mib[0] for method, mib in found["mib"].items()}
    every, some, flat, _ = grown.values()
    assert some < 0.7 * every, f"a quarter of the pixels should record less, MiB: {grown}"
    assert flat < 0.3 * every, f"nothing recorded should stay flat, MiB: {grown}"
    return found


def draw_memory(results: Results) -> Figure:
    lines = {name: Line(results["steps"], mib, MARKED) for name, mib in results["mib"].items()}
    axes = {"xlabel": "inner steps", "ylabel": "peak memory, MiB", "xscale": "log", "yscale": "log"}
    return panels([Panel(lines, axes | {"xticks": results["steps"], "xticklabels": results["steps"]})], width=7)


def tell_memory(results: Results) -> Section:
    mib, steps = results["mib"], results["steps"]
    every, some, flat, _ = mib.values()
    saved = 1 - some[-1] / every[-1]
    scale = f"{results['side']}x{results['side']} pixels, {results['width']} units a layer"
    rows = [
        ["a quarter of the pixels needs less memory", "figures not read", f"{saved:.0%} less at {steps[-1]} steps",
         scale, judged(saved > 0.25)],
        ["all pixels, nothing recorded, needs less still (ours)", "–", f"{1 - flat[-1] / every[-1]:.0%} less",
         scale, judged(flat[-1] < some[-1])],
    ]  # fmt: skip
    head = ["MiB at inner steps", *map(str, steps)]
    body = [[name, *(f"{value:.1f}" for value in each)] for name, each in mib.items()]
    return rows, f"## Memory\n\nOne image, {scale}.\n\n{table(head, body)}"


# --- fits -----------------------------------------------------------------------------------------


def psnr(error: Tensor) -> Tensor:
    return -10 * error.log10()


def trained(method: str, tasks: TaskSource, width: int, rate: float, steps: int, seed: int) -> il.Bilevel:
    torch.manual_seed(seed)
    found = learner(method, width, STEPS, rate)
    optimizer = torch.optim.Adam(found.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in tasks.train(4, steps, seed * steps):
        optimizer.zero_grad()
        found.meta_step(batch)
        optimizer.step()
        schedule.step()
    return found


def fit_all(tasks: TaskSource, width: int, steps: int, seeds: list[int], count: int) -> Results:
    """Each method trained for as many outer steps; PSNR on test images after 0, 1, ... inner steps.

    The inner rate of each is chosen by its PSNR on validation images, after a quarter of the outer steps.
    """
    found: Results = {"outer steps": steps, "width": width, "methods": {}}

    def fits(mine: il.Bilevel, split: str, after: int) -> list[float]:
        # judged by the loss of all pixels, whatever the steps read
        values: list[float] = psnr(mine.evaluate(tasks.batch(split, 0, count), steps=after).loss).tolist()
        return values

    for method in LEARNED:
        tried = {
            rate: statistics.mean(fits(trained(method, tasks, width, rate, steps // 4, 0), "validation", STEPS))
            for rate in RATES
        }
        rate = max(tried, key=lambda each: tried[each])
        began = time.process_time()
        learners = [trained(method, tasks, width, rate, steps, seed) for seed in seeds]
        seconds = (time.process_time() - began) / len(seeds)
        rows = [[fits(mine, "test", after) for after in range(STEPS + 1)] for mine in learners]
        one = tasks.batch("test", 0, 3)
        pictures = [shown(learners[0], il.Task(*((x[place], y[place]) for x, y in one))) for place in range(3)]
        means = [statistics.mean(statistics.mean(seed[after]) for seed in rows) for after in range(STEPS + 1)]
        found["methods"][method] = {
            "rate": rate, "tried": tried, "psnr": rows, "means": means, "seconds": seconds, "pictures": pictures,
        }  # fmt: skip
        print(
            f"  {method}: rate {rate:g}, PSNR {', '.join(f'{each:.2f}' for each in means)}, {seconds:.0f} s", flush=True
        )
    return found


def shown(mine: il.Bilevel, task: il.Task) -> list[list[float]]:
    """The image and what the field gives after some steps, each a list of grey values."""
    where, values = task.support
    rows = [values[:, 0].tolist()]
    loop, _ = mine.loop(task)
    for steps in SHOWN:
        with torch.no_grad():
            found = functional_call(mine.meta, loop.run(steps).params, where)
        rows.append([round(value, 3) for value in found[:, 0].tolist()])
    return rows


def measure_fits(arguments: Namespace) -> Results:
    data = None if arguments.data is None else arguments.data / "omniglot28.npz"
    return fit_all(il.tasks.Fields(il.tasks.omniglot(data=data)), 128, 1500, [0, 1, 2], 100)


def quick_fits(arguments: Namespace) -> Results:
    found = fit_all(il.tasks.Fields(il.tasks.glyphs()), 32, 150, [0], 20)
    means = {name: row["means"] for name, row in found["methods"].items()}
    for name, each in means.items():
        assert each[-1] > each[0] + 2, f"{name}: PSNR {each[0]:.1f} before, {each[-1]:.1f} after"
    assert means[LEARNED[0]][-1] > means[LEARNED[2]][-1] + 0.5, f"exact should beat first order: {means}"
    assert means[LEARNED[1]][-1] > means[LEARNED[0]][-1] - 2, f"pixels that matter should not fit worse here: {means}"
    return found


def draw_fits(results: Results) -> Figure:
    names = list(results["methods"])
    count = len(results["methods"][names[0]]["pictures"])
    with mpl.rc_context({**STYLE, "axes.grid": False}):
        figure = Figure(figsize=(9, 1.1 * len(names) + 0.4), layout="constrained")
        rows = figure.subplots(len(names), count * (1 + len(SHOWN)), squeeze=False)
        titles = ["image", *(f"{steps} steps" for steps in SHOWN)] * count
        for place, (row, name) in enumerate(zip(rows, names, strict=True)):
            flat = [each for picture in results["methods"][name]["pictures"] for each in picture]
            for axes, values, title in zip(row, flat, titles, strict=True):
                side = round(len(values) ** 0.5)
                axes.imshow(torch.tensor(values).view(side, side).clamp(0, 1), cmap="gray", vmin=0, vmax=1)
                axes.set(xticks=[], yticks=[])
                if not place:
                    axes.set_title(title, fontsize=8)
            row[0].set_ylabel(name.replace(", ", ",\n").replace(" of them", "\nof them"), fontsize=7)
    return figure


def decibels(differences: list[float]) -> str:
    """The differences of the seeds, lowest and highest."""
    return f"{min(differences):+.2f} to {max(differences):+.2f} dB"


def tell_fits(results: Results) -> Section:
    methods = results["methods"]
    every, some, first = (methods[name] for name in LEARNED)

    def apart(one: Results, other: Results) -> list[float]:
        pairs = zip(one["psnr"], other["psnr"], strict=True)
        return [statistics.mean(a - b for a, b in zip(x[STEPS], y[STEPS], strict=True)) for x, y in pairs]

    seeds = len(every["psnr"])
    scale = f"Omniglot, {results['width']} units a layer, {results['outer steps']} outer steps, {seeds} seeds"
    pruned, order = apart(some, every), apart(every, first)
    rows = [
        ["a quarter of the pixels, at test too, fits as well (ours)", "–", decibels(pruned), scale,
         higher_of(pruned)],
        ["the exact gradient fits better than first order (ours)", "–", decibels(order), scale, higher_of(order)],
    ]  # fmt: skip
    body = [
        [name, f"{each['rate']:g}", *(f"{value:.2f}" for value in each["means"]), f"{each['seconds']:.0f}"]
        for name, each in methods.items()
    ]
    head = ["PSNR, dB, after inner steps", "inner rate", *map(str, range(STEPS + 1)), "processor seconds"]
    return rows, (
        f"## Fits\n\nNew images, all pixels judged. With pruning every inner step reads {KEEP:.0%} of the pixels, at "
        f"test too. All methods had the same outer steps, and each the best of {len(every['tried'])} inner rates on "
        f"validation images.\n\n{table(head, body)}"
    )


PARTS = {
    "memory": Part(measure_memory, draw_memory, quick_memory),
    "fits": Part(measure_fits, draw_fits, quick_fits),
}

HEADER = """\
# Neural fields and context pruning

Of GradNCP (arXiv 2302.00617) an abstract and the authors' code could be read, and no table. It reads in every inner
step the quarter of the pixels with the largest gradient of the last layer. Its pull towards further steps on all pixels
and its rescaled steps at test are left out here. Images and networks are small, and the paper's numbers are not
comparable."""


def page(results: dict[str, Results]) -> str:
    return page_of(HEADER, {"memory": tell_memory, "fits": tell_fits}, results, (__doc__ or "").partition("Parts:")[2])


if __name__ == "__main__":
    run(__doc__ or "", FOLDER, PARTS, page)
