"""No inner loop in training: plain classification of all training classes, whose features new tasks then use.

    grad  =  d / d meta  mean over single images of  loss(model(image), its training class)

The model's head has one row a training class. It serves training alone: a start that makes a head of the support set
takes its place in evaluation (the "Classifier-Baseline" of Chen et al., arXiv 2003.04390).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from innerloop.inner import InnerLoop
from innerloop.meta_gradient._base import MetaGradient, Result
from innerloop.problem import Batch, Task


@dataclass(frozen=True)
class Supervised(MetaGradient):
    """Not a gradient of what tasks are judged by: the model learns to tell all training classes apart.

    `innerloop.fit` draws batches of single images for it, ``tasks.single_images()``, as many as those of the tasks
    would be. All images of a batch pass the model together. With ``batch_norm="frozen"`` its batch norm takes the
    batch's statistics there and keeps running ones, which evaluation and adaptation use.

    Raises:
        ValueError: a source without single images; in a meta-step, a head with fewer rows than training classes, or
            anything but a `MetaLearner` on stacked tasks.

    Source:
        Chen, Wang, Liu, Xu and Darrell 2020, arXiv 2003.04390.

    Example:
        >>> model = il.models.Conv4(in_channels=1, ways=tasks.single_images().output_size)
        >>> inner, start = il.SGD(lr=0.1, steps=0), il.Prototypes(cosine=True)
        >>> learner = il.MetaLearner(model, il.Head(), inner, il.Supervised(), batch_norm="frozen", start=start)
        >>> il.fit(learner, tasks, steps=1000)
    """

    second_order: ClassVar[bool] = False
    through_steps: ClassVar[bool] = False
    is_gradient: ClassVar[bool] = False
    stays: ClassVar[bool] = True
    joint: ClassVar[bool] = True

    def trains_on(self, tasks: Any) -> Any:
        """The source with single images as training tasks.

        Raises:
            ValueError: it has none.
        """
        if not hasattr(tasks, "single_images"):
            raise ValueError(
                f"Supervised() learns from single images by class, which {type(tasks).__name__} has not: use a source "
                "of images (Episodes), or another meta-gradient"
            )
        return tasks.single_images()

    def step(self, learner: Any, tasks: Task | list[Task]) -> tuple[Tensor, Tensor]:
        """Add the gradient of a batch of images to the learner's ``.grad``; gives loss and accuracy.

        Raises:
            ValueError: another learner or batch, or a head that is too narrow.
        """
        if isinstance(tasks, list) or not hasattr(learner, "model"):
            raise ValueError("Supervised() takes a MetaLearner and a batch of single images, tasks.single_images()")
        inputs, labels = (torch.cat([part.flatten(0, 1) for part in each]) for each in zip(*tasks, strict=True))
        norms = [module for module in learner.model.modules() if isinstance(module, _BatchNorm)]
        try:
            for norm in norms:
                norm.train()
            with torch.enable_grad():
                scores = learner.model(inputs)
                if labels.max() >= scores.shape[-1]:
                    raise ValueError(
                        f"the model gives {scores.shape[-1]} scores, and there is a training class {labels.max()}: "
                        "build it with ways=tasks.single_images().output_size"
                    )
                loss = learner.loss(scores, labels)
            loss.backward()
        finally:
            for norm in norms:
                norm.eval()
        return loss.detach(), (scores.argmax(-1) == labels).float().mean()

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """Refused.

        Raises:
            ValueError: always.
        """
        raise ValueError("Supervised() has no meta-gradient of a task: it learns from single images alone")
