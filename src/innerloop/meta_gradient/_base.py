"""What every estimator of the meta-gradient takes and gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from innerloop.inner import InnerLoop, InnerSolver
from innerloop.problem import Batch, End, Task, Tree, refuse_kinds, short_repr


class Result(NamedTuple):
    """The meta-gradient of one task and what was found on the way.

    Attributes:
        grad: a tree like the meta-parameters.
        learned_grad: a tree like the solver's own meta-parameters; empty where it has none.
        loss: outer loss at the adapted parameters, a scalar.
        extra: what the outer loss returned beside its value; None if nothing.
        diagnostics: tensors by name, among them ``support_loss`` (the inner loss where each inner gradient was
            taken, ``[steps]``; ``[windows]`` for frozen windows) and ``curvature_products`` (how many were, a scalar; 0
            where the graphs of the steps were kept).
        end: where the task was left; what ``begin=`` takes.
    """

    grad: Tree
    learned_grad: Tree
    loss: Tensor
    extra: Any
    diagnostics: dict[str, Tensor]
    end: End

    @property
    def params(self) -> Tree:
        """The adapted parameters."""
        return self.end.params


def without_products(grads: tuple[Tree, Tree], loss: Tensor, support_loss: Tensor, extra: Any, end: End) -> Result:
    """What an estimator returns that takes no curvature product; ``grads`` are those in meta and in learned."""
    diagnostics = {"support_loss": support_loss, "curvature_products": torch.zeros((), device=loss.device)}
    extra = None if isinstance(extra, tuple) and not extra else extra
    return Result(*grads, loss, extra, diagnostics, end)


class Seen(NamedTuple):
    """What `innerloop.check` sees of an estimator on a user's problem, for its advice.

    Attributes:
        far: whether it is far from the exact meta-gradient.
        inner: the inner solver.
        rate: its largest rate; None where steps are no rate times a gradient.
        smallest: the smallest eigenvalue of H, the Hessian of all that the inner loop lowers, in nine tasks of ten.
        largest: the largest in absolute value, likewise; None where not finite.
        residual: what the linear solver leaves, where there is one.
        unsolved: norm of the inner gradient at the end over that at the beginning, where a linear system is solved.
    """

    far: bool
    inner: InnerSolver
    rate: float | None
    smallest: float | None
    largest: float | None
    residual: float | None
    unsolved: float | None

    @property
    def reach(self) -> float | None:
        """Rate times largest curvature."""
        return None if self.rate is None or self.largest is None else self.rate * self.largest


class MetaGradient:
    """An estimator: settings, a few facts about itself, and one method, written for one task.

    It never changes the problem: what the inner loop lowers is the inner loss and the two terms that the inner solver
    names, whichever estimator is chosen.
    """

    def __init_subclass__(cls) -> None:
        """Show what differs from the defaults."""
        refuse_kinds(cls)
        if "__repr__" not in vars(cls):
            cls.__repr__ = short_repr  # type: ignore[method-assign]  # here, so that dataclass makes none

    second_order: ClassVar[bool] = True
    """Whether second derivatives of the inner loss are used; if not, nothing reaches what only the inner loss reads."""

    stepless: ClassVar[str] = ""
    """Why it cannot follow steps in which different parameters move, as in "shares one gradient"; empty if it can."""

    through_steps: ClassVar[bool] = True
    """Whether it goes back through the inner steps, whose rule then must be an ``update`` that has a derivative."""

    stays: ClassVar[bool] = False
    """Whether it takes an inner loop of no steps, whose meta-gradient is that of the start."""

    joint: ClassVar[bool] = False
    """Whether it takes the tasks of a batch together, by ``step`` in place of ``estimate``."""

    is_gradient: ClassVar[bool] = True
    """Whether it estimates the gradient of the outer loss, length and all."""

    anew: ClassVar[bool] = False
    """Whether a task that is taken up begins at the start again, and only its end depends on where it was left."""

    learn_start: bool = True
    """Whether the start of the inner loop is learned; if not, nothing reaches meta through it."""

    @property
    def draws(self) -> bool:
        """Whether it draws random numbers of its own in Python, which a compiled meta-step would repeat."""
        return False

    @property
    def reach(self) -> int:
        """How many inner steps it is set to look at together; 0 where it is set to nothing of the kind."""
        return 0

    @property
    def drifts(self) -> bool:
        """Whether tasks that are carried move in outer steps that do not see them, as ``unseen`` says."""
        return False

    def unseen(self, params: Tree, start: Tree) -> Tree:
        """The parameters of a carried task after an outer step without it; ``start`` is where tasks begin."""
        return params

    def check(self, solver: InnerSolver, *, learns: bool = False, whole: bool | None = None) -> None:
        """Refuse what this estimator does not go with.

        Args:
            solver: the inner solver.
            learns: whether it has meta-parameters of its own.
            whole: whether all that is meta-learned is adapted too; None where that is not known (`hypergradient`).

        Raises:
            ValueError: the two do not go together; the message says why, and what to use instead.
        """
        name, rule = type(self).__name__, type(solver).__name__
        if self.through_steps and not solver.differentiable:
            raise ValueError(
                f"{name} goes through inner steps, but {rule}'s have no derivative: use Implicit(), which "
                "differentiates the solution, or SGD, Momentum or Adam"
            )
        if not solver.steps and not self.stays:
            raise ValueError(
                f"{name} differentiates inner steps, and {rule}(steps=0) takes none: use Unrolled(), or 1 step or more"
            )
        if solver.moves and self.stepless:
            raise ValueError(
                f"{name} {self.stepless}, so it cannot follow a table in which other parameters move in other steps: "
                "use Unrolled(), Truncated() or FirstOrder(), or one pattern for all steps, such as Blocks('00011')"
            )
        if whole and not self.learn_start:
            raise ValueError(
                f"{name}(learn_start=False) learns only what is not adapted, and here all that is not frozen is: use "
                f"adapts=Head() with a body that learns, or {name}()"
            )

    def trains_on(self, tasks: Any) -> Any:
        """The source of tasks to draw from in training, given that of the tasks to be judged by."""
        return tasks

    def step(self, learner: Any, tasks: Task | list[Task]) -> tuple[Tensor, Tensor]:
        """Add a gradient of all tasks of a batch to the learner's ``.grad``; gives loss and accuracy, scalars."""
        raise NotImplementedError

    def advice(self, seen: Seen) -> str:
        """Why it is no better on a user's problem, and what helps, in a clause; empty where nothing is to be said."""
        return ""

    def estimate(self, loop: InnerLoop, query: Batch, step_weights: Sequence[float] | None = None) -> Result:
        """Adapt to the task's support set and estimate the gradient of the outer loss in the meta-parameters.

        Args:
            loop: problem, meta-parameters, support set and solver of one task, and where it begins.
            query: what the outer loss reads.
            step_weights: weights of the outer loss after each inner step, as many as there are steps (the multi-step
                loss of MAML++, arXiv 1810.09502); None puts all weight on the last.
        """
        raise NotImplementedError
