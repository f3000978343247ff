"""MOML and LocalMOML: a model of every task is remembered, and judged in place of what the inner loop gives.

    u_i  <-  (1 - beta) u_i + beta params_K(meta; support)                         task i, seen again and again
    meta-gradient  =  d outer_loss(u_i) / d meta  +  (d params_K / d meta)'  d outer_loss(u_i) / d params

from Wang, Yuan, Ying and Yang, JMLR 24(145), 2023, arXiv 2106.04911, read off the authors' code. That goes back through
the average as well, and has beta times the second term; this form is reconstructed. MOML-V2, for B of n tasks a batch:

    u_i  <-  (1 - beta) u_i + beta start + beta n / B (params_K - start)           in the batch;  else without the last
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from innerloop.curvature import started
from innerloop.inner import InnerLoop, InnerSolver
from innerloop.meta_gradient._base import MetaGradient, Result
from innerloop.meta_gradient._unrolled import Unrolled
from innerloop.problem import Batch, End, Tree


@dataclass(frozen=True)
class MOML(MetaGradient):
    """For tasks that come again with noisy support sets: averages what the inner loop gives over a task's visits.

    Every visit begins at the start, with step 0. With ``carry="task"`` a learner keeps the averages, a copy of what
    adapts for each task; without it, and with ``beta=1``, this is `Unrolled`. Loss and accuracy are the average's.

    Attributes:
        beta: the weight of the new visit, above 0 and at most 1.
        share: B / n of MOML-V2, above 0 and at most 1; None is MOML.

    Raises:
        ValueError: a setting out of range; in use, ``step_weights``.

    Example:
        >>> learner = il.MetaLearner(model, inner=il.SGD(lr=0.01, steps=1), meta_gradient=il.MOML(), carry="task")
        >>> il.fit(learner, il.tasks.Recurring(tasks, 100), steps=1000)
    """

    beta: float = 0.3
    share: float | None = None

    anew: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not (0 < self.beta <= 1 and (self.share is None or 0 < self.share <= 1)):
            raise ValueError(f"{self!r}: give beta and share above 0 and at most 1")

    @property
    def drifts(self) -> bool:
        """Whether it is MOML-V2."""
        return self.share is not None

    def unseen(self, params: Tree, start: Tree) -> Tree:
        """The average of a task that is not in the batch, of MOML-V2."""
        return self._mean(params, start, start)

    def _mean(self, old: Tree, start: Tree, new: Tree) -> Tree:
        if self.share is not None:
            new = {name: start[name] + (value - start[name]) / self.share for name, value in new.items()}
        return {name: (1 - self.beta) * old[name] + self.beta * value for name, value in new.items()}

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given.
        """
        if step_weights is not None:
            raise ValueError("MOML averages the end of the inner loop alone: leave step_weights out, or use Unrolled()")
        start = started(loop.problem, loop.meta, loop.support)

        def average(params: Tree) -> Tree:
            return self._mean(loop.begin.params, start, params) if loop.resumed else params

        def outer_loss(params: Tree, meta: Tree, batch: Batch) -> Any:
            fixed = {name: value.detach() for name, value in params.items()}
            # at the average, with the gradient of the parameters themselves
            moved = {name: params[name] + (value - fixed[name]) for name, value in average(fixed).items()}
            return loop.problem.outer_loss(moved, meta, batch)

        problem = replace(loop.problem, outer_loss=outer_loss, outer_chain=None)
        begin = End(start, loop.solver.init(start), 0)
        found = Unrolled().estimate(replace(loop, problem=problem, start=start, begin=begin, resumed=False), query)
        params = average(found.params)
        return found._replace(end=End(params, loop.solver.init(params), loop.steps.stop))


@dataclass(frozen=True)
class LocalMOML(MetaGradient):
    """Federated MOML: every task takes several outer steps w of its own from the shared meta-parameters.

    ``grad = (meta - w) / lr``, so that an outer SGD step at ``lr`` averages the w of all tasks, the clients of a
    round, in one process or in several. With ``rounds=1`` this is `Unrolled`. All meta-parameters move.

    Attributes:
        beta: as in `MOML`.
        lr: the rate of the outer steps, above 0; give it to the outer ``torch.optim.SGD`` too.
        rounds: outer steps a task, 1 or more.

    Raises:
        ValueError: a setting out of range; at construction of the learner, parameters that do not adapt; in use,
            ``step_weights`` or a task that is taken up.
    """

    beta: float = 0.7
    lr: float = 1e-3
    rounds: int = 5

    def __post_init__(self) -> None:
        """Check the ranges."""
        MOML(self.beta)
        if not (self.lr > 0 and isinstance(self.rounds, int) and self.rounds >= 1):
            raise ValueError(f"{self!r}: give lr above 0, and a whole number of rounds from 1")

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse parameters that do not adapt, whose features all rounds of a task would share.

        Raises:
            ValueError: so.
        """
        super().check(solver, learns=learns, whole=whole)
        if whole is False:
            raise ValueError("LocalMOML moves all meta-parameters at each task: use adapts=Everything(), or MOML()")

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """The estimate of one task; arguments as in ``MetaGradient.estimate``.

        Raises:
            ValueError: ``step_weights`` given, or a task that is taken up.
        """
        if loop.resumed:
            raise ValueError("LocalMOML keeps nothing of a task between its rounds: leave begin and carry out")
        at, rounds = loop, list[Result]()
        for _ in range(self.rounds):
            found = MOML(self.beta).estimate(at, query, step_weights)
            rounds.append(found)
            meta, learned = (
                {name: value - self.lr * grad[name] for name, value in tree.items()}
                for tree, grad in ((at.meta, found.grad), (at.learned, found.learned_grad))
            )
            at = replace(at, meta=meta, learned=learned, begin=found.end._replace(step=0), resumed=True)
        grad, learned_grad = (
            {name: (value - last[name]) / self.lr for name, value in before.items()}
            for before, last in ((loop.meta, at.meta), (loop.learned, at.learned))
        )
        first = rounds[0]
        products = self.rounds * first.diagnostics["curvature_products"]
        diagnostics = {**first.diagnostics, "curvature_products": products}
        return first._replace(grad=grad, learned_grad=learned_grad, diagnostics=diagnostics)
