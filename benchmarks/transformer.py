"""Gradients, curvature products and whole meta-gradients of a transformer: bytes live at their peak, and time.

    python benchmarks/transformer.py                      # the committed figures: 8 blocks, 1 to 16 inner steps
    python benchmarks/transformer.py --device cuda
    python benchmarks/transformer.py --quick --out FOLDER # small, no times

Eight pre-norm blocks of width 128 on 4 sequences of 256 tokens, mean-pooled, with a linear head; everything adapts.
Each way is checked against plain autograd before it is timed, and all ways of a table are timed in turns. Memory is
what is live beyond model and data, counted from every allocation, so that it is the same in every run. Writes
transformer.json and .md (transformer-cuda.json and .md) beside this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.profiler import ProfilerActivity, profile

import innerloop as il
from innerloop import reporting
from innerloop.blockwise import Blockwise
from innerloop.curvature import curvature, gradient, second_order_kernels
from innerloop.differences import Differences

WAYS = 5


class Block(nn.Module):
    """Attention and MLP, each behind its layer norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """``[sequences, tokens, width]`` to the same."""
        parts = self.queries_keys_values(self.attention_norm(hidden)).chunk(3, -1)
        queries, keys, values = (part.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for part in parts)
        attended = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        hidden = hidden + self.out(attended.transpose(-3, -2).flatten(-2))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Pool(nn.Module):
    """The mean over tokens."""

    def forward(self, hidden: Tensor) -> Tensor:
        """``[sequences, tokens, width]`` to ``[sequences, width]``."""
        return hidden.mean(1)


def build(args: argparse.Namespace) -> tuple[nn.Module, il.Task]:
    """Model and task."""
    torch.manual_seed(0)
    blocks = (Block(args.width) for _ in range(args.depth))
    model = nn.Sequential(*blocks, Pool(), nn.Linear(args.width, WAYS)).to(args.device)
    labels = torch.arange(args.sequences) % WAYS
    parts = ((torch.randn(args.sequences, args.tokens, args.width), labels) for _ in range(2))
    return model, il.Task(*parts).to(args.device)


@second_order_kernels()
def plain_gradient(model: nn.Module, task: il.Task) -> list[Tensor]:
    """As anyone would write it."""
    params = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
    with torch.enable_grad():
        loss = F.cross_entropy(functional_call(model, params, (task.support[0],)), task.support[1])
    return list(torch.autograd.grad(loss, list(params.values())))


@second_order_kernels()
def forward_over_reverse(model: nn.Module, task: il.Task, direction: list[Tensor]) -> list[Tensor]:
    """A product by ``torch.func``: the directional derivative of the gradient."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(params: dict[str, Tensor]) -> Tensor:
        return F.cross_entropy(functional_call(model, params, (task.support[0],)), task.support[1])

    given = (dict(zip(params, direction, strict=True)),)
    return list(torch.func.jvp(torch.func.grad(loss), (params,), given)[1].values())


@second_order_kernels()
def plain_unroll(model: nn.Module, task: il.Task, steps: int, rate: float) -> list[Tensor]:
    """MAML's meta-gradient through the recorded loop."""
    with torch.enable_grad():
        start = {name: p.detach().requires_grad_() for name, p in model.named_parameters()}
        params = start
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, params, (task.support[0],)), task.support[1])
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - rate * g for (name, p), g in zip(params.items(), grads, strict=True)}
        loss = F.cross_entropy(functional_call(model, params, (task.query[0],)), task.query[1])
    return list(torch.autograd.grad(loss, list(start.values())))


def ours(model: nn.Module, task: il.Task, steps: int, rate: float, **settings: Any) -> Callable[[], list[Tensor]]:
    """The same by a learner."""
    learner = il.MetaLearner(model, inner=il.SGD(lr=rate, steps=steps), **settings)

    def step() -> list[Tensor]:
        learner.zero_grad()
        learner.meta_step([task])
        return [p.grad for p in learner.parameters() if p.grad is not None]

    return step


def peak(function: Callable[[], Any], device: str) -> float:
    """MiB live at once, at most, of those that a call allocates."""
    if device == "cuda":
        return reporting.peak_memory(function, device) / 2**20
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        function()
    now = top = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        top = max(top, now)
    return top / 2**20


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """Norm of the difference over the norm of what is expected."""
    apart = sum(float((one - other).double().square().sum()) for one, other in zip(found, expected, strict=True))
    return (apart / sum(float(other.double().square().sum()) for other in expected)) ** 0.5


Rows = dict[str, Callable[[], list[Tensor]]]


def tables(args: argparse.Namespace) -> dict[str, Rows]:
    """What is measured: of each table, the first row is what the others are compared with."""
    model, task = build(args)
    learner = il.MetaLearner(model, inner=il.SGD(lr=args.rate, steps=1))
    loop, _ = learner.loop(task)
    params = loop.begin.params
    generator = torch.Generator().manual_seed(1)
    direction = [torch.randn(p.shape, generator=generator).to(p) for p in params.values()]
    tree = dict(zip(params, direction, strict=True))

    def product(engine: Any) -> list[Tensor]:
        problem = replace(loop.problem, engine=engine)
        with second_order_kernels(engine=engine):
            return list(curvature(problem, params, loop.meta, loop.support, tree)[0].values())

    def blocks() -> list[Tensor]:
        problem = replace(loop.problem, engine=Blockwise())
        with second_order_kernels():
            return list(gradient(problem, params, loop.meta, loop.support)[0].values())

    found: dict[str, Rows] = {
        "gradient": {"plain gradient": lambda: plain_gradient(model, task), "gradient, blocks": blocks},
        "product": {
            "product, autograd": lambda: product(None),
            "product, blocks": lambda: product(Blockwise()),
            "product, differences": lambda: product(Differences()),
            "product, jvp of grad": lambda: forward_over_reverse(model, task, direction),
        },
    }
    for steps in args.steps:
        given = (model, task, steps, args.rate)
        found[str(steps)] = {
            "plain unroll": lambda given=given: plain_unroll(*given),
            "innerloop, as chosen": ours(*given),
            "innerloop, memory=0": ours(*given, memory=0),
            "innerloop, blocks": ours(*given, products="blocks"),
            "innerloop, autograd, memory=0": ours(*given, products="autograd", memory=0),
            "innerloop, differences": ours(*given, products="differences"),
        }
    return found


@torch.no_grad()
def peaks(settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The peak of every row, on its second call, in a process of its own: the profiler keeps freed memory."""
    result: dict[str, dict[str, float]] = {}
    for table, rows in tables(argparse.Namespace(**settings)).items():
        for name, row in rows.items():
            row()
            result.setdefault(table, {})[name] = peak(row, settings["device"])
    return result


def measured(rows: Rows, mib: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Distance to the first row, peak, and time of each row, in turns."""
    expected = next(iter(rows.values()))()
    found = {name: {"distance": distance(row(), expected), "mib": mib[name]} for name, row in rows.items()}
    for name, row in found.items():
        assert row["distance"] < (1e-2 if "differences" in name else 1e-4), (name, row)
    if args.repeats:
        for name, each in reporting.in_turns(rows, args.repeats, args.device, warm_up=0).items():
            found[name]["ms"] = 1000 * each.median
    for name, row in found.items():
        print(name, row, flush=True)
    return found


def shown(rows: dict[str, Any], first: str, unit: dict[str, float]) -> reporting.Table:
    """Figures, and as multiples of one plain gradient."""
    timed = "ms" in unit
    head = [first, "peak MiB", "plain gradients"] + (["ms", "plain gradients"] if timed else []) + ["distance"]
    cells = []
    for name, row in rows.items():
        times = [f"{row['ms']:.0f}", f"{row['ms'] / unit['ms']:.1f}"] if timed else []
        memory = [f"{row['mib']:.1f}", f"{row['mib'] / unit['mib']:.2f}"]
        cells.append([name, *memory, *times, f"{row['distance']:.0e}"])
    return reporting.Table(head, cells)


def page(record: dict[str, Any]) -> str:
    """The page that a record makes."""
    gradients = record["gradients"]
    unit = gradients["plain gradient"]
    parts: list[reporting.Part] = [
        f"{record['setting']}. Peak is what is live beyond model and data; plain gradients are multiples of one. The "
        "distance is that to plain autograd, relative. As chosen: by default, graphs kept within 1 GiB on a CPU.",
        shown({**gradients, **record["products"]}, "one", unit),
    ]
    for steps, rows in record["meta_gradients"].items():
        parts += [reporting.Heading(f"{steps} inner step{'s' * (steps != '1')}"), shown(rows, "meta-gradient", unit)]
    return reporting.markdown(
        "A transformer: gradients, products, meta-gradients", [*parts, f"Made by {reporting.made(record)}."]
    )


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.01, help="of the inner loop")
    parser.add_argument("--repeats", type=int, default=5, help="rounds timed, 2 or more; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="narrow, 1 and 4 steps, no times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.width, args.tokens, args.repeats = [1, 4], 32, 64, 0
    return args


def main() -> None:
    """Measure every row and write the result files."""
    args = parse()
    torch.set_num_threads(args.threads)
    mib = reporting.in_fresh_process(peaks, {name: value for name, value in vars(args).items() if name != "out"})
    with torch.no_grad():
        results = {table: measured(rows, mib[table], args) for table, rows in tables(args).items()}
    parameters = sum(p.numel() for p in build(args)[0].parameters())
    record = {
        **reporting.provenance(),
        "setting": f"{args.depth} pre-norm blocks of width {args.width}, {args.sequences} sequences of {args.tokens} "
        f"tokens, {parameters:,} parameters, all adapted, SGD inside, float32, "
        "math attention (fused under differences)",
        "gradients": results.pop("gradient"),
        "products": results.pop("product"),
        "meta_gradients": results,
    }
    stem = args.out / ("transformer" if args.device == "cpu" else f"transformer-{args.device}")
    reporting.write_json(stem.with_suffix(".json"), record, indent=1)
    reporting.write(stem.with_suffix(".md"), page(record))
    print(page(record))


if __name__ == "__main__":
    main()
