"""Time of a meta-step, of an adaptation and of a solve, beside plain autograd and the peers, in one run.

    python benchmarks/speed.py                  # the committed figures, about ten minutes on a quiet machine
    python benchmarks/speed.py --quick          # under two minutes: fewer rounds and rows, ratios beside their bounds
    python benchmarks/speed.py --only mlp conv  # some of the rows

Everything runs on one CPU thread, in turns, and the median of the rounds counts, in processor time. Before a clock
starts, all that are raced must have given the same meta-gradient. The unit is one plain gradient of the same batch: the
faster of one pass over all tasks and a loop over them. Peers that are not installed are left out, with the reason.
See peers.py for those that need their source on PYTHONPATH.
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peers import EXACT, FIRST_ORDER, PEERS, PLAIN, absent, ordinary
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.reporting import made, provenance, table, write, write_json
from innerloop.training.allocator import keep_freed_memory

Step = Callable[[], None]
OURS = "innerloop"
COMPILED = f"{OURS}, compiled"
SLOW = {"torch_maml", "hypertorch"}  # which compute every step again, for memory's sake: see costs.py


class Work(NamedTuple):
    """One row: a problem, who is raced on it, and what must hold.

    Attributes:
        title: what it is.
        against: whose time ours is divided by, the fastest of those present.
        bound: what that ratio must stay below.
        build: makes the runners by name, each with the meta-gradient that it leaves behind, and the plain gradient.
        own: which runner is ours.
    """

    title: str
    against: tuple[str, ...]
    bound: float
    build: Callable[[], tuple[dict[str, tuple[Step, Callable[[], list[Tensor]]]], Step]]
    own: str = OURS


def gradients(model: nn.Module) -> Callable[[], list[Tensor]]:
    """Reads a model's gradients."""
    return lambda: [p.grad for p in model.parameters() if p.grad is not None]


def meta_step(learner: il.MetaLearner, batch: il.Task) -> Step:
    """Our meta-gradient, alone in ``.grad``."""

    def step() -> None:
        learner.zero_grad()
        learner.meta_step(batch)

    return step


def maml(
    model: nn.Module,
    batch: il.Task,
    lr: float,
    steps: int,
    second: bool = True,
    loss: Any = F.cross_entropy,
    **ours: Any,
) -> tuple[dict[str, tuple[Step, Callable[[], list[Tensor]]]], Step]:
    """MAML by everyone."""
    shared = ordinary(model)
    runners: dict[str, tuple[Step, Callable[[], list[Tensor]]]] = {}
    skipped = SLOW | absent().keys()
    for name, run in (EXACT if second else FIRST_ORDER).items():
        if name in skipped:
            continue
        mine = deepcopy(shared)

        def step(run: Any = run, mine: nn.Module = mine) -> None:
            mine.zero_grad()
            run(mine, loss, batch, lr, steps, *([] if second else [False]))

        runners[name] = step, gradients(mine)
    estimator = il.Unrolled() if second else il.FirstOrder()
    for name, settings in {OURS: {}, **ours}.items():
        learner = il.MetaLearner(
            model, inner=il.SGD(lr=lr, steps=steps), meta_gradient=estimator, loss=loss, **settings
        )
        runners[name] = meta_step(learner, batch), gradients(learner.model)
    return runners, plain_gradient(deepcopy(shared), batch.query, loss)


def plain_gradient(model: nn.Module, examples: tuple[Tensor, Tensor], loss: Any) -> Step:
    """One gradient of the query examples of all tasks, in one pass or a loop over tasks, whichever is faster here."""

    def together() -> None:
        model.zero_grad()
        loss(model(examples[0].flatten(0, 1)), examples[1].flatten(0, 1)).backward()

    def loop() -> None:
        model.zero_grad()
        for inputs, targets in zip(*examples, strict=True):
            loss(model(inputs), targets).backward()

    return min((together, loop), key=lambda each: statistics.median(clocked(each) for _ in range(3)))


def sinusoid() -> Any:
    torch.manual_seed(0)
    batch = il.Task(*((torch.rand(25, 10, 1) * 10 - 5, torch.randn(25, 10, 1)) for _ in range(2)))
    return maml(il.models.MLP([1, 40, 40, 1]), batch, 0.01, 5, loss=squared, **{COMPILED: {"compile": True}})


def squared(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def images(tasks: int, channels: int, size: int, queries: int, shots: int = 1, ways: int = 5) -> il.Task:
    torch.manual_seed(1)

    def part(each: int) -> tuple[Tensor, Tensor]:
        inputs = torch.rand(tasks, ways * each, channels, size, size)
        return inputs, torch.arange(ways).repeat_interleave(each).expand(tasks, -1).contiguous()

    return il.Task(part(shots), part(queries))


def conv(tasks: int, steps: int, second: bool) -> Callable[[], Any]:
    model = il.models.Conv4(in_channels=1, filters=64)
    return lambda: maml(model, images(tasks, 1, 28, 15), 0.1, steps, second)


def large() -> Any:
    return maml(il.models.Conv4(filters=32, size=84), images(4, 3, 84, 15), 0.01, 5)


def anil(steps: int) -> Callable[[], Any]:
    """The head alone: features in every step, features cached by hand, and ours."""

    def build() -> Any:
        batch, lr = images(8, 1, 28, 15), 0.1
        model = il.models.Conv4(in_channels=1, filters=64)
        shared = ordinary(model)

        def by_hand(net: Any, cached: bool) -> Step:
            def step() -> None:
                net.zero_grad()
                (x, y), (a, b) = batch
                for task in range(len(y)):
                    weight, bias = net.head.weight, net.head.bias
                    features = net[:-1](x[task]) if cached else None
                    for _ in range(steps):
                        seen = net[:-1](x[task]) if features is None else features
                        value = F.cross_entropy(F.linear(seen, weight, bias), y[task])
                        grads = torch.autograd.grad(value, [weight, bias], create_graph=True)
                        weight, bias = weight - lr * grads[0], bias - lr * grads[1]
                    (F.cross_entropy(F.linear(net[:-1](a[task]), weight, bias), b[task]) / len(y)).backward()

            return step

        runners = {}
        for name, cached in (("features in every step", False), ("features cached by hand", True)):
            net = deepcopy(shared)
            runners[name] = by_hand(net, cached), gradients(net)
        learner = il.MetaLearner(model, il.Head(), il.SGD(lr=lr, steps=steps))
        runners[OURS] = meta_step(learner, batch), gradients(learner.model)
        return runners, plain_gradient(deepcopy(shared), batch.query, F.cross_entropy)

    return build


def implicit() -> Any:
    """iMAML, 16 inner steps and 5 products, beside plain autograd with one graph for all five."""
    batch, lr, proximal = images(4, 1, 28, 15), 0.05, 2.0
    model = il.models.Conv4(in_channels=1, filters=64)
    shared = ordinary(model)
    net = deepcopy(shared)

    def by_hand() -> None:
        net.zero_grad()
        (x, y), (a, b) = batch
        start = [p.detach() for p in net.parameters()]
        names = [name for name, _ in net.named_parameters()]

        def loss(params: list[Tensor], inputs: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(net, dict(zip(names, params, strict=True)), (inputs,)), targets)

        for task in range(len(y)):
            params = start
            for _ in range(16):
                params = [p.detach().requires_grad_() for p in params]
                grads = torch.autograd.grad(loss(params, x[task], y[task]), params)
                params = [p - lr * (g + proximal * (p - s)) for p, g, s in zip(params, grads, start, strict=True)]
            params = [p.detach().requires_grad_() for p in params]
            right = torch.cat([g.flatten() for g in torch.autograd.grad(loss(params, a[task], b[task]), params)])
            grads = torch.autograd.grad(loss(params, x[task], y[task]), params, create_graph=True)
            flat = torch.cat([g.flatten() for g in grads])

            def product(vector: Tensor, flat: Tensor = flat, params: list[Tensor] = params) -> Tensor:
                found = torch.autograd.grad(flat, params, vector, retain_graph=True)
                return torch.cat([g.flatten() for g in found]) + proximal * vector

            solution, residual = torch.zeros_like(right), right
            direction, size = residual, residual @ residual
            for _ in range(5):
                image = product(direction)
                length = size / (direction @ image)
                solution, residual = solution + length * direction, residual - length * image
                new = residual @ residual
                direction, size = residual + new / size * direction, new
            parts = (proximal * solution).split([p.numel() for p in start])
            for p, part in zip(net.parameters(), parts, strict=True):
                part = part.view_as(p) / len(y)
                p.grad = part if p.grad is None else p.grad + part

    learner = il.MetaLearner(
        model, inner=il.SGD(lr=lr, steps=16, proximal=proximal), meta_gradient=il.Implicit(il.CG(5))
    )
    runners = {PLAIN: (by_hand, gradients(net)), OURS: (meta_step(learner, batch), gradients(learner.model))}
    return runners, plain_gradient(deepcopy(shared), batch.query, F.cross_entropy)


def adaptation(model: nn.Module, task: tuple[Tensor, Tensor], head: bool, loss: Any) -> Callable[[], Any]:
    """One task adapted to, five steps: what is compared are the parameters."""

    def build() -> Any:
        shared = ordinary(model)
        learner = il.MetaLearner(model, il.Head() if head else il.Everything(), il.SGD(lr=0.01, steps=5), loss=loss)
        left: dict[str, list[Tensor]] = {}

        def own() -> None:
            left[OURS] = [p.detach() for p in learner.adapt(*task).parameters()]

        runners: dict[str, Any] = {OURS: (own, lambda: left[OURS])}
        if "learn2learn" not in absent():
            kind = import_module("learn2learn.algorithms").MAML

            def theirs() -> None:
                net = deepcopy(shared)
                wrapped = kind(net[-1] if head else net, 0.01, first_order=True)
                adapted = wrapped.clone()
                for _ in range(5):
                    features = net[:-1](task[0]) if head else task[0]
                    adapted.adapt(loss(adapted(features), task[1]))
                kept = list(net[:-1].parameters()) if head else []
                left["learn2learn"] = [p.detach() for p in (*kept, *adapted.parameters())]

            runners["learn2learn"] = theirs, lambda: left["learn2learn"]
        return runners, plain_gradient(deepcopy(shared), tuple(part[None] for part in task), loss)  # type: ignore[arg-type]

    return build


FIRST_TASK = tuple(part[0] for part in images(1, 1, 28, 1).support)
LINE = torch.linspace(-5, 5, 10).unsqueeze(1), torch.linspace(-5, 5, 10).unsqueeze(1).sin()
EVERYONE = (PLAIN, *(name for name in PEERS if name not in SLOW))
ONE_BY_ONE = tuple(name for name in EVERYONE if name != "parallel-metalearn")
WORKS = {
    "mlp": Work("sinusoid MLP, 25 tasks, K = 5, exact", ONE_BY_ONE, 1 / 5, sinusoid),
    "mlp-all": Work("the same, beside those that take all tasks at once", ("parallel-metalearn",), 1.0, sinusoid),
    "mlp-compiled": Work("the same, compiled", ("learn2learn",), 1 / 40, sinusoid, COMPILED),
    "conv": Work("Conv4-64, 28x28, 16 tasks, K = 5, exact", EVERYONE, 1.0, conv(16, 5, True)),
    "conv-first": Work("Conv4-64, 28x28, 16 tasks, K = 5, first order", EVERYONE, 1.0, conv(16, 5, False)),
    "conv-1": Work("Conv4-64, 28x28, 16 tasks, K = 1, exact", EVERYONE, 1.0, conv(16, 1, True)),
    "conv-1-first": Work("Conv4-64, 28x28, 16 tasks, K = 1, first order", EVERYONE, 1.0, conv(16, 1, False)),
    "conv-32": Work("Conv4-64, 28x28, 32 tasks, K = 5, exact", EVERYONE, 1.0, conv(32, 5, True)),
    "large": Work("Conv4-32, 84x84, 4 tasks, K = 5, exact", EVERYONE, 1 / 1.2, large),
    "anil": Work("ANIL, 8 tasks, K = 5", ("features in every step",), 1 / 1.15, anil(5)),
    "anil-cached": Work("ANIL, 8 tasks, K = 5", ("features cached by hand",), 1.0, anil(5)),
    "anil-20": Work("ANIL, 8 tasks, K = 20", ("features in every step",), 1 / 2, anil(20)),
    "anil-20-cached": Work("ANIL, 8 tasks, K = 20", ("features cached by hand",), 1.0, anil(20)),
    "implicit": Work("iMAML, 4 tasks, 16 steps, 5 products", (PLAIN,), 1.0, implicit),
    "adapt": Work(
        "adapt one task, Conv4-64, everything", ("learn2learn",), 1.0,
        adaptation(il.models.Conv4(in_channels=1, filters=64), FIRST_TASK, False, F.cross_entropy),
    ),
    "adapt-head": Work(
        "adapt one task, Conv4-64, head", ("learn2learn",), 1 / 3,
        adaptation(il.models.Conv4(in_channels=1, filters=64), FIRST_TASK, True, F.cross_entropy),
    ),
    "adapt-mlp": Work(
        "adapt one task, sinusoid MLP, head", ("learn2learn",), 1 / 3,
        adaptation(il.models.MLP([1, 40, 40, 1]), LINE, True, squared),
    ),
}  # fmt: skip
QUICK = ("mlp", "mlp-all", "conv-1", "anil-20", "anil-20-cached", "adapt-head", "adapt-mlp")


def clocked(step: Step) -> float:
    began = time.process_time()
    step()
    return time.process_time() - began


def race(work: Work, seconds: float, least: int) -> dict[str, Any]:
    """Rounds in turns, after everyone has agreed."""
    runners, plain = work.build()
    reference: list[Tensor] | None = None
    off: dict[str, str] = {}
    for step, _ in runners.values():
        step()
    for name, (step, left) in runners.items():
        step()
        found = left()
        reference = found if reference is None else reference
        size = torch.stack([each.square().sum() for each in reference]).sum().sqrt()
        apart = torch.stack([(a - b).square().sum() for a, b in zip(found, reference, strict=True)]).sum().sqrt()
        if not apart <= 2e-3 * size:
            if name.startswith(OURS):
                raise AssertionError(f"{work.title}: {name} is {apart / size:.1e} off")
            off[name] = f"gives a gradient that is {apart / size:.1e} off"
    runners = {name: runner for name, runner in runners.items() if name not in off}
    times: dict[str, list[float]] = {name: [] for name in runners}
    unit: list[float] = []
    began = time.monotonic()
    while len(unit) < least or time.monotonic() - began < seconds:
        for name, (step, _) in runners.items():
            times[name].append(clocked(step))
        unit.append(clocked(plain))
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {"seconds": medians, "plain gradient": statistics.median(unit), "rounds": len(unit), "off": off}


def rows(results: dict[str, Any]) -> Iterator[list[str]]:
    """A line a row: ours over the fastest of the others, and everyone in plain gradients."""
    for key, found in results.items():
        work, seconds, unit = WORKS[key], found["seconds"], found["plain gradient"]
        rivals = {name: seconds[name] for name in work.against if name in seconds}
        best = min(rivals, key=rivals.__getitem__) if rivals else None
        ratio = seconds[work.own] / rivals[best] if best else None
        everyone = ", ".join(
            f"{name} {value / unit:.3g}" for name, value in sorted(seconds.items(), key=lambda x: x[1])
        )
        yield [
            work.title,
            f"{1e3 * seconds[work.own]:.3g} ms",
            "-" if ratio is None else f"{ratio:.3g} of {best}",
            f"{work.bound:.3g}",
            "-" if ratio is None else ("yes" if ratio <= work.bound else "no"),
            everyone,
        ]


def page(record: dict[str, Any]) -> str:
    head = ["work", "ours", "ours over the fastest other", "bound", "met", "everyone, in plain gradients"]
    left = {
        f"{name}, in {WORKS[key].title}": why
        for key, row in record["results"].items()
        for name, why in row["off"].items()
    }
    gone = "\n".join(f"* {name} {why}." for name, why in (record["absent"] | left).items())
    return f"""# Time

Processor time on one thread, in turns, medians; below 1 we are faster. The unit of the last column is one plain
gradient of the query images of all tasks.

{table(head, list(rows(record["results"])))}

Not raced:

{gone}

Made by {made(record)}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows and rounds")
    parser.add_argument("--only", nargs="+", choices=list(WORKS), metavar="ROW", help="these rows alone")
    parser.add_argument("--seconds", type=float, default=None, help="of racing a row")
    parser.add_argument("--out", type=Path, help="folder of speed.json and speed.md [this file's; of some rows: none]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # the peers' own
    keep_freed_memory()
    results = {}
    for key in args.only or (QUICK if args.quick else WORKS):
        results[key] = race(WORKS[key], args.seconds or (4 if args.quick else 25), 3)
        print(" | ".join(next(rows({key: results[key]}))), flush=True)
    record = {"results": results, "absent": absent(), **provenance()}
    if args.out or not (args.quick or args.only):
        folder = args.out or Path(__file__).parent
        write_json(folder / "speed.json", record, indent=1)
        write(folder / "speed.md", page(record))


if __name__ == "__main__":
    main()
