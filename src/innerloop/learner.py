"""The learner: a model bound to the four choices."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from innerloop import pooling, weight_norm
from innerloop.adapts import Adapts, Everything
from innerloop.batch_norm import BatchNormMode, convert, freeze, to_torch
from innerloop.bilevel import Bilevel, Carry, Evaluation, Metrics
from innerloop.blocks import call, twin
from innerloop.choices import choice
from innerloop.curvature import second_order_kernels
from innerloop.data_checks import check_finite, check_labels, classes_of
from innerloop.engine import Products
from innerloop.errors import BadData
from innerloop.few_shot import FewShot, Stated, cross_entropy, refuse_misread, scores, squared_error
from innerloop.inner import SGD, InnerSolver, bind
from innerloop.meta_gradient import MetaGradient
from innerloop.problem import Engine, Steps, Task, Tree
from innerloop.start import Start
from innerloop.trees import tensors, tree_leaves, tree_map

__all__ = ["Evaluation", "MetaLearner", "Metrics"]


class MetaLearner(Bilevel):
    """Learns a model that adapts to a new task in a few inner steps: a `Bilevel` whose meta-parameters are a model.

    Its parameters are those of its own copy of the model, ``model``, those of a loss that has any, ``loss``, and the
    rates that the inner solver learns, ``rates``. The model given is never changed; while a task is adapted to, neither
    is the copy, its buffers included.

    Batch norm takes the statistics of the batch at hand (``batch_norm="batch"``, the papers' way): the support set's
    in the inner loop, those of all queries together for the outer loss.

    Batches of tasks have a leading task dimension in every tensor of ``Task((inputs, targets), (inputs, targets))``;
    inputs and targets may be any tree of tensors. A dict of inputs is given to the model by keywords, where its forward
    pass takes those. A list of tasks without that dimension will do too, of equal sizes or not.

    Args:
        model: any module that maps a batch of inputs to outputs.
        adapts: which parameters move in the inner loop: ``Head()``, ``"head"``.
        inner: how they move.
        meta_gradient: how the outer gradient is found: ``Truncated(2)``, ``"truncated:2"``.
        loss: ``loss(output, target) -> scalar``, for the inner and the outer loop; it sees what the model gives. The
            parameters of a module are meta-parameters.
        batch_norm: ``"batch"``, ``"task"`` (queries are normalised by the support set's statistics), ``"frozen"`` (the
            model's stored statistics) or ``"step"`` (scale and shift of each inner step's own, MAML++). See
            ``innerloop.batch_norm``.
        start: None begins at the model itself; ``Prototypes()`` and ``Ridge()`` with a head made of the support set.
        carry: where a task begins: ``"none"``: at the start; ``"slot"`` or ``"task"``: where the same place of the last
            batch, or the same task, was left. See `Bilevel`.
        chunk_size: how many tasks are computed at once; bounds memory and changes no result. None chooses by the bytes
            of one task; 1 computes task by task.
        memory: bytes that a meta-step may take beyond model and tasks; see `Bilevel`.
        products: how gradients and curvature products are computed: ``"auto"``, ``"autograd"``, ``"blocks"`` (deep
            models at a block's memory, where the blocks are known) or ``"differences"``; see `Bilevel`.
        compile: True compiles the meta-step, which pays for small models and long runs; see `Bilevel`.
        regulariser: ``regulariser(params) -> scalar``, of the parameters by name: a term of both losses, such as
            `models.Divergence`; None for none.
        reuse_prefix: compute what lies below the lowest adapted block once a task instead of once a step. Exact; left
            out by itself where the blocks are not known, or random (dropout).

    Raises:
        ValueError: choices that do not fit the model or each other; the message says what does.

    Example:
        >>> learner = il.MetaLearner(il.models.Conv4(in_channels=1), adapts=il.Head(), inner=il.SGD(lr=0.1, steps=5))
        >>> optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
        >>> metrics = learner.meta_step(batch)
        >>> optimizer.step()
    """

    def __init__(
        self,
        model: nn.Module,
        adapts: Adapts | str | None = None,
        inner: InnerSolver | str | None = None,
        meta_gradient: MetaGradient | str | None = None,
        loss: Callable[[Any, Any], Tensor] = F.cross_entropy,
        batch_norm: BatchNormMode = "batch",
        *,
        start: Start | str | None = None,
        carry: Carry = "none",
        chunk_size: int | None = None,
        memory: int | None = None,
        products: Products | Engine = "auto",
        compile: bool | str = False,
        regulariser: Callable[[Tree], Tensor] | None = None,
        reuse_prefix: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        refuse_misread(model, loss)
        self._classes: int | None = None  # that the model tells apart, once that is seen
        if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
            raise ValueError("the model has lazy parameters: pass one batch of inputs through it first")
        self.adapts: Adapts = choice(adapts, "adapts") if adapts is not None else Everything()
        self.batch_norm = batch_norm
        self.model = copy.deepcopy(model)
        self.loss: Any = (
            squared_error if loss is F.mse_loss else cross_entropy if loss is F.cross_entropy else copy.deepcopy(loss)
        )
        inner = choice(inner, "inner") if inner is not None else SGD(lr=0.1, steps=5)
        self.adapts.prepare(self.model)
        convert(self.model, batch_norm, inner.steps)
        pooling.convert(self.model)
        weight_norm.convert(self.model)
        freeze(self.model)
        begin: Start | None = choice(start, "start") if start is not None else None
        self.few_shot = FewShot(self.model, self.adapts, self.loss, batch_norm, begin, reuse_prefix, regulariser)
        self.problem = self.few_shot.problem
        moves, whole = self.few_shot.moves, self._whole()
        self._bind(inner, meta_gradient, carry, True, chunk_size, memory, products, compile, moves, whole)
        if not self.inner.steps and begin is None:
            raise ValueError(
                f"{type(self.inner).__name__}(steps=0) adapts nothing: give 1 inner step or more, or a start that "
                "makes the head, such as start=Prototypes()"
            )
        if batch_norm == "step":
            self.timeless = False
            if self.inner.minibatch is not None:
                raise ValueError("batch_norm='step' with minibatch=: leave one out, or use batch_norm='batch'")
            self.accepts(self.meta_gradient)

    @property
    def adapted(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the parameters that move in the inner loop."""
        return self.few_shot.adapted

    def adapt(self, inputs: Any, targets: Any, steps: int | None = None, inductive: bool = False) -> nn.Module:
        """Adapt to one new task.

        Args:
            inputs: support inputs, ``[ways * shots, ...]``; no task dimension.
            targets: support targets, ``[ways * shots]``.
            steps: inner steps; None takes the solver's ``test_steps``.
            inductive: keep the support set's batch-norm statistics in the module, so that each prediction stands alone;
                otherwise a batch is normalised by its own. Always so with ``batch_norm="task"``.

        Returns:
            A plain module in evaluation mode, of torch layers alone where the model is. It owns the parameters that
            changed and shares the memory of all others with this learner: copy it (``copy.deepcopy``) before training
            goes on.

        Raises:
            ValueError: inputs and targets of different lengths, or ``steps`` negative.
        """
        changed = self.adapted_parameters(inputs, targets, steps)
        with torch.no_grad(), second_order_kernels(self.recurrent, self.engine):

            def shared(parameter: Tensor) -> nn.Parameter:
                return nn.Parameter(parameter.detach(), requires_grad=False)

            own: dict[int, Any] = {id(parameter): shared(parameter) for parameter in self.model.parameters()}
            own |= {id(self.model.get_parameter(name)): shared(value) for name, value in changed.items()}
            own |= {id(buffer): buffer for buffer in self.model.buffers()}
            adapted = twin(self.model, own).eval()
            self.adapts.finish(adapted)
            if self.few_shot.layer is not None:
                layer = adapted.get_submodule(self.few_shot.layer)
                layer.out_features = len(layer.weight)  # type: ignore[assignment, arg-type]
            pooling.to_torch(adapted)
            weight_norm.to_torch(adapted)
            support = self._single(inputs, targets).support[0]
            keep = inductive or self.batch_norm == "task"
            last = max(self._steps(steps), 1) - 1
            to_torch(
                adapted, (lambda: call(adapted, {}, support)) if keep else None, len(tree_leaves(support)[0]), last
            )
        return adapted

    def adapted_parameters(self, inputs: Any, targets: Any, steps: int | None = None) -> Tree:
        """What `adapt` changes in the model, by name: all that has to be kept of a task.

        Gradients are plain autograd's, so that no graph of a backward pass is made, of what moves alone.

        Args:
            inputs: support inputs, ``[ways * shots, ...]``; no task dimension.
            targets: support targets, ``[ways * shots]``.
            steps: inner steps; None takes the solver's ``test_steps``.

        Raises:
            ValueError: inputs and targets of different lengths, or ``steps`` negative.
        """
        steps = self._steps(steps)
        with torch.inference_mode(False), torch.no_grad(), second_order_kernels(self.recurrent, self.engine):
            task, meta = self._single(inputs, targets), self.meta_tree()
            if not steps and self.few_shot.start is None:
                return self.problem.start(meta)
            self._look([task])
            self._check_labels(task)
            problem, meta, task, _ = self._posed(task, meta, self._ways([task]), differentiate=False)
            loop = bind(problem, meta, task.support, self.inner, self.learned(), steps=steps)
            return loop.run(steps).params

    def train(self, mode: bool = True) -> MetaLearner:
        """Switch the model's dropout and the like on or off; batch norm follows ``batch_norm`` alone."""
        super().train(mode)
        freeze(self.model)
        return self

    def extra_repr(self) -> str:
        """The choices, and what adapts."""
        mine, every = (
            sum(self.model.get_parameter(name).numel() for name in names)
            for names in (self.adapted, [name for name, _ in self.model.named_parameters()])
        )
        names = ", ".join(self.adapted[:6]) + (f" and {len(self.adapted) - 6} more" if len(self.adapted) > 6 else "")
        return f"adapts={self.adapts!r}: {names} ({mine:,} of {every:,} numbers), {super().extra_repr()}, " + (
            f"batch_norm={self.batch_norm!r}"
        )

    def accepts(self, estimator: MetaGradient) -> None:
        """Raise ValueError where an estimator does not go with this learner, with what to use instead."""
        super().accepts(estimator)
        if self.batch_norm == "step" and estimator.stepless:
            raise ValueError(
                f"{type(estimator).__name__} {estimator.stepless}, so it cannot follow batch_norm='step', in which "
                "every step has a scale and shift of its own: use batch_norm='batch', or Unrolled()"
            )

    def meta_tree(self) -> Tree:
        """The meta-parameters by name, detached: the model's own names, and ``loss ...`` for those of the loss."""
        return self.few_shot.meta()

    def _parameter(self, name: str) -> nn.Parameter | None:
        unlearned = name in self.few_shot.unlearned or (name in self.adapted and not self.meta_gradient.learn_start)
        return None if unlearned else self.few_shot.parameter(name)

    def _first_params(self) -> Tree:
        return {name: self.model.get_parameter(name).detach() for name in self.adapted}

    def _whole(self) -> bool | None:
        return self.few_shot.whole

    def _state(
        self, task: Task, meta: Tree, ways: int, *, inductive: bool = False, reuse: bool = True, differentiate: bool
    ) -> Stated:
        transductive = not inductive and self.batch_norm != "task"
        # a minibatch has statistics of its own
        reuse = reuse and self.inner.minibatch is None
        return self.few_shot.state(
            task, meta, transductive=transductive, ways=ways, reuse=reuse, differentiate=differentiate
        )

    def _ways(self, tasks: Task | list[Task]) -> int:
        """How many classes the tasks have, for a start, each of them with an example in every support set."""
        if self.few_shot.start is None:
            return 0
        return max(map(self.few_shot.start.ways, tasks if isinstance(tasks, list) else [tasks]))

    def _accuracy(self, outputs: Any, task: Task, place: int) -> list[Tensor]:
        """The share of queries classified rightly, in a list that is empty where targets are not classes."""
        query = task.query
        if isinstance(query, Steps) and not callable(query.rows):
            query = query.row(place, place)
        found = scores(outputs)
        targets = None if isinstance(query, Steps) else query[1]
        if not isinstance(found, Tensor) or not isinstance(targets, Tensor):
            return []
        if targets.is_floating_point() or found.ndim != targets.ndim + 1:
            return []
        # torch's cross-entropy has the classes in the second dimension, behind the examples
        guess = found.argmax(1 if self._crossed and found.ndim > 1 else -1)
        return [(guess == targets).float().mean()] if guess.shape == targets.shape else []

    def _checked(self, batch: Any) -> tuple[Task | list[Task], int]:
        tasks, count = super()._checked(batch)
        single = isinstance(tasks, list)
        for task in tasks if isinstance(tasks, list) else [tasks]:
            for part, examples in task._asdict().items():
                if isinstance(examples, Steps):
                    if callable(examples.rows):
                        continue
                    examples = examples.rows
                if not isinstance(examples, (tuple, list)) or len(examples) != 2:
                    raise ValueError(
                        f"the {part} set of a task is a pair (inputs, targets), not {type(examples).__name__}"
                    )
                _check_tensors(f"the {part} set of a task", examples)
                leading = 1 if single else 2
                sizes = {tuple(leaf.shape[:leading]) for leaf in tree_leaves(examples)}
                if any(0 in size for size in sizes):
                    raise BadData(f"the {part} set of a task is empty: give one example or more")
                if len(sizes) != 1 or len(sizes.pop()) < leading:
                    shown = ", ".join(str(tuple(leaf.shape)) for leaf in tree_leaves(examples))
                    where = "no task dimension in a list" if single else "a task dimension (tensor.unsqueeze(0))"
                    raise ValueError(
                        f"the {part} set has inputs and targets of shapes {shown}: give as many inputs as targets, "
                        f"behind {where}"
                    )
        self._look(tasks)
        return tasks, count

    def _look(self, tasks: Task | list[Task]) -> None:
        """Let the few-shot problem see what the model is, on the inputs of the first task."""
        if self.few_shot.seen:
            return
        first = tasks[0] if isinstance(tasks, list) else tree_map(lambda value: value[0], tasks)
        support = first.support.row(0, 0) if isinstance(first.support, Steps) else first.support
        with torch.no_grad(), second_order_kernels(self.recurrent, self.engine):
            outputs = self.few_shot.look(support[0])
        self._classes = classes_of(scores(outputs)) if self._crossed and not self.few_shot.start else None
        count = len(tasks) if isinstance(tasks, list) else len(tensors(tasks)[0])
        for place in range(count):
            one = tasks[place] if isinstance(tasks, list) else tree_map(lambda value, at=place: value[at], tasks)
            self._check_labels(one, f" of task {place} of the batch" if count > 1 else "")

    def _check_labels(self, task: Task, where: str = "") -> None:
        """What torch would refuse without naming set or task."""
        for part, examples in task._asdict().items():
            if self._classes is not None and not isinstance(examples, Steps):
                check_labels(part, examples[1], self._classes, getattr(self.loss, "ignore_index", -100), where)

    @property
    def _crossed(self) -> bool:
        """Whether the loss is torch's cross-entropy."""
        return self.loss is cross_entropy or isinstance(self.loss, nn.CrossEntropyLoss)

    def _single(self, inputs: Any, targets: Any) -> Task:
        """One task for adaptation, which has no queries; see FewShot.state."""
        if isinstance(inputs, Steps) or isinstance(targets, Steps):
            raise ValueError(
                "adapt() takes one support set, not a batch for every step (Steps): for a stream write "
                "learner.loop(il.Task(support, query))[0].run(steps).params"
            )
        for each in (inputs, targets):
            _check_tensors("what adapt() was given", each)
        given, wanted = (len(tree_leaves(each)[0]) for each in (inputs, targets))
        if given != wanted:
            raise ValueError(f"adapt() was given {given} inputs and {wanted} targets: give one target an input")
        if not given:
            raise BadData("the support set that adapt() was given is empty: give one example or more")
        check_finite("support", (inputs, targets))
        # autograd keeps no tensor that was made in inference mode
        support = tree_map(lambda part: part.clone() if part.is_inference() else part, (inputs, targets))
        support = self._moved(Task(support, ())).support
        return Task(support, support)

    def _what(self) -> str:
        return type(self.model).__name__


def _check_tensors(what: str, tree: Any) -> None:
    found = tree_leaves(tree)
    if not found or not all(isinstance(leaf, Tensor) and leaf.ndim for leaf in found):
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in found})) or "nothing"
        raise ValueError(f"{what} holds {kinds}: give tensors with a leading dimension for the examples")
