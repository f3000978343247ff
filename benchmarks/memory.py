"""Peak memory and time of one meta-step, each cell measured in a process of its own.

    python benchmarks/memory.py                     # the committed figures: CPU, 1 to 100 inner steps
    python benchmarks/memory.py --device cuda --steps 1 5 20
    python benchmarks/memory.py --quick --out FOLDER    # small, and all in one process

Three tables: against the inner steps for every method, and at 20 inner steps against the iterations of conjugate
gradient and against the window. Writes memory-<device>.json, .md and .png beside this file. Peak memory is what a
meta-step gains over the loaded model and data: resident memory of the process on the CPU, the allocator's on a GPU.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.func import functional_call

import innerloop as il
from innerloop import reporting
from innerloop.errors import Failed
from innerloop.reporting.figures import MARKED, OWN, Line, Panel, panels, save

RECORDED = il.Unrolled(record=True)
AUTOGRAD = "autograd"  # rows that begin so go back through the recorded inner loop, by plain autograd
BY_HAND = "autograd, ANIL, features once"  # without the library, which keeps more of the features' computation

# What each row hands to MetaLearner, by the iterations of conjugate gradient and the window size.
ROWS: dict[str, Any] = {
    "first-order": lambda cg, window: {"meta_gradient": il.FirstOrder()},
    "reptile": lambda cg, window: {"meta_gradient": il.Reptile()},
    "unrolled": lambda cg, window: {"meta_gradient": il.Unrolled()},
    "unrolled, 10 copies": lambda cg, window: {"meta_gradient": il.Unrolled(copies=10)},
    "truncated:1": lambda cg, window: {"meta_gradient": il.Truncated(1)},
    "mixed:1=0.2,3=0.3,5=0.5": lambda cg, window: {"meta_gradient": il.Mixed((1, 3, 5), (0.2, 0.3, 0.5))},
    "binomial:2": lambda cg, window: {"meta_gradient": il.Binomial(2)},
    "window, frozen": lambda cg, window: {"meta_gradient": il.Window(window)},
    "window, true forward": lambda cg, window: {"meta_gradient": il.Window(window, "true_forward")},
    "implicit": lambda cg, window: {"meta_gradient": il.Implicit(il.CG(cg))},
    "memory-reduced": lambda cg, window: {"adapts": il.Head(), "meta_gradient": il.MemoryReduced(il.CG(cg))},
    "ANIL, features once": lambda cg, window: {"adapts": il.Head()},
    "ANIL, features every step": lambda cg, window: {"adapts": il.Head(), "reuse_prefix": False},
    "autograd": lambda cg, window: {"meta_gradient": RECORDED},
    BY_HAND: lambda cg, window: {"adapts": il.Head()},
    "autograd, ANIL, features every step": lambda cg, window: {
        "adapts": il.Head(), "meta_gradient": RECORDED, "reuse_prefix": False
    },
}  # fmt: skip
TERMS = {"implicit": {"proximal": 2.0}, "memory-reduced": {"weight_decay": 0.05}}  # of the inner solver
CG, WINDOW = 5, 5  # where they do not vary
VARIES = {"Inner steps": "steps", "Iterations of conjugate gradient": "iterations", "Steps in a window": "window"}
SOLVING, WINDOWED = ("implicit", "memory-reduced"), ("window, frozen", "window, true forward")


class Cell(NamedTuple):
    """One measurement: a row of a table, and what varies."""

    row: str
    steps: int
    cg: int = CG
    window: int = WINDOW


def tables(args: argparse.Namespace) -> dict[str, dict[str, dict[int, Cell]]]:
    """What is to be measured: of each table, a row a method, a column a value of what varies."""
    iterations = {row: {n: Cell(row, args.fixed_steps, cg=n) for n in args.iterations} for row in SOLVING}
    windows = {row: {n: Cell(row, args.fixed_steps, window=n) for n in args.windows} for row in WINDOWED}
    return {
        "Inner steps": {row: {n: Cell(row, n) for n in args.steps} for row in args.methods},
        "Iterations of conjugate gradient": iterations,
        "Steps in a window": windows,
    }


def batch(tasks: int, shots: int, device: str) -> il.Task:
    """Random images in the shape of 5-way Omniglot tasks with 5 queries a class."""
    generator = torch.Generator().manual_seed(0)

    def part(images: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(5).repeat_interleave(images).expand(tasks, -1).contiguous()
        return torch.rand(tasks, 5 * images, 1, 28, 28, generator=generator), labels

    return il.Task(part(shots), part(5)).to(device)


def build(cell: Cell, filters: int, chunk: int, device: str) -> il.MetaLearner:
    """The learner of a cell."""
    torch.manual_seed(0)
    model = il.models.Conv4(in_channels=1, ways=5, filters=filters)
    inner = il.SGD(lr=0.1, steps=cell.steps, **TERMS.get(cell.row, {}))
    row = ROWS[cell.row](cell.cg, cell.window)
    # no memory to spare: graphs are kept where a row says so, and nowhere else
    return il.MetaLearner(model, inner=inner, chunk_size=chunk, memory=0, **row).to(device)


def step_by_hand(learner: il.MetaLearner, tasks: il.Task) -> None:
    """ANIL by plain autograd, task after task, the features of each computed once."""
    body, head, count = learner.model[:-1], learner.model[-1], len(tasks.support[1])
    for task in range(count):
        (inputs, targets), (query, wanted) = ((body(x[task]), y[task]) for x, y in tasks)
        params = dict(head.named_parameters())
        for _ in range(learner.inner.steps):
            loss = F.cross_entropy(functional_call(head, params, (inputs,)), targets)
            grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
            params = {name: p - learner.inner.lr * g for (name, p), g in zip(params.items(), grads, strict=True)}
        (F.cross_entropy(functional_call(head, params, (query,)), wanted) / count).backward()


def measure(cell: Cell, args: argparse.Namespace) -> dict[str, float]:
    """Peak memory in MiB above the start, and median seconds, of one meta-step in this process."""
    learner = build(cell, args.filters, args.chunk, args.device)
    tasks = batch(args.tasks, args.shots, args.device)
    meta_step = step_by_hand if cell.row == BY_HAND else il.MetaLearner.meta_step
    # Libraries load their kernels on first use; that is not the meta-step's memory.
    meta_step(build(cell._replace(steps=2), 2, 1, args.device), batch(1, 1, args.device))
    gained = reporting.peak_memory(lambda: meta_step(learner, tasks), args.device)
    norm = sum(float(p.grad.square().sum()) for p in learner.parameters() if p.grad is not None) ** 0.5
    found = {"mib": gained / 2**20, "gradient_norm": norm}
    if args.repeats:
        found["seconds"] = reporting.time_of(lambda: meta_step(learner, tasks), args.repeats, args.device).median
    return found


def measured(cells: list[list[Any]], settings: dict[str, Any]) -> list[dict[str, float]]:
    """Of some cells, in this process."""
    return [measure(Cell(*cell), argparse.Namespace(**settings)) for cell in cells]


def measured_apart(cells: list[Cell], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The same in a fresh process."""
    needed = ("filters", "chunk", "device", "tasks", "shots", "repeats")
    try:
        return reporting.in_fresh_process(measured, cells, {name: getattr(args, name) for name in needed})
    except Failed as error:
        return [{"failed": str(error)[:200]}] * len(cells)


def activations(args: argparse.Namespace) -> float:
    """MiB that autograd keeps of one pass of a support set through the body."""
    model = il.models.Conv4(in_channels=1, ways=5, filters=args.filters)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model[:-1](batch(1, args.shots, "cpu").support[0][0])
    for tensor in (*model.parameters(), *model.buffers()):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del out
    return sum(kept.values()) / 2**20


Results = dict[str, dict[str, dict[str, Any]]]


def shown(varies: str, results: Results, key: str, form: str) -> reporting.Table:
    """One figure, and of memory what each row gains a step of what varies."""
    columns = list(next(iter(results.values())))
    rows = []
    for method, row in results.items():
        found = [(int(n), cell[key]) for n, cell in row.items() if key in cell]
        each = (found[-1][1] - found[0][1]) / (found[-1][0] - found[0][0]) if len(found) > 1 else 0.0
        cells = [format(row[n][key], form) if key in row[n] else "failed" for n in columns]
        rows.append([method, *cells, f"{each:+.3f}" if len(found) > 1 else "–"])
    return reporting.Table([varies, *columns, "gain each"], rows)


def page(record: dict[str, Any], picture: str) -> str:
    """The page that a record makes."""
    parts: list[reporting.Part] = [
        f"{record['setting']}. Peak memory above the loaded model in MiB; the last column is what one more gains, from "
        f"the first column to the last. Autograd keeps {record['support_activations_mib']:.2f} MiB of activations of "
        "one pass of a support set through the body.",
        reporting.Gallery([reporting.Picture(picture, "Peak memory against inner steps, a line a method")]),
    ]
    for title, varies in VARIES.items():
        parts += [reporting.Heading(title), shown(varies, record["results"][title], "mib", ".1f")]
    steps = record["results"]["Inner steps"]
    if all("seconds" in cell for row in steps.values() for cell in row.values() if "mib" in cell):
        parts += [reporting.Heading("Seconds of one meta-step"), shown("inner steps", steps, "seconds", ".2f")]
    return reporting.markdown("Memory of one meta-step", [*parts, f"Made by {reporting.made(record)}."])


def draw(results: Results, path: Path) -> None:
    """Memory against steps, one line a method."""
    lines = {}
    for method, row in results.items():
        found = [(int(n), cell["mib"]) for n, cell in row.items() if "mib" in cell]
        look = MARKED | {"marker": OWN, "linestyle": "--" if method.startswith(AUTOGRAD) else "-"}
        lines[method] = Line(*zip(*found, strict=True), look)
    axes = {"xlabel": "inner steps", "ylabel": "peak memory of a meta-step, MiB", "yscale": "log"}
    save(path, panels([Panel(lines, axes)], width=7.2, height=4.6))


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 20, 50, 100])
    parser.add_argument("--methods", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--iterations", type=int, nargs="+", default=[1, 5, 20, 80], help="of conjugate gradient")
    parser.add_argument("--windows", type=int, nargs="+", default=[1, 2, 5, 10, 20])
    parser.add_argument("--fixed-steps", type=int, default=20, help="inner steps where something else varies")
    parser.add_argument("--tasks", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=1, help="tasks computed at once")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--filters", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3, help="meta-steps timed, 2 or more; 0 for none")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--quick", action="store_true", help="few steps, 8 filters, no times, all in one process")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    if args.quick:
        args.steps, args.iterations, args.windows, args.fixed_steps = [1, 6, 11], [1, 20], [1, 5], 5
        args.filters, args.shots, args.repeats = 8, 5, 0
    return args


def main() -> None:
    """Measure every row and write the result files."""
    args = parse()
    asked = tables(args)
    cells = list(dict.fromkeys(cell for rows in asked.values() for row in rows.values() for cell in row.values()))
    found: dict[Cell, dict[str, Any]] = {}
    for group in [cells] if args.quick else [[cell] for cell in cells]:
        found.update(zip(group, measured_apart(group, args), strict=True))
        for cell in group:
            print(*cell, found[cell], flush=True)
    results: dict[str, Results] = {
        title: {row: {str(n): found[cell] for n, cell in cells.items()} for row, cells in rows.items()}
        for title, rows in asked.items()
    }
    record = {
        **reporting.provenance(),
        "setting": f"Conv4, {args.filters} filters, 28x28, 5-way {args.shots}-shot, 5 queries a class, "
        f"{args.tasks} tasks, {args.chunk} at once, SGD inside, float32; where they do not vary, "
        f"{args.fixed_steps} inner steps, {CG} iterations of conjugate gradient, windows of {WINDOW}",
        "support_activations_mib": activations(args),
        "results": results,
    }
    stem = args.out / f"memory-{args.device}"
    reporting.write_json(stem.with_suffix(".json"), record, indent=1)
    reporting.write(stem.with_suffix(".md"), page(record, f"{stem.name}.png"))
    draw(results["Inner steps"], stem.with_suffix(".png"))
    print(page(record, f"{stem.name}.png"))


if __name__ == "__main__":
    main()
