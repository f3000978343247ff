"""Peak memory and time of one meta-step against the number of inner steps, each measured in a process of its own.

    python benchmarks/memory.py                     # the committed figures: CPU, 1 to 100 inner steps
    python benchmarks/memory.py --device cuda --steps 1 5 20

Writes memory-<device>.json, .md and .png beside this file. Peak memory is what the process gains over the loaded
model and
data: the resident high-water mark on the CPU, the allocator's on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.func import functional_call

import innerloop as il

LR = 0.1
ESTIMATORS: dict[str, Callable[[], il.meta_gradient.MetaGradient]] = {
    "first-order": il.FirstOrder,
    "unrolled": il.Unrolled,
    "unrolled, snapshots thinned": lambda: il.Unrolled(keep_every="sqrt"),
    "truncated:1": lambda: il.Truncated(1),
}
METHODS = (*ESTIMATORS, "autograd through the loop")


def batch(tasks: int, shots: int, device: str) -> il.Task:
    """Random images in the shape of 5-way Omniglot tasks with 5 queries a class."""
    generator = torch.Generator().manual_seed(0)

    def part(images: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(5).repeat_interleave(images).expand(tasks, -1).contiguous()
        return torch.rand(tasks, 5 * images, 1, 28, 28, generator=generator), labels

    return il.Task(part(shots), part(5)).to(device)


def autograd_step(learner: il.MetaLearner, tasks: il.Task, steps: int) -> None:
    """The same meta-gradient by back-propagation through the recorded inner loop, task after task."""
    model = learner.model
    count = len(tasks.support[1])
    for task in range(count):
        (inputs, targets), (query, wanted) = ((x[task], y[task]) for x, y in tasks)
        params = dict(model.named_parameters())
        for _ in range(steps):
            loss = F.cross_entropy(functional_call(model, params, (inputs,)), targets)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - LR * g for (name, p), g in zip(params.items(), grads, strict=True)}
        (F.cross_entropy(functional_call(model, params, (query,)), wanted) / count).backward()


def measure(method: str, steps: int, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB above the start, and median seconds, of one meta-step in this process."""
    torch.manual_seed(0)
    model = il.models.Conv4(in_channels=1, ways=5, filters=args.filters)
    estimator = ESTIMATORS.get(method, il.Unrolled)()
    learner = il.MetaLearner(model, inner=il.SGD(lr=LR, steps=steps), meta_gradient=estimator, chunk_size=args.chunk)
    learner.to(args.device)
    tasks = batch(args.tasks, args.shots, args.device)

    def meta_step() -> None:
        if method in ESTIMATORS:
            learner.meta_step(tasks)
        else:
            autograd_step(learner, tasks, steps)
        if args.device == "cuda":
            torch.cuda.synchronize()

    # Libraries load their kernels on first use; that is not the meta-step's memory.
    small = il.MetaLearner(il.models.Conv4(in_channels=1, ways=5, filters=2), inner=il.SGD(lr=LR, steps=1)).to(
        args.device
    )
    small.meta_step(batch(1, 1, args.device))
    before = peak(args.device)
    meta_step()
    gained = peak(args.device) - before
    norm = sum(float(p.grad.square().sum()) for p in learner.parameters()) ** 0.5
    seconds = []
    for _ in range(args.repeats):
        begin = time.perf_counter()
        meta_step()
        seconds.append(time.perf_counter() - begin)
    return {"mib": gained / 2**20, "seconds": statistics.median(seconds), "gradient_norm": norm}


def peak(device: str) -> int:
    """High-water mark in bytes."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_fresh_process(method: str, steps: int) -> dict[str, float]:
    """Run this file again for one row, where freed memory goes back to the system at once and the mark is honest."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", method, str(steps)]
    quiet = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True)
    if done.returncode:
        return {
            "failed": done.stderr.strip().splitlines()[-1][:200] if done.stderr.strip() else f"exit {done.returncode}"
        }
    return json.loads(done.stdout.splitlines()[-1])


def commit() -> str:
    """The commit that is measured, or 'unknown'."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return done.stdout.strip() or "unknown"


def table(results: dict, steps: list[int], key: str, form: str) -> str:
    """A Markdown table of one figure."""
    lines = ["| inner steps | " + " | ".join(map(str, steps)) + " |", "| --- " * (len(steps) + 1) + "|"]
    for method, row in results.items():
        cells = [format(row[str(s)][key], form) if key in row[str(s)] else "failed" for s in steps]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(results: dict, steps: list[int], path: Path) -> None:
    """Memory against steps, one line a method."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for method, row in results.items():
        shown = [s for s in steps if "mib" in row[str(s)]]
        axes.plot(shown, [row[str(s)]["mib"] for s in shown], "o-", label=method)
    axes.set(xlabel="inner steps", ylabel="peak memory of a meta-step, MiB", yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every row and write the result files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20, 50, 100])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=1, help="tasks computed at once")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=1, help="meta-steps timed after the measured one")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--only", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        print(json.dumps(measure(args.only[0], int(args.only[1]), args)))
        return

    results: dict[str, dict[str, dict[str, float]]] = {}
    for method in args.methods:
        for steps in args.steps:
            results.setdefault(method, {})[str(steps)] = in_fresh_process(method, steps)
            print(method, steps, results[method][str(steps)], flush=True)
    accelerator = torch.cuda.get_device_name() if args.device == "cuda" else "none"
    record = {
        "command": "python benchmarks/memory.py " + " ".join(sys.argv[1:]),
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "machine": {"processor": platform.machine(), "threads": torch.get_num_threads(), "accelerator": accelerator},
        "setting": f"Conv4, {args.filters} filters, 28x28, 5-way {args.shots}-shot, 5 queries a class, "
        f"{args.tasks} tasks, {args.chunk} at once, SGD inside, float32",
        "results": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    stem = args.out / f"memory-{args.device}"
    stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    text = f"""# Memory of one meta-step against inner steps

{record["setting"]}. Peak memory above the loaded model, MiB, each cell a fresh process:

{table(results, args.steps, "mib", ".0f")}

Seconds of one meta-step:

{table(results, args.steps, "seconds", ".2f")}

Made by `{record["command"].strip()}` at commit {record["commit"]}, Python {platform.python_version()}, torch
{torch.__version__}, {platform.machine()}, {torch.get_num_threads()} threads, accelerator: {accelerator}.
"""
    stem.with_suffix(".md").write_text(text)
    draw(results, args.steps, stem.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
