"""Several processes that train one learner: who am I, and averages over all of us.

Every function is also right in a single process, where it does nothing. Processes are started by ``torchrun``, and
joined by `join` or by the caller with ``torch.distributed.init_process_group``.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from innerloop.errors import Failed

T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)  # after which a process that does not answer counts as lost
PREPARING = timedelta(days=1)  # that rank 0 may take to fetch and decode the data
AHEAD = 3.0  # seconds that rank 0 has to report an error before another process does


def started() -> int:
    """How many processes the launcher says it has started, before they are joined."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(device: torch.device) -> None:
    """Form the group, where ``torchrun`` started several processes: NCCL between GPUs, gloo between CPUs."""
    if started() > 1:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with _others():
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo",
                store=_store(),
                rank=int(os.environ["RANK"]),
                world_size=started(),
                timeout=TIMEOUT,
            )
        wait()  # one that ends at once, in error, would break the joining of the others


@cache
def _store() -> dist.Store:
    """Where the processes meet: of its own for every restart, since the addresses of those that died are stale."""
    store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
    return dist.PrefixStore(f"innerloop/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def speaks() -> bool:
    """Whether this process is the one to report an error: the first that asks, and rank 0 before the others.

    Before they are joined the processes that were not started by ``torchrun`` have no place to ask, and all speak.
    """
    if started() == 1 or not (joined() or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"):
        return True
    if os.environ.get("RANK") != "0":
        time.sleep(AHEAD)
    try:
        return bool(_store().add("spoken", 1) == 1)
    except (RuntimeError, ValueError):  # who held the store is gone
        return os.environ.get("RANK", "0") == "0"


@contextmanager
def _others() -> Iterator[None]:
    """Within the block torch's errors are those of a connection."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # gloo puts a place in its source before the reason, and guesses behind it
        reason = re.sub(r"^\[\S+:\d+\] ", "", (str(error) or type(error).__name__).splitlines()[0]).partition(". ")[0]
        raise Failed(f"the connection to the other processes failed ({reason})") from error


def leave() -> None:
    """Dissolve the group, once all are here.

    One that ended while a thread of gloo still lets go of the last tensors would be aborted by Python.
    """
    if joined():
        wait()
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
    """Raise ValueError where a batch of so many tasks leaves a process without one."""
    if tasks < world():
        raise ValueError(
            f"tasks_per_batch is {tasks}, fewer than {world()} processes: start {tasks}, or give more tasks"
        )


def shares(tasks: int) -> list[range]:
    """The tasks of a batch that each process computes; where they do not divide, the first ones have one more."""
    each, more = divmod(tasks, world())
    ends = [each * (place + 1) + min(place + 1, more) for place in range(world())]
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def average(tensors: Sequence[Tensor], weight: float) -> None:
    """Replace each tensor, in place, by its mean over the processes, in one exchange; their weights add up to 1."""
    if not joined():
        return
    flat = weight * torch.cat([tensor.flatten() for tensor in tensors])
    with _others():
        dist.all_reduce(flat)
    for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def gather(items: list[T]) -> list[T]:
    """The lists of all processes, one after the other in order of rank."""
    if not joined():
        return items
    lists: list[list[T]] = [[] for _ in range(world())]
    with _others():
        dist.all_gather_object(lists, items)
    return [item for each in lists for item in each]


def broadcast(module: nn.Module) -> None:
    """Give every process the weights and buffers of rank 0."""
    if joined():
        with _others():
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


def wait() -> None:
    """Go on when all processes are here."""
    if joined():
        with _others():
            dist.barrier()


def agree(item: T) -> T:
    """What rank 0 was given."""
    return gather([item])[0]


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the block on rank 0 and then on the others, who find in the cache what it has fetched."""
    if joined() and rank() > 0:
        with _others():
            _store().wait(["prepared"], PREPARING)
    yield
    if joined() and rank() == 0:
        _store().set("prepared", "yes")
