"""Two neighbours in small: windows at random places in data distillation, and sparse layers.

    python experiments/neighbours/run.py [--quick] [--only distillation ...]

Parts:

distillation: ten images that teach two scripts to new networks, learned through the last or a random window of the
    inner loop (arXiv 2311.07025), at equal processor time.
sparsity: MAML with B-SMALL's layers (arXiv 2101.00203), by the weight of their divergence.
"""

from __future__ import annotations

import statistics
import sys
import time
from argparse import Namespace
from pathlib import Path

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import functional_call

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import DOTS, MARKED, Part, Results, Section, higher_of, judged, page_of, references, run

import innerloop as il
from innerloop.problem import Tree
from innerloop.reporting import percent, table
from innerloop.reporting.figures import Line, Panel, panels
from innerloop.training.evaluation import evaluate

FOLDER = Path(__file__).parent

# --- distillation ---------------------------------------------------------------------------------

SCRIPTS, LETTERS, EACH, WIDTH = ("Arabic", "Canadian Syllabics"), 200, 5, 32
LABELS = torch.arange(len(SCRIPTS)).repeat_interleave(EACH)
WAYS = {
    "a random window of 10": il.Truncated(10, end="random"),
    "the last window of 10": il.Truncated(10),
    "all steps": il.Unrolled(),
}


def scripts() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels of letters of the two scripts, to learn from and, in other fonts, to test on."""
    stock = il.tasks.glyphs().image_set
    parts: list[list[Tensor]] = [[], [], [], []]
    for label, script in enumerate(SCRIPTS):
        letters = [place for place, name in enumerate(stock.classes) if name.startswith(f"{script}/")][:LETTERS]
        images = stock.images.view(len(stock.classes), -1, 784)[letters].float() / 255
        for side, some in enumerate((images[:, :14], images[:, 14:])):
            parts[2 * side].append(some.flatten(0, 1))
            parts[2 * side + 1].append(torch.full((some[..., 0].numel(),), label))
    learn, known, test, asked = (torch.cat(part) for part in parts)
    return learn, known, test, asked


def network() -> il.models.MLP:
    return il.models.MLP([784, WIDTH, len(SCRIPTS)])


def loss(params: Tree, images: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(functional_call(network(), params, (images,)), labels)


PROBLEM = il.Problem(
    start=lambda meta, support: support,  # a new network in every task
    inner_loss=lambda params, meta, support: loss(params, meta["images"], LABELS),
    outer_loss=lambda params, meta, query: loss(params, *query),
)


def taught(images: Tensor, steps: int, test: Tensor, asked: Tensor, networks: int = 10) -> float:
    """Test accuracy of new networks after so many steps on ten images."""
    right = []
    for seed in range(networks):
        torch.manual_seed(1000 + seed)
        params = {name: value.detach() for name, value in network().named_parameters()}
        task = il.Task(params, (test, asked))
        loop, _ = il.Bilevel(PROBLEM, {"images": images}, il.SGD(lr=0.1, steps=steps)).loop(task)
        with torch.no_grad():
            scores = functional_call(network(), loop.run(steps).params, (test,))
        right.append((scores.argmax(1) == asked).float().mean().item())
    return statistics.mean(right)


def distil(steps: int, seconds: float, seeds: list[int]) -> Results:
    """Each way to the gradient for as long; and ten real images, chosen at random."""
    learn, known, test, asked = scripts()
    found: Results = {"inner steps": steps, "seconds": seconds, "accuracy": {}, "outer steps": {}}
    for name, meta_gradient in WAYS.items():
        accuracies, counts = [], []
        for seed in seeds:
            torch.manual_seed(seed)
            learner = il.Bilevel(
                PROBLEM, {"images": 0.1 * torch.randn(10, 784)}, il.SGD(lr=0.1, steps=steps), meta_gradient
            )
            optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
            began, count = time.process_time(), 0
            while time.process_time() - began < seconds:
                params = {key: value.detach() for key, value in network().named_parameters()}
                rows = torch.randint(len(learn), (256,))
                optimizer.zero_grad()
                learner.meta_step(il.Task(params, (learn[rows], known[rows])), keep_end=False)
                optimizer.step()
                count += 1
            accuracies.append(taught(learner.meta_tree()["images"], steps, test, asked))
            counts.append(count)
        found["accuracy"][name], found["outer steps"][name] = accuracies, counts
        print(f"  {name}: {accuracies}, {counts} outer steps", flush=True)
    real = []
    for seed in seeds:
        torch.manual_seed(seed)
        rows = torch.cat(
            [torch.nonzero(known == label)[torch.randperm(int((known == label).sum()))[:EACH], 0] for label in range(2)]
        )
        real.append(taught(learn[rows], steps, test, asked))
    found["accuracy"]["ten real images"] = real
    return found


def measure_distillation(arguments: Namespace) -> Results:
    return distil(100, 20.0, [0, 1, 2])


def quick_distillation(arguments: Namespace) -> Results:
    found = distil(30, 4.0, [0])
    placed, real = found["accuracy"]["a random window of 10"][0], found["accuracy"]["ten real images"][0]
    assert placed > real + 0.05, f"ten learned images should teach more than ten real ones: {placed:.3f}, {real:.3f}"
    return found


def draw_distillation(results: Results) -> Figure:
    names = [*results["accuracy"]]
    lines = {
        name: Line([place] * len(results["accuracy"][name]), [100 * each for each in results["accuracy"][name]], DOTS)
        for place, name in enumerate(names)
    }
    axes = {"ylabel": "test accuracy, %; a dot a seed", "xticks": [], "xlim": (-0.5, len(names) - 0.5)}
    return panels([Panel(lines, axes, references(len(SCRIPTS)))], width=7)


def tell_distillation(results: Results) -> Section:
    accuracy = results["accuracy"]
    placed, last, *_ = accuracy.values()
    apart = [100 * (one - other) for one, other in zip(placed, last, strict=True)]
    scale = f"{results['inner steps']} inner steps, {results['seconds']:g} s, {len(placed)} seeds"
    rows = [
        ["a window at a random place distils better than the last one", "better",
         f"{min(apart):+.1f} to {max(apart):+.1f} points", scale, higher_of(apart)],
    ]  # fmt: skip
    body = [
        [name, f"{100 * statistics.mean(each):.1f}", f"{100 * min(each):.1f} to {100 * max(each):.1f}",
         "–" if name not in results["outer steps"] else f"{statistics.mean(results['outer steps'][name]):.0f}"]
        for name, each in accuracy.items()
    ]  # fmt: skip
    head = ["ten images learned through", "test accuracy, %", "seeds", "outer steps"]
    return rows, (
        f"## Distillation\n\n{' and '.join(SCRIPTS)} letters, five images a script, a network of {WIDTH} hidden units, "
        f"{scale}; new networks, new fonts; chance is 50 %.\n\n{table(head, body)}"
    )


# --- sparsity -------------------------------------------------------------------------------------

WEIGHTS = (0.0, 1e-5, 1e-4, 1e-3)


def thin(weights: tuple[float, ...], steps: int, count: int, filters: int) -> Results:
    """MAML by the weight of the divergence; 0 is plain MAML, of plain layers."""
    tasks = il.tasks.glyphs(5, 1, 5)
    found: Results = {"steps": steps, "rows": []}
    for weight in weights:
        torch.manual_seed(0)
        model = il.models.Conv4(in_channels=1, ways=5, filters=filters, downsample="stride")
        regulariser = il.models.Divergence(weight) if weight else None
        model = il.models.sparse(model) if weight else model
        learner = il.MetaLearner(model, il.Everything(), il.SGD(lr=0.1, steps=3), regulariser=regulariser)
        deviations = [p for name, p in learner.named_parameters() if name.endswith("log_std")]
        others = [p for name, p in learner.named_parameters() if not name.endswith("log_std")]
        # From -8 a deviation has to come to the size of its weight, which the authors leave tens of thousands of steps.
        groups = [{"params": others}, *([{"params": deviations, "lr": 25 / steps}] if deviations else [])]
        optimizer = torch.optim.Adam(groups, lr=3e-3)
        rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for batch in tasks.train(4, steps):
            optimizer.zero_grad()
            learner.meta_step(batch)
            optimizer.step()
            rate.step()
        accuracy = evaluate(learner.eval(), tasks, "test", count).accuracy
        sparsity = il.models.sparsity(learner.model) if weight else 0.0
        found["rows"].append({"weight": weight, "sparsity": sparsity, "accuracy": list(accuracy)})
        print(f"  weight {weight:g}: {sparsity:.1%} left out, accuracy {percent(accuracy)}", flush=True)
    return found


def measure_sparsity(arguments: Namespace) -> Results:
    return thin(WEIGHTS, 600, 300, 32)


def quick_sparsity(arguments: Namespace) -> Results:
    found = thin((0.0, 1e-2), 40, 20, 8)
    thinned = found["rows"][1]
    assert thinned["sparsity"] > 0.05, f"a weight of 1e-2 should thin the layers: {found['rows']}"
    assert thinned["accuracy"][0] > 0.25, f"thin layers should still beat guessing, at 20 %: {found['rows']}"
    return found


def draw_sparsity(results: Results) -> Figure:
    rows = results["rows"]
    means, halves = zip(*(row["accuracy"] for row in rows), strict=True)
    line = Line(
        [100 * row["sparsity"] for row in rows], [100 * each for each in means], MARKED,
        [100 * (mean - half) for mean, half in zip(means, halves, strict=True)],
        [100 * (mean + half) for mean, half in zip(means, halves, strict=True)],
    )  # fmt: skip
    axes = {"xlabel": "weights left out in evaluation, %", "ylabel": "test accuracy, %"}
    return panels([Panel({"MAML with sparse layers": line}, axes)], width=6)


def tell_sparsity(results: Results) -> Section:
    plain, *thinned = results["rows"]
    within = [row for row in thinned if row["accuracy"][0] > plain["accuracy"][0] - 0.02]
    best = max((row["sparsity"] for row in within), default=0.0)
    scale = f"glyphs 5-way 1-shot, {results['steps']} steps of 4 tasks, 1 seed"
    rows = [
        ["sparse at an accuracy like MAML's", "–",
         f"{best:.0%} of the weights left out within two points of MAML", scale, judged("open")],
    ]  # fmt: skip
    body = [
        [f"{row['weight']:g}" if row["weight"] else "plain MAML", f"{row['sparsity']:.1%}", percent(row["accuracy"])]
        for row in results["rows"]
    ]
    head = ["weight of the divergence", "weights left out", "test accuracy"]
    return rows, (
        f"## Sparsity\n\n{scale}. Accuracy is that of the thinned network. Deviations of weights have an outer rate of "
        f"{25 / results['steps']:g}, in order to come from -8 to the size of their weights.\n\n{table(head, body)}"
    )


PARTS = {
    "distillation": Part(measure_distillation, draw_distillation, quick_distillation),
    "sparsity": Part(measure_sparsity, draw_sparsity, quick_sparsity),
}

HEADER = """\
# Two neighbours in small

Data distillation through windows at random places (arXiv 2311.07025, recalled), and B-SMALL's sparse layers (arXiv
2101.00203, read off its authors' code). Both papers work at another scale, so no number of theirs stands here."""


def page(results: dict[str, Results]) -> str:
    sections = {"distillation": tell_distillation, "sparsity": tell_sparsity}
    return page_of(HEADER, sections, results, (__doc__ or "").partition("Parts:")[2])


if __name__ == "__main__":
    run(__doc__ or "", FOLDER, PARTS, page)
