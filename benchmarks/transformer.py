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
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
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
from innerloop.blockwise import Blockwise
from innerloop.curvature import curvature, gradient, second_order_kernels
from innerloop.differences import Differences
from innerloop.studies.measure import quiet_environment

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
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
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


def peaks(found: dict[str, Rows], device: str) -> dict[str, dict[str, float]]:
    """The peak of every row, on its second call."""
    result: dict[str, dict[str, float]] = {}
    for table, rows in found.items():
        for name, row in rows.items():
            row()
            result.setdefault(table, {})[name] = peak(row, device)
    return result


def peaks_in_fresh_process() -> dict[str, dict[str, float]]:
    """The same in another process, since what records allocations keeps freed memory from going back."""
    command = [sys.executable, __file__, *sys.argv[1:], "--peaks"]
    done = subprocess.run(command, env=quiet_environment(), check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measured(rows: Rows, mib: dict[str, float], args: argparse.Namespace) -> dict[str, Any]:
    """Distance to the first row, peak, and time of each row, in turns."""
    expected = next(iter(rows.values()))()
    found = {name: {"distance": distance(row(), expected), "mib": mib[name]} for name, row in rows.items()}
    for name, row in found.items():
        assert row["distance"] < (1e-2 if "differences" in name else 1e-4), (name, row)
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for _ in range(args.repeats):
        for name, row in rows.items():
            if args.device == "cuda":
                torch.cuda.synchronize()
            began = time.perf_counter()
            row()
            if args.device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    for name, each in seconds.items():
        if each:
            found[name]["ms"] = 1000 * statistics.median(each)
        print(name, found[name], flush=True)
    return found


def markdown(rows: dict[str, Any], first: str, unit: dict[str, float]) -> str:
    """A table: figures, and as multiples of one plain gradient."""
    timed = "ms" in unit
    heads = [first, "peak MiB", "plain gradients"] + (["ms", "plain gradients"] if timed else []) + ["distance"]
    lines = ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for name, row in rows.items():
        cells = [name, f"{row['mib']:.1f}", f"{row['mib'] / unit['mib']:.2f}"]
        cells += [f"{row['ms']:.0f}", f"{row['ms'] / unit['ms']:.1f}"] if timed else []
        lines.append("| " + " | ".join([*cells, f"{row['distance']:.0e}"]) + " |")
    return "\n".join(lines)


def commit() -> str:
    """The commit that is measured, or 'unknown'."""
    command, place = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=place)
    return done.stdout.strip() or "unknown"


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 2, 4, 16])
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--sequences", type=int, default=4)
    parser.add_argument("--rate", type=float, default=0.01, help="of the inner loop")
    parser.add_argument("--repeats", type=int, default=5, help="rounds timed; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="narrow, 1 and 4 steps, no times")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--peaks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.width, args.tokens, args.repeats = [1, 4], 32, 64, 0
    return args


def main() -> None:
    """Measure every row and write the result files."""
    args = parse()
    torch.set_num_threads(args.threads)
    with torch.no_grad():
        rows = tables(args)
        if args.peaks:
            print(json.dumps(peaks(rows, args.device)))
            return
        mib = peaks_in_fresh_process()
        results = {table: measured(rows[table], mib[table], args) for table in rows}
    gradients, products = results.pop("gradient"), results.pop("product")
    parameters = sum(p.numel() for p in build(args)[0].parameters())
    accelerator = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    record = {
        "command": shlex.join(["python", "benchmarks/transformer.py", *sys.argv[1:]]),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "accelerator": accelerator},
        "setting": f"{args.depth} pre-norm blocks of width {args.width}, {args.sequences} sequences of {args.tokens} "
        f"tokens, {parameters:,} parameters, all adapted, SGD inside, float32, "
        "math attention (fused under differences)",
        "gradients": gradients,
        "products": products,
        "meta_gradients": results,
    }
    unit = gradients["plain gradient"]
    text = f"""# A transformer: gradients, products, meta-gradients

{record["setting"]}.
Peak is what is live beyond model and data; "plain gradients" are multiples of one. The distance is that to plain
autograd, relative. "As chosen" is by default: graphs are kept within 1 GiB on a CPU.

{markdown({**gradients, **products}, "one", unit)}
"""
    for steps, rows in results.items():
        text += f"\n## {steps} inner step{'s' * (steps != '1')}\n\n{markdown(rows, 'meta-gradient', unit)}\n"
    text += f"""
Made by `{record["command"].strip()}` at commit {record["commit"]}, Python {platform.python_version()}, torch
{torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, accelerator: {accelerator}.
"""
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / ("transformer" if args.device == "cpu" else f"transformer-{args.device}")
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
