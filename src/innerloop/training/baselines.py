"""What a user would write in forty lines: classifiers on the run's own frozen features, and on the raw inputs.

    nearest class mean    argmax_c  cos(x, mean of the support features of class c)
    linear probe          argmin_W  10 sum_i cross_entropy(W x_i, y_i) + 1/2 |W|^2,    x of length 1, then a constant 1
    pixels                the class of the support example nearest by cosine on the raw inputs

Features are what enters the head, as `innerloop.Head` finds it, under the run's own batch norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop.adapts import head_of
from innerloop.batch_norm import statistics_from_first
from innerloop.blocks import call, leading
from innerloop.learner import MetaLearner
from innerloop.problem import Task
from innerloop.tasks import nearest_neighbour
from innerloop.trees import tree_leaves, tree_map

MEAN, PROBE, PIXELS = "nearest class mean", "linear probe", "pixels"
WEIGHT = 10.0  # of the losses of the linear probe

WHAT = {
    MEAN: "Nearest class mean on this run's own features",
    PROBE: "A linear probe on this run's own features",
    PIXELS: "The nearest neighbour on the raw inputs",
}
CURE = {
    MEAN: "train --method protonet or proto-anil; --start prototypes:cosine=true ranks as it does",
    PROBE: "train --method ridge or proto-anil, with --start-from this run to keep its features",
    PIXELS: "train for longer, or with another --method or rate",
}


def nearest_class_mean(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Cosines to the class means; "Classifier-Baseline" of arXiv 2003.04390.

    Args:
        support: features ``[tasks, examples, width]``.
        labels: their classes ``[tasks, examples]``.
        query: features ``[tasks, queries, width]``.
        ways: number of classes.

    Returns:
        Scores ``[tasks, queries, ways]``.
    """
    member = F.one_hot(labels, ways).to(support.dtype)
    means = member.mT @ support / member.sum(1).unsqueeze(-1).clamp(min=1)
    return F.normalize(query, dim=-1) @ F.normalize(means, dim=-1).mT


def linear_probe(support: Tensor, labels: Tensor, query: Tensor, ways: int) -> Tensor:
    """Logistic regression on features of length 1, each loss at a weight of 10, as in the file's head.

    Like Tian et al. 2020, arXiv 2003.11539, who take scikit-learn's with a weight of 1; 10 was better on validation
    tasks of CIFAR-FS. W is a combination of the support features: its coefficients ``[examples, ways]`` are solved for,
    in float64, by Nesterov's method. The curvature lies between 1 and 1 + 10 examples. Arguments and result as in
    `nearest_class_mean`.
    """
    x, z = (F.normalize(each.double(), dim=-1) for each in (support, query))
    gram, across = WEIGHT * (x @ x.mT + 1), WEIGHT * (z @ x.mT + 1)
    target = F.one_hot(labels, ways).double()
    largest = 1 + WEIGHT * x.shape[1]
    momentum = (math.sqrt(largest) - 1) / (math.sqrt(largest) + 1)
    found = ahead = torch.zeros_like(target)
    for _ in range(math.ceil(20 * math.sqrt(largest))):
        after = ahead - ((gram @ ahead).softmax(-1) - target + ahead) / largest
        change, found = after - found, after
        if change.abs().max() < 1e-6:  # scores are right to some 1e-4
            break
        ahead = after + momentum * change
    return across @ found


RECIPES: dict[str, Callable[[Tensor, Tensor, Tensor, int], Tensor]] = {MEAN: nearest_class_mean, PROBE: linear_probe}


def accuracies(learner: MetaLearner, batch: Task, ways: int, inductive: bool) -> dict[str, Tensor]:
    """The accuracy of every baseline on each task of a batch, ``[tasks]``, by name; without features, of pixels alone.

    Args:
        learner: whose features are used, in evaluation mode.
        batch: tasks of classification.
        ways: classes of a task.
        inductive: whether queries are predicted alone.
    """
    found = {}
    try:
        support, query = features(learner, batch, inductive)
    except ValueError:  # `no_features` says why
        pass
    else:
        for name, recipe in RECIPES.items():
            scores = recipe(support, batch.support[1].to(support.device), query, ways)
            found[name] = (scores.argmax(-1).cpu() == batch.query[1]).float().mean(-1)
    return found | {PIXELS: nearest_neighbour(batch)}


def no_features(learner: MetaLearner, batch: Task) -> str:
    """Why there are no baselines on features; empty where there are. Arguments as in `accuracies`."""
    try:
        features(learner, batch, inductive=True)
    except ValueError as error:
        return str(error)
    return ""


def features(learner: MetaLearner, batch: Task, inductive: bool) -> tuple[Tensor, Tensor]:
    """What enters the head for a batch of tasks, ``[tasks, examples, width]`` of support and query.

    Args:
        learner: whose features they are.
        batch: of tasks.
        inductive: queries are normalised by the support set's statistics; otherwise together.

    Raises:
        ValueError: the model has no head, or none that a tensor enters.
    """
    model = learner.model
    head = head_of(model)[0]
    like = leading(model)
    found = []
    for place in range(len(tree_leaves(batch)[0])):
        task = tree_map(lambda value, place=place: value[place], batch).to(like.device, like.dtype)
        support, query = task.support[0], task.query[0]
        rows = len(tree_leaves(support)[0])
        if inductive:
            with statistics_from_first(model, rows):
                both = _entering(model, head, tree_map(lambda *pair: torch.cat(pair), support, query))
            found.append((both[:rows], both[rows:]))
        else:
            found.append((_entering(model, head, support), _entering(model, head, query)))
    supports, queries = zip(*found, strict=True)
    return torch.stack(supports), torch.stack(queries)


def _entering(model: nn.Module, head: nn.Module, inputs: object) -> Tensor:
    caught: list[object] = []
    hook = head.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0] if arguments else None))
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with torch.no_grad():
            call(model, buffers, inputs)
    finally:
        hook.remove()
    examples = len(tree_leaves(inputs)[0])
    if not caught or not isinstance(caught[-1], Tensor) or caught[-1].ndim < 2 or len(caught[-1]) != examples:
        raise ValueError(f"no tensor with a row an example enters the head of {type(model).__name__}")
    return caught[-1].flatten(1)
