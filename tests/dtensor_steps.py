"""One of two processes that compute a meta-gradient on sharded parameters; started by tests/test_sharding.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call

import innerloop as il


def problem() -> il.Problem:
    model = network()

    def loss(params, meta, batch):
        inputs, targets = batch
        return (functional_call(model, params, (inputs,)) - targets).square().mean()

    return il.Problem(start=lambda meta: meta, inner_loss=loss, outer_loss=loss)


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers).double().requires_grad_(False)


def data() -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (4, 2, 4, 2))


METHODS = {
    "unrolled": il.Unrolled(record=False),
    "two copies": il.Unrolled(copies=2, record=False),
    "recorded": il.Unrolled(record=True),
    "truncated": il.Truncated(2),
    "first order": il.FirstOrder(),
    "window": il.Window(2),
    "implicit": il.Implicit(),
}
SOLVERS = {"sgd": il.SGD(lr=0.1, steps=4, proximal=1.0), "adam": il.Adam(lr=0.1, steps=4, proximal=1.0)}


def gradients(place=lambda name, tensor: tensor, whole=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    """The meta-gradient by every method, or an empty entry and why on standard output."""
    meta = {name: place(name, tensor) for name, tensor in network().state_dict().items()}
    a, b, c, d = (place("", tensor) for tensor in data())
    found: dict[str, torch.Tensor] = {}
    for method, estimator in METHODS.items():
        for rule, solver in SOLVERS.items():
            try:
                result = il.hypergradient(problem(), meta, il.Task((a, b), (c, d)), solver, estimator)
            except Exception as error:
                print(f"{method} {rule}: {type(error).__name__} {str(error).splitlines()[0]}", flush=True)
                continue
            found |= {f"{method} {rule} {name}": whole(grad).clone() for name, grad in result.grad.items()}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def place(name, tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if name.endswith("weight") else Replicate()])

    def whole(tensor):
        assert isinstance(tensor, DTensor)
        return tensor.full_tensor()

    found = gradients(place, whole)
    if dist.get_rank() == 0:
        save_file(found, Path(sys.argv[1]))
    dist.barrier()
    os._exit(0)  # without a word of gloo's threads, which may outlive the group
