"""A bilevel problem bound to its choices: `hypergradient` for one task, `Bilevel` for batches of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, TypeVar

import torch
from torch import Tensor, nn

from innerloop import weight_norm
from innerloop.batches import OverTasks, in_order, one_of, weighted
from innerloop.blocks import leading
from innerloop.carried import Carried
from innerloop.choices import choice
from innerloop.compiled import Compiler
from innerloop.curvature import dense, fresh_seed, in_transform, outer, second_order_kernels, started
from innerloop.engine import Products, Way, choose, engine_of
from innerloop.few_shot import Stated
from innerloop.inner import SGD, InnerLoop, InnerSolver, bind, minibatches
from innerloop.meta_gradient import MetaGradient, Result, Unrolled, fault
from innerloop.problem import Batch, End, Engine, Problem, Steps, Task, Tree, refuse_other
from innerloop.trees import map_tensors, tensors, tree_map

Out = TypeVar("Out")
Carry = Literal["none", "slot", "task"]


def hypergradient(
    problem: Problem,
    meta: Tree,
    task: Task,
    inner: InnerSolver | str,
    estimator: MetaGradient | str | None = None,
    learned: Tree | None = None,
    *,
    begin: End | None = None,
    step_weights: Sequence[float] | None = None,
) -> Result:
    """Solve the inner problem of one task and estimate the gradient of the outer loss in the meta-parameters.

    Args:
        problem: start, inner loss and outer loss.
        meta: the meta-parameters, tensors by name; they are not changed and need no ``requires_grad``.
        task: what the two losses read: ``task.support`` for the inner, ``task.query`` for the outer; either may be
            `Steps`, a batch for every inner step.
        inner: the inner solver.
        estimator: how the gradient is found; None is the exact ``Unrolled()``.
        learned: the solver's own meta-parameters (learned rates); None starts them as ``inner.learned`` says.
        begin: take the task up where an earlier result's ``end`` left it: parameters, solver state, count of steps.
            It is a constant; ``problem.start(meta)`` then is the centre of the proximal term and nothing else.
        step_weights: weights of the outer loss after each inner step; None puts all weight on the last.

    Returns:
        ``grad`` (a tree like ``meta``), ``loss``, ``params``, ``end``, ``diagnostics`` and more: see ``Result``.

    Raises:
        ValueError: the estimator refuses the solver or the task; see the message for what to use instead.

    Example:
        >>> problem = il.Problem(start, inner_loss, outer_loss)
        >>> first = il.hypergradient(problem, meta, task, il.AdamW(lr=1e-3, steps=2))
        >>> then = il.hypergradient(problem, meta, task, il.AdamW(lr=1e-3, steps=2), begin=first.end)
    """
    estimator = choice(estimator, "meta_gradient") if estimator is not None else Unrolled()
    solver: InnerSolver = choice(inner, "inner")
    if isinstance(meta, nn.Module):
        meta = dict(meta.named_parameters())
    if not isinstance(task, Task) or not isinstance(begin, End | None):
        raise ValueError("give the task as il.Task(support=..., query=...), and begin= the end of an earlier result")
    if in_transform("Grad"):
        raise ValueError(
            "hypergradient inside torch.func.grad, vjp or jacrev would give zeros: take its own gradient, result.grad"
        )
    with torch.inference_mode(False), torch.no_grad(), second_order_kernels(engine=problem.engine):
        task = task.to()
        refuse_other(meta, "meta")
        meta = {name: value.clone() if value.is_inference() else value for name, value in meta.items()}
        if learned is None:
            learned = solver.learned(begin.params if begin else started(problem, meta, task.support))
        estimator.check(solver, learns=bool(learned))
        loop = bind(problem, meta, task.support, solver, learned, begin)
        result = _own(estimator.estimate(loop, task.query, step_weights))
    _warn_of_zeros(problem, estimator, result.grad, stacklevel=3)
    return result


class Metrics(NamedTuple):
    """What a meta-step reports.

    Attributes:
        loss: outer loss at the adapted parameters, averaged over the tasks by their weights, a scalar.
        accuracy: share of query examples classified rightly, a scalar; None where targets are not classes.
        diagnostics: what the estimator reports, by name, averaged over the tasks.
        losses: the outer loss of every task, ``[tasks]``.
        end: where the tasks were left, which ``begin=`` takes: a list, or one `End` for a lone `Task`; None unless
            asked for.
    """

    loss: Tensor
    accuracy: Tensor | None
    diagnostics: dict[str, Tensor]
    losses: Tensor
    end: End | list[End] | None


class Evaluation(NamedTuple):
    """How each task went.

    Attributes:
        loss: outer loss after adaptation, ``[tasks]``.
        accuracy: query accuracy after adaptation, ``[tasks]``; None where targets are not classes.
        outputs: what the outer loss returned beside its value, for a learner the model's outputs for the query
            examples: a tree of ``[tasks, queries, ...]``; for a list of tasks a list of one each.
        loss_curve: outer loss after 0, 1, ... steps, ``[tasks, steps + 1]``; None if not asked for.
        accuracy_curve: the same of the accuracy.
    """

    loss: Tensor
    accuracy: Tensor | None
    outputs: Any
    loss_curve: Tensor | None
    accuracy_curve: Tensor | None


class Bilevel(nn.Module):
    """Any bilevel problem with its meta-parameters, as a module, for `innerloop.fit` and `innerloop.check`.

    Its parameters are the meta-parameters, ``meta``, and the rates that the inner solver learns, ``rates``.

    Args:
        problem: start, inner loss and outer loss; ``meta`` reaches them as a dict of tensors by name.
        meta: the meta-parameters: a module, whose parameters they are, or a dict of tensors, which is copied.
        inner: the inner solver.
        meta_gradient: how the outer gradient is found; None is the exact ``Unrolled()``.
        carry: where a task begins: ``"none"``: at the start; ``"slot"``: where the same place of the last batch ended,
            whichever task that was; ``"task"``: where the same task, by its ``task_ids``, ended when last seen.
        stacked: a `Task` given to ``meta_step`` is a batch, with a leading task dimension in every tensor; otherwise it
            is one task.
        chunk_size: how many tasks of such a batch are computed at once; bounds memory and changes no result. None
            chooses by the bytes of one task; 1 computes task by task.
        memory: bytes that a meta-step may take beyond model and tasks: whether the graphs of the inner steps are kept,
            and how many tasks are computed at once, follows from it. None takes 1 GiB on a CPU and half of what is free
            on a GPU; 0 keeps no graph. What was chosen is ``learner.way``, and logged.
        products: how gradients and curvature products are computed. ``"autograd"``; ``"blocks"``: block by block, the
            same numbers at a block's memory, for a problem with an ``inner_chain`` and one task at a time;
            ``"differences"``: central differences of plain gradients, not exact, for models without a second derivative
            (see `innerloop.differences`). ``"auto"`` takes blocks where a deep model's graphs are not kept and its
            activations are large, and autograd elsewhere.
        compile: True compiles the meta-step once for each shape of task, which pays for small kernels and long runs;
            or name a backend of ``torch.compile``. The same numbers but for rounding. What the losses read beside their
            arguments stays what it was in the first step. A problem that draws at random (dropout), or that cannot be
            compiled, is computed as ever, with one warning. ``evaluate`` is not compiled. See `innerloop.compiled`.

    Raises:
        ValueError: choices that do not go together, or a module with torch's weight norm; the message says what does.

    Example:
        >>> learner = il.Bilevel(problem, {"log decay": torch.zeros(8)}, inner=il.AdamW(lr=1e-3, steps=2, clip=1.0))
        >>> metrics = learner.meta_step(il.Task(support=il.Steps(batches), query=held_out))
    """

    adapted: Sequence[str] = ()
    """Names of the meta-parameters that are where the inner loop begins, if they are known to be."""

    def __init__(
        self,
        problem: Problem,
        meta: nn.Module | Mapping[str, Tensor],
        inner: InnerSolver | str | None = None,
        meta_gradient: MetaGradient | str | None = None,
        *,
        carry: Carry = "none",
        stacked: bool = False,
        chunk_size: int | None = None,
        memory: int | None = None,
        products: Products | Engine = "auto",
        compile: bool | str = False,
    ) -> None:
        super().__init__()
        self.problem = problem
        self._named = not isinstance(meta, nn.Module)
        self.meta = meta if isinstance(meta, nn.Module) else _parameters(meta)
        weight_norm.refuse(self.meta)
        if not any(parameter.requires_grad for parameter in self.meta.parameters()):
            raise ValueError("meta holds no parameter that learns: give a module or a dict of floating tensors")
        self._bind(inner, meta_gradient, carry, stacked, chunk_size, memory, products, compile, (), None)

    def _bind(
        self,
        inner: InnerSolver | str | None,
        meta_gradient: MetaGradient | str | None,
        carry: Carry,
        stacked: bool,
        chunk_size: int | None,
        memory: int | None,
        products: Products | Engine,
        compile: bool | str,
        moves: Sequence[frozenset[str]],
        whole: bool | None,
    ) -> None:
        """Take the choices, once the meta-parameters are there."""
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: give how many tasks to compute at once, 1 or more, or None")
        if memory is not None and memory < 0:
            raise ValueError(f"memory={memory}: give how many bytes a meta-step may take, 0 or more, or None")
        if carry not in ("none", "slot", "task"):
            raise ValueError(f"carry={carry!r}: choose 'none', 'slot' or 'task'")
        self.products, self.engine = products, engine_of(products)
        if self.engine is not None:
            self.engine.check(self.problem)
            if (chunk_size or 1) > 1:
                raise ValueError(
                    f"products={products!r} takes tasks one by one, and chunk_size={chunk_size} several at once: leave "
                    "chunk_size out, or use products='autograd'"
                )
        inner = choice(inner, "inner") if inner is not None else SGD(lr=0.1, steps=5)
        if moves and inner.moves:
            raise ValueError(
                f"both {type(inner).__name__}(moves=...) and what adapts say which parameters move in which step: "
                "leave moves out, or use one pattern, such as Blocks('00011')"
            )
        self.inner: InnerSolver = replace(inner, moves=moves) if moves else inner
        self.timeless = self.inner.timeless
        if self.adapted:
            self.inner.check_names(self.adapted)
        self.meta_gradient: MetaGradient = (
            choice(meta_gradient, "meta_gradient") if meta_gradient is not None else Unrolled()
        )
        if carry != "none" and whole and not self.inner.proximal and not self.meta_gradient.anew:
            raise ValueError(
                f"carry={carry!r}: a task that is taken up no longer depends on the start, and all that could be "
                f"learned here is that: give {type(inner).__name__}(proximal=2.0), or adapt less, as in adapts=Head()"
            )
        learned: Tree = {}
        if type(self.inner).learned is not InnerSolver.learned:
            learned = self.inner.learned(self._first_params())
        self.meta_gradient.check(self.inner, learns=bool(learned), whole=whole)
        self.rates = _parameters(dict(sorted(learned.items())))  # in the order in which optimizers' states are kept
        self.carry, self.stacked, self.chunk_size, self.memory = carry, stacked, chunk_size, memory
        if compile and self.engine is not None:
            raise ValueError(
                f"compile={compile!r} and products={products!r} do not go together: leave one out; what is compiled is "
                "plain autograd's"
            )
        if compile and self.meta_gradient.draws:
            raise ValueError(
                f"compile={compile!r} and {self.meta_gradient!r} do not go together: every meta-step would draw the "
                "same; leave compile out"
            )
        self.compiler = Compiler(*([compile] if isinstance(compile, str) else [])) if compile else None
        self.way: Way | None = None
        self._ways_of: dict[Any, Way] = {}
        self.carried = Carried()
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in self.modules())
        self._over_tasks, self._looked_for_zeros = OverTasks(self._what()), False

    def meta_step(
        self,
        batch: Task | Sequence[Task],
        step_weights: Sequence[float] | None = None,
        task_ids: Sequence[Hashable] | None = None,
        *,
        task_weights: Tensor | Sequence[float] | None = None,
        begin: End | Sequence[End | None] | None = None,
        keep_end: bool | None = None,
    ) -> Metrics:
        """Adapt to every task of a batch and add the mean meta-gradient to ``.grad``, as ``backward()`` would.

        Args:
            batch: tasks; moved to the learner's device, and to the precision of its first parameter that learns. A list
                of tasks may hold tasks of unequal sizes, and is computed one by one.
            step_weights: weights of the outer loss after each inner step (the multi-step loss of MAML++); None puts all
                weight on the last.
            task_ids: what names each task, for ``carry="task"`` alone.
            task_weights: the weight of each task in the sum of losses and gradients, ``[tasks]``, a constant; None is
                1 / tasks.
            begin: where each task is taken up, as an earlier ``end`` gave it; None in the list begins one at the start.
            keep_end: whether to report where the tasks were left, which holds their parameters in memory; None does so
                for a lone task and where ``begin`` is given.

        Returns:
            Loss, accuracy, diagnostics and the loss of each task. Where they or the gradient are not finite, `diagnose`
            tells why.

        Raises:
            ValueError: the batch is not what is asked for, or its weights, ``task_ids`` or ``begin`` are of another
                number.
        """
        tasks, count = self._checked(batch)
        if self.meta_gradient.joint:
            loss, accuracy = self.meta_gradient.step(self, tasks)
            return Metrics(loss, accuracy, {"curvature_products": torch.zeros(())}, loss.expand(count), None)
        meta, learned = self.meta_tree(), self.learned()
        buffers = {} if self._looked_for_zeros else {name: buffer.clone() for name, buffer in self.named_buffers()}
        starts, keys = self._starts(count, task_ids, begin)
        weights = self._weights(count, task_weights)
        if keep_end is None:
            keep_end = count == 1 or begin is not None
        keep = keep_end or self.carry != "none"
        ways = self._ways(tasks)

        def task_gradient(given: Any, task: Task, start: End | None, seed: int, rows: Tensor | None) -> Any:
            tree, rates, each = given
            result = self._estimate(task, tree, rates, start, each, seed, rows, ways)
            accuracy = self._accuracy(result.extra, task, self.inner.steps - 1)
            numbers = result.loss, accuracy, result.diagnostics
            if not keep:
                return (result.grad, result.learned_grad), numbers, ()
            params, state, step, solution = result.end
            taken = torch.as_tensor(step - (0 if start is None else start.step), device=result.loss.device)
            return (result.grad, result.learned_grad), numbers, (params, state, taken, solution)

        def run(computed: Callable[..., Any], arguments: tuple[Any, ...], about: tuple[int, bool, int]) -> Any:
            nonlocal ways
            place, alone, step = about
            if isinstance(tasks, list):  # each of its own size
                self._way([tasks[place]], 1, starts[place])
                ways = self._ways([tasks[place]])
            if self.compiler is None:
                return computed(*arguments)
            # Bound methods are equal where the objects are one.
            chosen = self.inner.update, self.meta_gradient.estimate, self.way and self.way.keep_graphs
            key = (keep, ways, *chosen, alone, 0 if self.timeless else step)
            return self.compiler(computed, arguments, key, self)

        total: Any = None
        found: list[tuple[list[int], Any, Any]] = []
        with second_order_kernels(self.recurrent, self.engine):
            given = meta, learned, None if step_weights is None else [float(weight) for weight in step_weights]
            base, chunk = fresh_seed(), self._chunk(tasks, count, starts)
            rows = self._rows(tasks, starts, base, self.inner.steps)
            for places, (mean, numbers, left) in self._over_tasks(
                task_gradient, given, tasks, starts, chunk=chunk, seed=base, rows=rows, weights=weights, run=run
            ):
                total = mean if total is None else tree_map(torch.add, total, mean)
                found.append((places, numbers, left))
        _refuse_moved(self, buffers)
        losses, accuracies, diagnostics = in_order(found, count)
        reached = self._ends(found, starts, count) if keep else None
        if self.carry != "none" and reached is not None:
            self.carried.store(keys, reached)
            if self.meta_gradient.drifts:
                start = self._first_params()
                self.carried.change(lambda params: self.meta_gradient.unseen(params, start), besides=keys)
        self._accumulate(*total)
        alone = isinstance(batch, Task) and not self.stacked
        return Metrics(
            weighted(weights, losses),
            accuracies[0].mean(0) if accuracies else None,
            {name: value.mean(0) for name, value in diagnostics.items()},
            losses,
            None if reached is None or not keep_end else reached[0] if alone else reached,
        )

    def estimate(
        self,
        task: Task,
        estimator: MetaGradient | str | None = None,
        *,
        step_weights: Sequence[float] | None = None,
        begin: End | None = None,
    ) -> Result:
        """The meta-gradient of one task, ``.grad`` left alone; ``result.grad`` is named as `meta_tree`.

        Args:
            task: without a task dimension.
            estimator: in place of the learner's own.
            step_weights: as in ``meta_step``.
            begin: where the task is taken up.

        Raises:
            ValueError: the estimator does not go with the inner solver.
        """
        own = self.meta_gradient if estimator is None else choice(estimator, "meta_gradient")
        if own is not self.meta_gradient:
            self.accepts(own)
        tasks, _ = self._checked([task])
        ways = self._ways(tasks)
        with torch.no_grad(), second_order_kernels(self.recurrent, self.engine):
            result = self._estimate(
                tasks[0], self.meta_tree(), self.learned(), begin, step_weights, fresh_seed(), None, ways, own
            )
            return _own(result)

    def loop(self, task: Task, begin: End | None = None) -> tuple[InnerLoop, Batch]:
        """The inner loop of one task and what its outer loss reads, for those who look inside; under ``no_grad``."""
        tasks, _ = self._checked([task])
        stated = self._posed(tasks[0], self.meta_tree(), self._ways(tasks), differentiate=False)
        loop = bind(stated.problem, stated.meta, stated.task.support, self.inner, self.learned(), begin)
        return loop, stated.task.query

    def diagnose(
        self,
        batch: Task | Sequence[Task],
        step_weights: Sequence[float] | None = None,
        task_ids: Sequence[Hashable] | None = None,
        *,
        begin: End | Sequence[End | None] | None = None,
    ) -> str | None:
        """Why the meta-gradient of a batch is not finite: the first task at fault, and what in it is the first.

        Call it where `meta_step` gave such a loss or gradient, with the same arguments. It computes the meta-gradient
        again, task by task, and changes nothing.

        Returns:
            A clause; None where every task is finite by itself. So it can be if what went wrong was drawn at random
            (dropout), or was in ``.grad`` before.

        Raises:
            ValueError: as in ``meta_step``.
        """
        for name, parameter in self.named_parameters():
            if not parameter.isfinite().all():
                return f"the learner's own {name} is not finite: go back to weights that are"
        if self.meta_gradient.joint:
            return None
        tasks, count = self._checked(batch)
        meta, learned = self.meta_tree(), self.learned()
        starts, _ = self._starts(count, task_ids, begin)
        found: dict[int, str] = {}
        with torch.no_grad(), second_order_kernels(self.recurrent, self.engine):
            for place in range(count):
                one = one_of(tasks, place)

                def estimate(task: Task = one, start: End | None = starts[place]) -> Result:
                    # in place of the learner's own way, which may keep graphs and take no product
                    ways, own = self._ways([task]), self.meta_gradient
                    return self._estimate(task, meta, learned, start, step_weights, fresh_seed(), None, ways, own)

                if reason := fault(estimate, one, self.inner.steps):
                    found[place] = reason
        if not found:
            return None
        place, reason = next(iter(found.items()))
        name = "" if task_ids is None else f" ({task_ids[place]!r})"
        others = f"; of {count} tasks {len(found)} fail" if len(found) > 1 else ""
        return f"in task {place} of the batch{name} {reason}{others}"

    def evaluate(
        self, batch: Task | Sequence[Task], steps: int | None = None, inductive: bool = False, curve: bool = False
    ) -> Evaluation:
        """Adapt to every task of a batch and judge it on its queries; nothing is recorded and nothing changes.

        Every task begins at the start, whatever ``carry`` says.

        Args:
            batch: as in ``meta_step``.
            steps: inner steps; None takes the solver's ``test_steps``.
            inductive: normalise queries by the support set's statistics, so that no query sees another. Always so with
                ``batch_norm="task"``, and without effect with ``"frozen"``.
            curve: also report loss and accuracy after each step, at one more query pass a step.

        Raises:
            ValueError: the batch is not what is asked for, or ``steps`` is negative.
        """
        steps = self._steps(steps)
        tasks, count = self._checked(batch)
        meta, learned = self.meta_tree(), self.learned()
        ways, alone = self._ways(tasks), isinstance(tasks, list)

        def one(given: Any, task: Task, start: End | None, seed: int, rows: Tensor | None) -> Any:
            meta, learned = given
            mine = self._ways([task]) if alone else ways
            stated = self._posed(task, meta, mine, inductive=inductive, differentiate=False)
            support = stated.task.support
            loop = bind(stated.problem, stated.meta, support, self.inner, learned, None, rows, steps, seed)
            if isinstance(task.query, Steps):
                task.query.check("query", max(steps, 1))
            losses: list[Tensor] = []
            accuracies: list[Tensor] = []
            found: list[Any] = []

            def judge(step: int, params: Tree, *_: object) -> None:
                place = max(step - 1, 0)
                query = loop.judged(stated.task.query, place)
                loss, output = outer(loop.problem, params, stated.meta, query)
                losses.append(loss)
                accuracies.extend(self._accuracy(output, task, place))
                found[:] = [() if output is None else output]

            judge(steps, loop.run(steps, judge if curve else None).params)
            return torch.stack(losses), [torch.stack(accuracies)] if accuracies else [], found[0]

        with second_order_kernels(self.recurrent, self.engine):
            begin: list[End | None] = [None] * count
            base, chunk = fresh_seed(), self._chunk(tasks, count, begin)
            rows = self._rows(tasks, begin, base, steps)
            found = [
                (places, out[:2] if alone else out, out[2])
                for places, out in self._over_tasks(
                    one, (meta, learned), tasks, begin, chunk=chunk, seed=base, rows=rows
                )
            ]
        losses, accuracies, *stacked = in_order([(places, numbers, ()) for places, numbers, _ in found], count)
        outputs: Any = [tree_map(lambda value: value[0], each) for _, _, each in found] if alone else stacked[0]
        accuracy = accuracies[0] if accuracies else None
        return Evaluation(
            losses[:, -1],
            None if accuracy is None else accuracy[:, -1],
            outputs,
            losses if curve else None,
            accuracy if curve else None,
        )

    def forward(self, *_: Any, **__: Any) -> Any:
        """Refused: a learner is trained, and adapts.

        Raises:
            TypeError: always.
        """
        raise TypeError(
            f"a {type(self).__name__} is not called: train it with meta_step(batch), judge it with evaluate(batch), or "
            "call what MetaLearner.adapt(images, labels) returns"
        )

    def extra_repr(self) -> str:
        """The choices."""
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ("inner", "meta_gradient", "carry"))

    def meta_tree(self) -> Tree:
        """The meta-parameters as the problem's functions see them, by name, detached."""
        if self._named:
            return _tree(self.meta)  # type: ignore[arg-type]
        return {name: p.detach() for name, p in self.meta.named_parameters() if p.requires_grad}

    def learned(self) -> Tree:
        """The rates that the inner solver learns, by parameter, detached."""
        return _tree(self.rates)

    def accepts(self, estimator: MetaGradient) -> None:
        """Raise ValueError where an estimator does not go with this learner, with what to use instead."""
        estimator.check(self.inner, learns=len(self.rates) > 0, whole=self._whole())

    # What a few-shot learner does in its own way.

    def _parameter(self, name: str) -> nn.Parameter | None:
        """The parameter whose gradient the meta-gradient of this name is; None where it is not learned."""
        if self._named:
            found: nn.Parameter = self.meta[_key(name)]  # type: ignore[index]
            return found
        return self.meta.get_parameter(name)

    def _first_params(self) -> Tree:
        if self.problem.reads_support:
            raise ValueError(
                f"{type(self.inner).__name__} learns a rate for each parameter, and a start that reads the support set "
                "tells their shapes too late: use start(meta), or SGD, Momentum or Adam"
            )
        return self.problem.start(self.meta_tree())

    def _whole(self) -> bool | None:
        return None

    def _state(
        self, task: Task, meta: Tree, ways: int, *, inductive: bool = False, reuse: bool = True, differentiate: bool
    ) -> Stated:
        return Stated(self.problem, meta, task, None)

    def _ways(self, tasks: Task | list[Task]) -> int:
        return 0

    def _accuracy(self, outputs: Any, task: Task, place: int) -> list[Tensor]:
        return []

    def _checked(self, batch: Task | Sequence[Task]) -> tuple[Task | list[Task], int]:
        """The tasks on the learner's device, and how many there are."""
        if isinstance(batch, Task) and self.stacked:
            if any(isinstance(part, Steps) and callable(part.rows) for part in batch):
                raise ValueError(
                    "Steps of a function gives the batches of one task, not of a batch of tasks: give a list of tasks, "
                    "each with a function of its own"
                )
            moved = self._moved(batch)
            lengths = {len(leaf) if leaf.ndim else 0 for leaf in tensors(moved)}
            if len(lengths) != 1 or lengths == {0}:
                raise ValueError(
                    "a batch of tasks has the same leading task dimension in every tensor, but theirs are "
                    f"{sorted(lengths)}; give a single task in a list, [task]"
                )
            return moved, lengths.pop()
        tasks = [batch] if isinstance(batch, Task) else list(batch)
        if not tasks or not all(isinstance(task, Task) for task in tasks):
            raise ValueError("give a Task, or a list of one or more of them: il.Task(support=..., query=...)")
        return [self._moved(task) for task in tasks], len(tasks)

    def _posed(self, task: Task, meta: Tree, ways: int, **settings: bool) -> Stated:
        """The problem of a task, with the engine that was named."""
        stated = self._state(task, meta, ways, **settings)
        if self.engine is None:
            return stated
        self.engine.check(stated.problem)
        return stated._replace(problem=replace(stated.problem, engine=self.engine))

    # Batches of tasks.

    def _estimate(
        self,
        task: Task,
        meta: Tree,
        learned: Tree,
        begin: End | None,
        step_weights: Sequence[float] | None,
        seed: int,
        rows: Tensor | None,
        ways: int,
        estimator: MetaGradient | None = None,
    ) -> Result:
        problem, reduced, reduced_task, carry = self._posed(task, meta, ways, differentiate=True)
        loop = bind(problem, reduced, reduced_task.support, self.inner, learned, begin, rows, seed=seed)
        if estimator is None and self.way is not None:
            engaged = replace(loop.problem, engine=problem.engine or self.way.engine)
            loop = replace(loop, problem=engaged, keep_graphs=self.way.keep_graphs)
        result = (estimator or self.meta_gradient).estimate(loop, reduced_task.query, step_weights)
        grad = result.grad if carry is None else carry(result.grad)
        return result._replace(grad=dense(grad), learned_grad=dense(result.learned_grad))

    def _chunk(self, tasks: Task | list[Task], count: int, starts: Sequence[End | None]) -> int:
        """How many tasks are computed at once."""
        return 1 if isinstance(tasks, list) else self._way(tasks, count, starts[0]).chunk

    def _way(self, tasks: Task | list[Task], count: int, begin: End | None) -> Way:
        """How tasks of this shape are computed, measured when they are first seen."""
        compiled = self.compiler is not None and self.compiler.active
        first = tasks[0] if isinstance(tasks, list) else tasks
        shapes = tuple((leaf.shape, leaf.dtype) for leaf in tensors(first))
        key = (shapes, count, self.training, torch.is_autocast_enabled(), compiled)
        if key not in self._ways_of:
            one = one_of(tasks, 0)
            meta, ways = self.meta_tree(), self._ways([one])
            with torch.no_grad():
                whole, reduced = (self._measured(one, meta, ways, reuse, begin) for reuse in (False, True))
                self._ways_of[key] = choose(
                    whole, reduced, count, self.chunk_size, self.memory, self.products, compiled
                )
        self.way = self._ways_of[key]
        return self.way

    def _measured(self, task: Task, meta: Tree, ways: int, reuse: bool, begin: End | None) -> InnerLoop:
        stated = self._state(task, meta, ways, reuse=reuse, differentiate=False)
        problem = replace(stated.problem, seed=0)
        return bind(problem, stated.meta, stated.task.support, self.inner, self.learned(), begin)

    def _rows(
        self, tasks: Task | list[Task], starts: Sequence[End | None], seed: int, steps: int
    ) -> list[Tensor] | Tensor | None:
        """Which support examples each step of each task of a batch sees, where the solver takes minibatches."""
        if self.inner.minibatch is None:
            return None
        rows: list[Tensor] = []
        for place, start in enumerate(starts):
            first = 0 if start is None else start.step
            rows.extend(minibatches(self.inner, one_of(tasks, place).support, [seed + 1000 * place], steps, first))
        if isinstance(tasks, list):
            return [row.to(self._place()) for row in rows]
        return torch.stack(rows).to(self._place())

    def _starts(
        self, count: int, task_ids: Sequence[Hashable] | None, begin: End | Sequence[End | None] | None
    ) -> tuple[list[End | None], Sequence[Hashable]]:
        """Where the tasks begin, and the keys under which they are left."""
        if (task_ids is not None) != (self.carry == "task"):
            raise ValueError(
                f"task_ids {'are needed' if task_ids is None else 'have no use'} here: give them with carry='task' and "
                "with nothing else"
            )
        if isinstance(task_ids, Tensor):
            task_ids = task_ids.tolist()  # type: ignore[unreachable]  # of which every one would be another
        if task_ids is not None and len(set(task_ids)) < len(task_ids):
            raise ValueError("task_ids names a task twice in one batch: give each its own name")
        keys: Sequence[Hashable] = range(count) if task_ids is None else task_ids
        given = [begin] if isinstance(begin, End) else begin
        for name, items in (("task_ids", keys), ("begin", given)):
            if items is not None and len(items) != count:
                raise ValueError(f"{len(items)} {name} were given for {count} tasks: give one a task")
        if given is not None:
            return list(given), keys
        if self.carry == "none":
            return [None] * count, keys
        return self.carried.gather(keys, self._place()), keys

    def _ends(self, found: list[tuple[list[int], Any, Any]], starts: Sequence[End | None], count: int) -> list[End]:
        ends: list[End] = [None] * count  # type: ignore[list-item]
        for places, _, left in found:
            for row, place in enumerate(places):
                with torch.inference_mode(False):
                    params, state, taken, solution = tree_map(lambda value, row=row: value[row].clone(), left)
                start = starts[place]
                ends[place] = End(params, state, int(taken) + (0 if start is None else start.step), solution)
        return ends

    def _weights(self, count: int, weights: Tensor | Sequence[float] | None) -> Tensor:
        if weights is None:
            return torch.full((count,), 1 / count, device=self._place(), dtype=torch.float64)
        given = torch.as_tensor(weights, dtype=torch.float64, device=self._place()).detach()
        if given.shape != (count,):
            raise ValueError(f"task_weights of shape {tuple(given.shape)} for {count} tasks: give one number a task")
        return given

    def _accumulate(self, grad: Tree, learned_grad: Tree) -> None:
        for name, value in grad.items():
            if (parameter := self._parameter(name)) is not None:
                parameter.grad = value.clone() if parameter.grad is None else parameter.grad + value
        for name, value in learned_grad.items():
            rate = self.rates[_key(name)]
            rate.grad = value.clone() if rate.grad is None else rate.grad + value
        if not self._looked_for_zeros:
            self._looked_for_zeros = True
            learnt = {name: value for name, value in grad.items() if self._parameter(name) is not None}
            _warn_of_zeros(self.problem, self.meta_gradient, learnt, stacklevel=4)

    def _moved(self, task: Task) -> Task:
        return task.to(self._place(), leading(self).dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.carried.apply(fn)
        return self

    def _place(self) -> torch.device:
        like = next(self.parameters(), None)
        return torch.device("cpu") if like is None else like.device

    def _what(self) -> str:
        return "the problem"

    def _steps(self, steps: int | None) -> int:
        if steps is not None and steps < 0:
            raise ValueError(f"steps={steps}: give 0 or more inner steps")
        return self.inner.adaptation_steps if steps is None else steps


def _own(result: Result) -> Result:
    """A result in memory of its own; parameters that never moved are where the start has them, in meta perhaps."""
    end = map_tensors(Tensor.clone, result.end)
    return result._replace(grad=dense(result.grad), learned_grad=dense(result.learned_grad), end=end)


def _refuse_moved(module: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Put buffers back that the losses have changed, and say so: a step recomputed must be the same step.

    Raises:
        ValueError: some have changed.
    """
    odd = [name for name, value in before.items() if not torch.equal(value, module.get_buffer(name))]
    for name in odd:
        module.get_buffer(name).copy_(before[name])
    if odd:
        raise ValueError(
            f"the losses change the buffers {', '.join(odd)}, so that a step recomputed is another step: call the "
            "module in evaluation mode, or with copies, functional_call(module, (meta, copies), inputs)"
        )


def _warn_of_zeros(problem: Problem, estimator: MetaGradient, grad: Tree, stacklevel: int) -> None:
    """Warn once where an estimator that leaves something out leaves meta-parameters without any gradient."""
    if problem.known.warned or not grad or any(torch._C._functorch.is_batchedtensor(value) for value in grad.values()):
        return
    names = [name for name, value in grad.items() if not value.any()]
    everything = len(names) == len(grad)
    if names and (everything or not estimator.second_order or not estimator.learn_start or not estimator.through_steps):
        problem.known.warned = True
        if not estimator.second_order:
            why = (
                "takes no second derivative, so that nothing reaches what only the inner loss reads: use Unrolled() or "
                "Truncated() for those"
            )
        elif not estimator.learn_start:
            why = "does not learn the start: use learn_start=True for what only that reads"
        elif not estimator.through_steps:
            why = "differentiates the solution, which without a proximal term does not depend on the start"
        else:
            why = "finds that neither loss depends on them: do the losses read them from their argument meta?"
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        text = f"the meta-gradient of {shown} is exactly zero. {type(estimator).__name__} {why}"
        warnings.warn(text, stacklevel=stacklevel)


def _key(name: str) -> str:
    # torch allows no dot in a parameter's own name
    return name.replace("%", "%25").replace("/", "%2F").replace(".", "/")


def _parameters(tree: Mapping[str, Tensor]) -> nn.ParameterDict:
    refuse_other(tree, "meta")
    if odd := [name for name in tree if name in dir(nn.ParameterDict)]:
        raise ValueError(f"meta: {', '.join(map(repr, odd))} is a name that torch keeps for itself: choose another")
    # pairs, since a ParameterDict sorts what it takes from a dict, and a loss may read by place
    return nn.ParameterDict((_key(name), nn.Parameter(value.detach().clone())) for name, value in tree.items())


def _tree(parameters: nn.ParameterDict) -> Tree:
    return {_name(key): value.detach() for key, value in parameters.items()}


def _name(key: str) -> str:
    return key.replace("/", ".").replace("%2F", "/").replace("%25", "%")
