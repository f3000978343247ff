"""What batch norm means inside a task, in four named modes.

========  ======================================  ==========================================
mode      support images are normalised by        query images are normalised by
========  ======================================  ==========================================
batch     the support set's statistics            the query set's own (transductive)
task      the support set's statistics            the support set's (inductive)
frozen    the model's stored running statistics   the same
step      as in "batch", with scale and shift of the inner step's own (MAML++, arXiv 1810.09502)
========  ======================================  ==========================================

"batch" is the default and what the papers do. Running statistics are never updated in any mode.

In "step" mode scale and shift have a row for each inner step, ``[steps, channels]``: row k is for the support set in
step k and the queries after it, the last row for all further steps. They are meta-learned and do not adapt. Statistics
are a step's own because they are those of its batch; none are stored.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

BatchNormMode = Literal["batch", "frozen", "step", "task"]


class TaskBatchNorm(nn.Module):
    """Batch norm without running statistics, which can take its statistics from the first rows of the batch only.

    It shares the weight and bias of the layer it stands in for; for so many ``steps`` it has a copy for each.
    """

    def __init__(self, norm: _BatchNorm, steps: int | None = None) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.affine = norm.weight, norm.bias, norm.eps, norm.affine
        self.kind = type(norm)
        if steps is not None and self.affine:
            self.weight, self.bias = (
                nn.Parameter(each.detach().repeat(steps, 1), each.requires_grad) for each in (norm.weight, norm.bias)
            )
        self.rows: int | None = None
        self.step = 0
        self.seen: tuple[Tensor, Tensor] | None = None

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``[batch, channels, ...]`` over the batch, or by its first ``rows``."""
        if inputs.dtype in (torch.bfloat16, torch.float16):  # torch's rules for mixed precisions fail under vmap
            return self(inputs.float()).to(inputs.dtype)
        weight, bias = self.scales(self.step)
        if self.rows is None:
            return F.batch_norm(inputs, None, None, weight, bias, True, 0.0, self.eps)
        over = [axis for axis in range(inputs.ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs[: self.rows], over, correction=0, keepdim=True)
        if self.seen is not None:
            self.seen = (mean.flatten(), variance.flatten())
        normal = (inputs - mean) * torch.rsqrt(variance + self.eps)
        if not self.affine:
            return normal
        shape = (1, -1) + (1,) * (inputs.ndim - 2)
        return normal * weight.view(shape) + bias.view(shape)

    def scales(self, step: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of an inner step."""
        if not self.affine or self.weight.ndim == 1:
            return self.weight, self.bias
        row = min(step, len(self.weight) - 1)
        return self.weight[row], self.bias[row]


def convert(model: nn.Module, mode: BatchNormMode, steps: int) -> None:
    """Prepare a model, in place, for one of the modes.

    Args:
        model: a copy that may be changed.
        mode: one of ``batch``, ``task``, ``frozen``, ``step``.
        steps: inner steps, for ``step``.

    Raises:
        ValueError: an unknown mode; ``frozen`` without stored statistics; instance norm that tracks statistics.
    """
    if mode not in get_args(BatchNormMode):
        raise ValueError(f"batch_norm={mode!r}: choose 'batch', 'frozen', 'step' or 'task'")
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"{name} tracks running statistics, which tasks cannot share: build it with track_running_stats=False"
            )
        if not isinstance(module, _BatchNorm):
            continue
        if mode != "frozen":
            _replace(model, name, TaskBatchNorm(module, steps if mode == "step" else None))
        elif module.running_mean is None:
            raise ValueError(
                f"batch_norm='frozen' needs stored statistics but {name} keeps none: train it with "
                "track_running_stats=True first, or use batch_norm='batch'"
            )


def affine_names(model: nn.Module) -> set[str]:
    """Names in ``model.named_parameters()`` of batch norm's scales and shifts, whether it is converted or not."""
    layers = [module for module in model.modules() if isinstance(module, (TaskBatchNorm, _BatchNorm))]
    inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in inside}


def freeze(model: nn.Module) -> None:
    """Keep remaining batch-norm layers (those of mode ``frozen``) on their stored statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()


@contextlib.contextmanager
def statistics_from_first(model: nn.Module, rows: int | None, step: int = 0) -> Iterator[None]:
    """Within this context the converted layers take their statistics from the first ``rows`` of each batch.

    Args:
        model: a converted model.
        rows: how many; None means all, as outside the context.
        step: the inner step whose scale and shift they take, where each has its own.
    """
    layers = [module for module in model.modules() if isinstance(module, TaskBatchNorm)]
    for layer in layers:
        layer.rows, layer.step = rows, step
    try:
        yield
    finally:
        for layer in layers:
            layer.rows, layer.step = None, 0


def to_torch(model: nn.Module, run: Callable[[], object] | None = None, rows: int = 0, step: int = 0) -> None:
    """Put torch's own batch-norm layers back, in place, so that the model needs nothing of this library.

    Args:
        model: a converted model that may be changed.
        run: passes through the model the inputs whose statistics the layers shall keep and use for everything that
            follows; None leaves the layers without stored statistics, so that each batch is normalised by its own.
        rows: how many inputs those are.
        step: the inner step whose scale and shift they keep, where each has its own.
    """
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, TaskBatchNorm)
    }
    if run is not None and layers:
        for layer in layers.values():
            layer.seen = (torch.zeros(()), torch.zeros(()))  # anything but None asks the layer to record
        with torch.no_grad(), statistics_from_first(model, rows, step):
            run()
    for name, layer in layers.items():
        norm = _torch_layer(layer, step)
        if layer.seen is not None:
            norm.track_running_stats = True
            norm.register_buffer("running_mean", layer.seen[0].clone())
            norm.register_buffer("running_var", layer.seen[1].clone())
            norm.register_buffer("num_batches_tracked", torch.tensor(1, device=layer.seen[0].device))
        norm.eval()
        _replace(model, name, norm)


def _torch_layer(layer: TaskBatchNorm, step: int) -> _BatchNorm:
    kind = nn.BatchNorm2d if issubclass(layer.kind, nn.SyncBatchNorm) else layer.kind
    weight, bias = layer.scales(step)
    channels = 1 if weight is None else len(weight)
    norm = kind(channels, eps=layer.eps, affine=weight is not None, track_running_stats=False)
    if weight is not None:
        norm.weight, norm.bias = (
            each if isinstance(each, nn.Parameter) else nn.Parameter(each, requires_grad=False)
            for each in (weight, bias)
        )
    return norm


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    if not name:
        raise ValueError("a lone batch-norm layer is no model: wrap it in an nn.Sequential")
    model.set_submodule(name, new)
