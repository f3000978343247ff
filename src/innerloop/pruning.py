"""Context pruning: every inner step reads the examples that matter most to it (GradNCP, Tack et al., arXiv 2302.00617).

    r_i  =  |e_i| sqrt(|h_i|^2 + 1)    the length of the last layer's gradient, e_i the error, h_i that layer's input
    params  <-  params - lr grad L(params; C),     C the share ``keep`` of largest r at params

The closed form is equal to what the authors' code builds. Their pull towards further steps on all examples, and the
rescaled steps at test, are left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from innerloop.problem import Batch, Problem, Tree
from innerloop.trees import tree_leaves, tree_map


def pruned(problem: Problem, score: Callable[[Tree, Tree, Batch], Tensor], keep: float) -> Problem:
    """A problem whose inner loss reads, wherever it is taken, the share of its examples of the largest score.

    The choice counts as a constant, so that every solver and estimator goes with it. A step takes a forward pass of all
    examples without a graph, and the graph of those kept.

    Args:
        problem: whose inner loss is a mean over the first dimension of all tensors of ``support``.
        score: ``score(params, meta, support) -> [examples]``, such as r above.
        keep: above 0 and at most 1; the code has 0.25.

    Raises:
        ValueError: ``keep`` out of range.

    Example:
        >>> learner = il.Bilevel(il.pruned(problem, score, keep=0.25), model, il.SGD(lr=1e-2, steps=16))
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep is {keep}; give the share of examples to keep, above 0 and at most 1")

    def inner_loss(params: Tree, meta: Tree, support: Batch) -> Tensor:
        with torch.no_grad():
            found = score(params, meta, support)
        rows = found.topk(max(1, round(keep * len(tree_leaves(support)[0])))).indices
        return problem.inner_loss(params, meta, tree_map(lambda leaf: leaf.index_select(0, rows), support))

    return replace(problem, inner_loss=inner_loss, inner_chain=None)
