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
from torch.nn.utils import parametrize

BatchNormMode = Literal["batch", "frozen", "step", "task"]


class TaskBatchNorm(nn.Module):
    """Batch norm without running statistics, which can take its statistics from the first rows of the batch only.

    A layer of torch's becomes one in place, and torch's again: whatever else holds it, a plain list too, follows.
    """

    kind: type[_BatchNorm]  # what it was
    weight: nn.Parameter
    bias: nn.Parameter
    affine: bool
    eps: float
    rows: int | None = None
    step: int = 0
    seen: list[tuple[Tensor, Tensor]] | None = None  # mean and variance of every pass, where they are recorded

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise ``[batch, channels, ...]`` over the batch, or by its first ``rows``."""
        if inputs.dtype in (torch.bfloat16, torch.float16):  # torch's rules for mixed precisions fail under vmap
            return self.forward(inputs.float()).to(inputs.dtype)
        weight, bias = self.scales(self.step)
        if self.affine and weight.dtype != inputs.dtype:
            weight, bias = weight.to(inputs.dtype), bias.to(inputs.dtype)
        if self.rows is None:
            return F.batch_norm(inputs, None, None, weight, bias, True, 0.0, self.eps)
        over = [axis for axis in range(inputs.ndim) if axis != 1]
        variance, mean = torch.var_mean(inputs[: self.rows], over, correction=0, keepdim=True)
        if self.seen is not None:
            self.seen.append((mean.flatten(), variance.flatten()))
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
        ValueError: an unknown mode; ``frozen`` without stored statistics; instance norm that tracks statistics; another
            mode with a batch norm whose forward pass is its own.
    """
    if mode not in get_args(BatchNormMode):
        raise ValueError(f"batch_norm={mode!r}: choose 'batch', 'frozen', 'step' or 'task'")
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats:
            raise ValueError(
                f"{name} tracks running statistics, which tasks cannot share: build it with track_running_stats=False"
            )
        if not isinstance(module, _BatchNorm):
            continue
        if mode != "frozen":
            _convert(name, module, steps if mode == "step" else None)
        elif module.running_mean is None:
            raise ValueError(
                f"batch_norm='frozen' needs stored statistics but {name} keeps none: train it with "
                "track_running_stats=True first, or use batch_norm='batch'"
            )


def _convert(name: str, norm: _BatchNorm, steps: int | None) -> None:
    kind = type(norm)
    own = kind.forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward) or "forward" in vars(norm)
    if own or parametrize.is_parametrized(norm):
        raise ValueError(
            f"{name} is a batch norm with a forward pass or weights of its own ({kind.__name__}), which would be left "
            "out: use a plain batch norm with a layer for the rest after it, or batch_norm='frozen'"
        )
    norm.__class__, norm.kind = TaskBatchNorm, kind  # type: ignore[assignment]
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    if steps is not None and norm.affine:
        norm.weight, norm.bias = (
            nn.Parameter(each.detach().repeat(steps, 1), each.requires_grad) for each in (norm.weight, norm.bias)
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

    Raises:
        ValueError: a layer that shall keep statistics is used more than once.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, TaskBatchNorm)}
    if run is not None and layers:
        for layer in layers.values():
            layer.seen = []
        with torch.no_grad(), statistics_from_first(model, rows, step):
            run()
    for name, layer in layers.items():
        if layer.affine and layer.weight.ndim > 1:
            layer.weight, layer.bias = (nn.Parameter(each, requires_grad=False) for each in layer.scales(step))
        if seen := layer.seen:
            if len(seen) > 1:
                raise ValueError(
                    f"{name} is used {len(seen)} times in a forward pass, and can keep the statistics of one use: give "
                    "each a layer of its own, or adapt with batch_norm='batch' and without inductive"
                )
            layer.running_mean, layer.running_var = seen[0]
            layer.num_batches_tracked = torch.tensor(1, device=seen[0][0].device)
        layer.track_running_stats, layer.seen = bool(seen), None  # type: ignore[assignment]
        kind = nn.BatchNorm2d if issubclass(layer.kind, nn.SyncBatchNorm) else layer.kind
        layer.__class__ = kind  # type: ignore[assignment]
        layer.eval()
