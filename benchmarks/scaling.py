"""Bytes and time of an outer step by the number of processes; docs/scaling.md has the model of cost.

torchrun --standalone --nproc-per-node N benchmarks/scaling.py [TASKS]
"""

import statistics
import sys
import time

import torch
import torch.distributed as dist

import innerloop as il
from innerloop.training import processes

STEPS, WARM = 13, 3


def main(tasks_per_batch: int = 8) -> None:
    torch.set_num_threads(1)
    processes.join(torch.device("cpu"))
    tasks = il.tasks.glyphs(ways=5, shots=1, queries=5)
    model = il.models.Conv4(in_channels=1, ways=5)
    learner = il.MetaLearner(model, adapts=il.Everything(), inner=il.SGD(lr=0.1, steps=3))
    sent, marks, waits = [0], [], []
    reduce, average = dist.all_reduce, processes.average

    def counted(tensor, *args, **options):
        sent[0] += tensor.numel() * tensor.element_size()
        return reduce(tensor, *args, **options)

    def timed(*args, **options):
        processes.wait()  # what one process waits for another is no time of the exchange
        began = time.perf_counter()
        average(*args, **options)
        waits.append(time.perf_counter() - began)

    dist.all_reduce, processes.average = counted, timed
    il.fit(
        learner, tasks, steps=STEPS, tasks_per_batch=tasks_per_batch, validation_tasks=0, validate_every=10**6,
        progress=False, log=lambda record: marks.append(time.perf_counter()),
    )  # fmt: skip
    if processes.rank() == 0:
        steps = [after - before for before, after in zip(marks[WARM - 1 :], marks[WARM:], strict=False)]
        print(
            f"{processes.world()} processes, {tasks_per_batch} tasks, "
            f"{sum(parameter.numel() for parameter in learner.parameters()):,} parameters: "
            f"{sent[0] // STEPS:,} bytes and {1e3 * statistics.median(steps):.1f} ms a step, "
            f"of which {1e3 * statistics.median(waits[WARM:]):.2f} ms are the exchange"
        )
    processes.leave()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
