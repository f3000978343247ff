"""Several processes that train one learner: who am I, and averages over all of us.

Every function is also right in a single process, where it does nothing. Processes are started by ``torchrun``, and
joined by `join` or by the caller with ``torch.distributed.init_process_group``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def join(device: torch.device) -> None:
    """Form the group, where ``torchrun`` started several processes: NCCL between GPUs, gloo between CPUs."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def leave() -> None:
    """Dissolve the group, once all are here.

    One that ended while a thread of gloo still lets go of the last tensors would be aborted by Python.
    """
    if joined():
        dist.barrier()
        dist.destroy_process_group()


def joined() -> bool:
    """Whether this process belongs to a group of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if joined() else 0


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if joined() else 1


def check_batch(tasks: int) -> None:
    """Raise ValueError where a batch of so many tasks does not divide among the processes."""
    if tasks % world():
        raise ValueError(f"tasks_per_batch is {tasks}; it must be a multiple of {world()} processes")


def average(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor, in place, by its mean over the processes, in one exchange."""
    if not joined():
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    flat /= world()
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather(items: list[T]) -> list[T]:
    """The lists of all processes, one after the other in order of rank."""
    if not joined():
        return items
    lists: list[list[T]] = [[] for _ in range(world())]
    dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def broadcast(module: nn.Module) -> None:
    """Give every process the weights and buffers of rank 0."""
    if joined():
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, 0)


def wait() -> None:
    """Go on when all processes are here."""
    if joined():
        dist.barrier()


def agree(item: T) -> T:
    """What rank 0 was given."""
    items = [item]
    if joined():
        dist.broadcast_object_list(items, 0)
    return items[0]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the block on rank 0 and then on the others, who find in the cache what it has fetched."""
    if joined() and rank() > 0:
        dist.barrier()
    yield
    if joined() and rank() == 0:
        dist.barrier()
