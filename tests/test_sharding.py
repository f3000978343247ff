"""Parameters, solver states and snapshots as DTensors, without hooks: two processes find what one finds."""

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call

import innerloop as il
from groups import together

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


def network() -> torch.nn.Module:
    torch.manual_seed(1)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers).double().requires_grad_(False)


def gradients(place=lambda name, tensor: tensor, whole=lambda tensor: tensor) -> dict[str, torch.Tensor]:
    """The meta-gradient by every method."""
    model = network()

    def loss(params, meta, batch):
        inputs, targets = batch
        return (functional_call(model, params, (inputs,)) - targets).square().mean()

    problem = il.Problem(start=lambda meta: meta, inner_loss=loss, outer_loss=loss)
    meta = {name: place(name, tensor) for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(2)
    a, b, c, d = (place("", torch.randn(6, width, generator=generator, dtype=torch.float64)) for width in (4, 2, 4, 2))
    found: dict[str, torch.Tensor] = {}
    for method, estimator in METHODS.items():
        for rule, solver in SOLVERS.items():
            result = il.hypergradient(problem, meta, il.Task((a, b), (c, d)), solver, estimator)
            found |= {f"{method} {rule} {name}": whole(grad).clone() for name, grad in result.grad.items()}
    return found


def shard(file: Path) -> None:
    """As one of two processes; the first writes the gradients."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))

    def place(name, tensor):
        return distribute_tensor(tensor, mesh, [Shard(0) if name.endswith("weight") else Replicate()])

    def whole(tensor):
        assert isinstance(tensor, DTensor)
        return tensor.full_tensor()

    found = gradients(place, whole)
    if dist.get_rank() == 0:
        save_file(found, file)
    dist.barrier()


def test_sharded_meta_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    file = tmp_path / "found.safetensors"
    assert together(2, partial(shard, file)) == [0, 0]
    sharded, one = load_file(file), gradients()
    assert len(one) == 4 * len(METHODS) * len(SOLVERS)
    assert sharded.keys() == one.keys()
    for name, value in one.items():
        torch.testing.assert_close(sharded[name], value, rtol=1e-6, atol=1e-9, msg=name)
