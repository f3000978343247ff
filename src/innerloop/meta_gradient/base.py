"""What every estimator of the meta-gradient takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from innerloop.inner import InnerSolver
from innerloop.problem import Problem, Task, Tree


class Result(NamedTuple):
    """The meta-gradient of one task and what was found on the way.

    Attributes:
        grad: a tree like the meta-parameters.
        learned_grad: a tree like the solver's own meta-parameters; empty where it has none.
        loss: outer loss at the adapted parameters, a scalar.
        params: the adapted parameters.
        extra: what the outer loss returned beside its value; None if nothing.
        diagnostics: tensors by name, among them ``support_loss`` (the inner loss where each inner gradient was
            taken) and ``curvature_products`` (how many were).
    """

    grad: Tree
    learned_grad: Tree
    loss: Tensor
    params: Tree
    extra: Any
    diagnostics: dict[str, Tensor]


class MetaGradient(Protocol):
    """An estimator: settings, a few facts about itself, and one method, written for one task."""

    second_order: ClassVar[bool]
    """Whether second derivatives of the inner loss are used; if not, nothing reaches what only the inner loss reads."""

    stepless: ClassVar[str]
    """Why it cannot follow steps in which different parameters move, as in "shares one gradient"; empty if it can."""

    def prepare(self, solver: InnerSolver, partial: bool | None) -> InnerSolver:
        """The inner solver that this estimator wants in place of the one given; most take it as it is.

        Args:
            solver: the inner solver.
            partial: only some of the meta-parameters are adapted; None where that is not known (``hypergradient``).

        Raises:
            ValueError: the two do not go together; the message says why, and what to use instead.
        """
        ...

    def estimate(
        self,
        problem: Problem,
        meta: Tree,
        task: Task,
        solver: InnerSolver,
        learned: Tree,
        step_weights: Sequence[float] | None = None,
    ) -> Result:
        """Adapt to the task's support set and estimate the gradient of the outer loss in the meta-parameters.

        Args:
            problem: the bilevel problem.
            meta: the meta-parameters.
            task: support and query of one task.
            solver: the inner solver.
            learned: the solver's own meta-parameters, from ``solver.learned``.
            step_weights: weights of the outer loss after each inner step, as many as there are steps (the multi-step
                loss of MAML++, arXiv 1810.09502); None puts all weight on the last.
        """
        ...
