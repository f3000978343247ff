"""The learner: a model bound to the four choices."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from innerloop.adapts import Adapts, Blocks, Everything
from innerloop.batch_norm import BatchNormMode, convert, freeze, statistics_from_first, to_torch
from innerloop.blocks import Chain, blocks_of, parameter_names
from innerloop.curvature import second_order_kernels
from innerloop.inner import SGD, InnerSolver, bind
from innerloop.meta_gradient import MemoryReduced, MetaGradient, Result, Unrolled, WarmStarts
from innerloop.meta_gradient.failures import fault
from innerloop.meta_gradient.hypergradient import refuse_moves
from innerloop.problem import Batch, Problem, Task, Tree

Out = TypeVar("Out")

# Names under which features enter a task's meta-parameters; no torch parameter can have a space in its name.
_SUPPORT, _QUERY = "support features", "query features"


class Metrics(NamedTuple):
    """What a meta-step reports, as means over the tasks.

    Attributes:
        loss: outer loss at the adapted parameters, a scalar.
        accuracy: share of query examples classified rightly, a scalar; None where targets are not classes.
        diagnostics: what the estimator reports, by name.
    """

    loss: Tensor
    accuracy: Tensor | None
    diagnostics: dict[str, Tensor]


class Evaluation(NamedTuple):
    """How each task went.

    Attributes:
        loss: query loss after adaptation, ``[tasks]``.
        accuracy: query accuracy after adaptation, ``[tasks]``; None where targets are not classes.
        outputs: the model's outputs for the query examples, ``[tasks, queries, ...]``.
        loss_curve: query loss after 0, 1, ... steps, ``[tasks, steps + 1]``; None if not asked for.
        accuracy_curve: the same of the accuracy.
    """

    loss: Tensor
    accuracy: Tensor | None
    outputs: Tensor
    loss_curve: Tensor | None
    accuracy_curve: Tensor | None


class MetaLearner(nn.Module):
    """Learns a model that adapts to a new task in a few inner steps.

    Its parameters are the meta-parameters: those of its own copy of the model, ``model``, and the rates that the inner
    solver learns, ``rates``. The model given is never changed; while a task is adapted to, neither is the copy.

    Batch norm takes the statistics of the batch at hand (``batch_norm="batch"``, the papers' way): the support set's
    in the inner loop, those of all queries together for the outer loss.

    With ``MemoryReduced(warm_start=...)``, ``warm_starts`` holds where tasks were left; it is no part of the learner's
    ``state_dict()``, and has its own ``state_dict()`` and ``load_state_dict()``. `innerloop.fit` keeps both.

    Args:
        model: any module that maps a batch of inputs to outputs.
        adapts: which parameters move in the inner loop.
        inner: how they move.
        meta_gradient: how the outer gradient is found.
        loss: ``loss(output, target) -> scalar``, for the inner and the outer loop.
        batch_norm: ``"batch"``, ``"task"`` (queries are normalised by the support set's statistics) or ``"frozen"``
            (the model's stored statistics). See ``innerloop.batch_norm``.
        chunk_size: how many tasks are computed at once; bounds memory and changes no result. None takes 8 on the CPU,
            where neither fewer nor more was best throughout, and all on an accelerator. 1 computes task by task.
        reuse_prefix: compute what lies below the lowest adapted block once a task instead of once a step. Exact; left
            out by itself where the blocks are not known or random (dropout).

    Raises:
        ValueError: choices that do not fit the model or each other; the message says what does.
    """

    def __init__(
        self,
        model: nn.Module,
        adapts: Adapts | None = None,
        inner: InnerSolver | None = None,
        meta_gradient: MetaGradient | None = None,
        loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
        batch_norm: BatchNormMode = "batch",
        chunk_size: int | None = None,
        reuse_prefix: bool = True,
    ) -> None:
        super().__init__()
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size}: give how many tasks to compute at once, 1 or more, or None")
        if any(nn.parameter.is_lazy(value) for value in (*model.parameters(), *model.buffers())):
            raise ValueError("the model has lazy parameters: pass one batch of inputs through it first")
        self.adapts = adapts if adapts is not None else Everything()
        self.meta_gradient = meta_gradient if meta_gradient is not None else Unrolled()
        self.loss = _squared_error if loss is F.mse_loss else loss
        self.batch_norm = batch_norm
        self.chunk_size = chunk_size
        self.model = copy.deepcopy(model)
        convert(self.model, batch_norm)
        freeze(self.model)

        trainable = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        selected = set(self.adapts.select(self.model))
        self.adapted = tuple(name for name in trainable if name in selected)
        if not self.adapted:
            raise ValueError(f"{self.adapts!r} selects only frozen parameters: unfreeze some, or adapt others")
        moves = self.adapts.moves(self.model) if isinstance(self.adapts, Blocks) else ()
        moves = tuple(row.intersection(self.adapted) for row in moves)
        if not all(moves):
            raise ValueError(f"{self.adapts!r} has a row of frozen parameters alone: unfreeze some, or leave it out")
        inner = inner if inner is not None else SGD(lr=0.1, steps=5)
        refuse_moves(self.meta_gradient, inner, moves)
        self.inner = self.meta_gradient.prepare(inner, partial=len(self.adapted) < len(trainable))

        rates = self.inner.learned({name: self.model.get_parameter(name).detach() for name in self.adapted})
        # torch allows no dot in a parameter's own name
        self.rates = nn.ParameterDict({name.replace(".", "/"): rate for name, rate in rates.items()})
        self._prefix: Chain | None = None
        self._suffix: Chain | None = None
        if reuse_prefix:
            self._prefix, self._suffix = self._split()
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self.model.modules())
        self._vectorise = True
        self._learns_start = getattr(self.meta_gradient, "learn_start", True)
        estimator = self.meta_gradient
        resumes = isinstance(estimator, MemoryReduced) and estimator.warm_start != "none"
        self._resumes = cast(MemoryReduced, estimator) if resumes else None
        self.warm_starts = WarmStarts()
        self._problems = {
            transductive: Problem(self._start, self._inner_loss, outer_loss, moves=moves)
            for transductive, outer_loss in ((True, self._transductive_outer_loss), (False, self._inductive_outer_loss))
        }

    def meta_step(
        self,
        batch: Task,
        step_weights: Sequence[float] | None = None,
        task_ids: Sequence[Hashable] | None = None,
    ) -> Metrics:
        """Adapt to every task of a batch and add the mean meta-gradient to ``.grad``, as ``backward()`` would.

        Args:
            batch: tasks with a leading task dimension; moved to the learner's device and precision.
            step_weights: weights of the query loss after each inner step (the multi-step loss of MAML++); None puts all
                weight on the last.
            task_ids: what names each task, for ``MemoryReduced(warm_start="task")`` alone: a task that comes again
                under its name begins where it was left.

        Returns:
            Query loss, accuracy and diagnostics, averaged over the tasks. Where they or the gradient are not finite,
            `diagnose` tells why.

        Raises:
            ValueError: the batch is not a batch of tasks, or its ``task_ids`` are missing or of another number.
        """
        batch = self._checked(batch)
        meta, learned = self._meta(), self._learned()
        keys, begin = self._begin(len(batch.support[1]), task_ids, meta)

        def task_gradient(inputs: tuple[Task, Any], seed: int | None) -> Any:
            task, begin = inputs
            result, left = self._estimate(task, begin, meta, learned, step_weights, seed)
            accuracy = _accuracy(result.extra, task)
            return (result.grad, result.learned_grad, result.loss, accuracy, result.diagnostics), left

        total: Any = None
        ends: list[Any] = []
        with second_order_kernels(self._recurrent):
            for share, (out, left) in self._over_tasks(task_gradient, (batch, begin)):
                mean = torch.utils._pytree.tree_map(lambda value, share=share: share * value.mean(0), out)
                total = mean if total is None else torch.utils._pytree.tree_map(torch.add, total, mean)
                ends.append(left)
        self.warm_starts.store(keys, torch.utils._pytree.tree_map(lambda *parts: torch.cat(parts), *ends))
        grad, learned_grad, loss, accuracy, diagnostics = total
        for name, value in grad.items():
            if self._learns_start or name not in self.adapted:
                _accumulate(self.model.get_parameter(name), value)
        for name, value in learned_grad.items():
            _accumulate(self.rates[name.replace(".", "/")], value)
        return Metrics(loss, accuracy[0] if accuracy else None, diagnostics)

    def diagnose(
        self,
        batch: Task,
        step_weights: Sequence[float] | None = None,
        task_ids: Sequence[Hashable] | None = None,
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
        batch = self._checked(batch)
        meta, learned = self._meta(), self._learned()
        tasks = len(batch.support[1])
        _, begin = self._begin(tasks, task_ids, meta)
        found: dict[int, str] = {}
        with torch.no_grad(), second_order_kernels(self._recurrent):
            for place in range(tasks):
                one = torch.utils._pytree.tree_map(lambda value, place=place: value[place], (batch, begin))

                def estimate(task: Task = one[0], start: Any = one[1]) -> Result:
                    return self._estimate(task, start, meta, learned, step_weights, self._seed())[0]

                if reason := fault(estimate, one[0], self.inner.steps):
                    found[place] = reason
        if not found:
            return None
        place, reason = next(iter(found.items()))
        name = "" if task_ids is None else f" ({task_ids[place]!r})"
        others = f"; of {tasks} tasks {len(found)} fail" if len(found) > 1 else ""
        return f"in task {place} of the batch{name} {reason}{others}"

    def evaluate(
        self, batch: Task, steps: int | None = None, inductive: bool = False, curve: bool = False
    ) -> Evaluation:
        """Adapt to every task of a batch and judge it on its queries; nothing is recorded and nothing changes.

        Args:
            batch: tasks with a leading task dimension; moved to the learner's device and precision.
            steps: inner steps; None takes the solver's ``test_steps``.
            inductive: normalise queries by the support set's statistics, so that no query sees another. Always so with
                ``batch_norm="task"``, and without effect with ``"frozen"``.
            curve: also report loss and accuracy after each step, at one more query pass a step.

        Raises:
            ValueError: the batch is not a batch of tasks, or ``steps`` is negative.
        """
        steps = self._steps(steps)
        batch = self._checked(batch)
        meta, learned = self._meta(), self._learned()
        transductive = not inductive and self.batch_norm != "task"

        def one(task: Task, seed: int | None) -> tuple[Tensor, Tensor, list[Tensor]]:
            problem, reduced, reduced_task, _ = self._reduce(task, meta, transductive, seed, differentiate=False)
            loop = bind(problem, reduced, reduced_task.support, self.inner, learned)
            losses: list[Tensor] = []
            accuracies: list[Tensor] = []
            outputs: list[Tensor] = []

            def judge(step: int, params: Tree, *_: object) -> None:
                loss, output = problem.outer_loss(params, reduced, reduced_task.query)
                losses.append(loss)
                accuracies.extend(_accuracy(output, task))
                outputs[:] = [output]

            judge(steps, loop.run(steps, judge if curve else None))
            return outputs[0], torch.stack(losses), [torch.stack(accuracies)] if accuracies else []

        with second_order_kernels(self._recurrent):
            parts = [out for _, out in self._over_tasks(one, batch)]
        outputs, losses = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
        accuracies = torch.cat([part[2][0] for part in parts]) if parts[0][2] else None
        return Evaluation(
            losses[:, -1],
            None if accuracies is None else accuracies[:, -1],
            outputs,
            losses if curve else None,
            accuracies if curve else None,
        )

    def adapt(self, inputs: Tensor, targets: Tensor, steps: int | None = None, inductive: bool = False) -> nn.Module:
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
        with torch.no_grad(), second_order_kernels(self._recurrent):

            def shared(parameter: Tensor) -> nn.Parameter:
                return nn.Parameter(parameter.detach(), requires_grad=False)

            own: dict[int, Any] = {id(parameter): shared(parameter) for parameter in self.model.parameters()}
            own |= {id(self.model.get_parameter(name)): shared(value) for name, value in changed.items()}
            own |= {id(buffer): buffer for buffer in self.model.buffers()}
            adapted = copy.deepcopy(self.model, own).eval()
            support = self._single(inputs, targets).support[0]
            to_torch(adapted, support if inductive or self.batch_norm == "task" else None)
        return adapted

    def adapted_parameters(self, inputs: Tensor, targets: Tensor, steps: int | None = None) -> Tree:
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
        with torch.inference_mode(False), torch.no_grad(), second_order_kernels(self._recurrent):
            task, meta = self._single(inputs, targets), self._meta()
            if not steps:
                return self._start(meta)
            problem, meta, task, _ = self._reduce(task, meta, True, self._seed(), differentiate=False)
            return bind(problem, meta, task.support, self.inner, self._learned(), first_order=True).run(steps)

    def train(self, mode: bool = True) -> MetaLearner:
        """Switch the model's dropout and the like on or off; batch norm follows ``batch_norm`` alone."""
        super().train(mode)
        freeze(self.model)
        return self

    def extra_repr(self) -> str:
        """The choices."""
        choices = ("adapts", "inner", "meta_gradient", "batch_norm")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in choices)

    # The bilevel problem of one task.

    def _forward(self, params: Tree, meta: Tree, inputs: Tensor, features: Tensor | None) -> Tensor:
        tree = {**meta, **params}
        if features is not None and self._suffix is not None:
            return self._suffix(tree, features)
        return functional_call(self.model, tree, (inputs,))

    def _start(self, meta: Tree) -> Tree:
        return {name: meta[name] for name in self.adapted}

    def _inner_loss(self, params: Tree, meta: Tree, batch: Batch) -> Tensor:
        meta = dict(meta)
        features = meta.pop(_SUPPORT, None)
        meta.pop(_QUERY, None)
        inputs, targets = batch
        return self.loss(self._forward(params, meta, inputs, features), targets)

    def _outer_loss(self, params: Tree, meta: Tree, batch: Batch, rows: int | None) -> tuple[Tensor, Tensor]:
        meta = dict(meta)
        meta.pop(_SUPPORT, None)
        features = meta.pop(_QUERY, None)
        inputs, targets = batch
        with statistics_from_first(self.model, rows):
            outputs = self._forward(params, meta, inputs, features)
        outputs = outputs[rows:] if rows else outputs
        return self.loss(outputs, targets), outputs.detach()

    def _transductive_outer_loss(self, params: Tree, meta: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._outer_loss(params, meta, batch, None)

    def _inductive_outer_loss(self, params: Tree, meta: Tree, batch: Batch) -> tuple[Tensor, Tensor]:
        # the support inputs come first and give the statistics
        inputs, targets = batch
        return self._outer_loss(params, meta, batch, len(inputs) - len(targets))

    def _split(self) -> tuple[Chain, Chain] | tuple[None, None]:
        """The chains below and from the lowest adapted block, or nothing where there is no such split."""
        blocks = blocks_of(self.model)
        if blocks is None:
            return None, None
        lowest = next(
            place for place, block in enumerate(blocks) if set(parameter_names(self.model, block)) & set(self.adapted)
        )
        below, above = ([part for block in some for part in block] for some in (blocks[:lowest], blocks[lowest:]))
        if not below:
            return None, None
        return Chain(self.model, below), Chain(self.model, above)

    def _reduce(
        self, task: Task, meta: Tree, transductive: bool, seed: int | None, differentiate: bool
    ) -> tuple[Problem, Tree, Task, Callable[[Tree], Tree] | None]:
        """The problem on the features of the frozen prefix, which enter it as meta-parameters.

        Returns:
            The problem, its meta-parameters, its task, and what carries its meta-gradient back to the model's
            parameters (None where there is no prefix, or nothing is to be differentiated).
        """
        problem = self._problems[transductive]
        if seed is not None:
            problem = replace(problem, seed=seed)
        inputs = task.support[0]
        if not transductive:
            task = task._replace(query=(torch.cat([inputs, task.query[0]]), task.query[1]))
        if self._prefix is None or self._suffix is None or _random(self._prefix.parts):
            return problem, meta, task, None
        prefix, rows = self._prefix, None if transductive else len(inputs)

        def features(tree: Tree) -> Tree:
            if transductive and task.query is task.support:  # adapt() has no queries, and nothing is computed twice
                return dict.fromkeys((_SUPPORT, _QUERY), prefix(tree, inputs))
            with statistics_from_first(self.model, rows):
                query = prefix(tree, task.query[0])
            return {_SUPPORT: prefix(tree, inputs) if rows is None else query[:rows], _QUERY: query}

        above = {name: meta[name] for name in self._suffix.names if name in meta}
        below = {name: meta[name] for name in prefix.names if name in meta}
        if not differentiate:
            return problem, above | features(below), task, None
        found, pull = torch.func.vjp(features, below)[:2]

        def carry(grad: Tree) -> Tree:
            (through,) = pull({name: grad[name] for name in (_SUPPORT, _QUERY)})
            total = {name: grad[name] for name in above}
            for name, value in through.items():
                total[name] = total[name] + value if name in total else value
            return total

        return problem, above | found, task, carry

    def _estimate(
        self,
        task: Task,
        begin: Any,
        meta: Tree,
        learned: Tree,
        step_weights: Sequence[float] | None,
        seed: int | None,
    ) -> tuple[Result, Any]:
        """The meta-gradient of one task in the model's parameters, and where a warm start leaves the task."""
        transductive = self.batch_norm != "task"
        problem, reduced, reduced_task, carry = self._reduce(task, meta, transductive, seed, differentiate=True)
        left: Any = ()
        if self._resumes is not None:
            result, left = self._resumes.resume(problem, reduced, reduced_task, self.inner, begin)
        else:
            arguments = problem, reduced, reduced_task, self.inner, learned, step_weights
            result = self.meta_gradient.estimate(*arguments)
        return result if carry is None else result._replace(grad=carry(result.grad)), left

    # Batches of tasks.

    def _over_tasks(self, function: Callable[[Any, int | None], Out], batch: Any) -> Iterator[tuple[float, Out]]:
        """Map a function of one task over a batch, by chunks; yields each chunk's share of the batch and its results.

        A model that vmap cannot take is computed task by task from then on, with one warning.
        """
        first = torch.utils._pytree.tree_leaves(batch)[0]
        tasks = len(first)
        size = self.chunk_size or (8 if first.device.type == "cpu" else tasks)
        begin, refusal = 0, None
        with torch.no_grad():
            while begin < tasks:
                vectorise = self._vectorise and size > 1
                end = min(begin + (size if vectorise else 1), tasks)
                chunk = torch.utils._pytree.tree_map(lambda value, part=slice(begin, end): value[part], batch)
                seed = self._seed()
                try:
                    if vectorise:
                        out = torch.func.vmap(lambda task, seed=seed: function(task, seed), randomness="different")(
                            chunk
                        )
                    else:
                        one = function(torch.utils._pytree.tree_map(lambda value: value[0], chunk), seed)
                        out = torch.utils._pytree.tree_map(lambda value: value.unsqueeze(0), one)
                except torch.OutOfMemoryError as error:
                    error.add_note(f"{end - begin} tasks were computed at once: give a smaller chunk_size")
                    raise
                except RuntimeError as error:
                    if not vectorise:
                        raise
                    # If the loop fails as well, the fault is not vmap's, and the loop's error is the clearer one.
                    self._vectorise, refusal = False, error
                    continue
                if refusal is not None:
                    warnings.warn(
                        f"{type(self.model).__name__} is computed task by task, same result, slower, because vmap "
                        f"cannot take it: {str(refusal).splitlines()[0]}",
                        stacklevel=4,
                    )
                    refusal = None
                yield (end - begin) / tasks, out
                begin = end

    def _begin(self, tasks: int, task_ids: Sequence[Hashable] | None, meta: Tree) -> tuple[Sequence[Hashable], Any]:
        """Keys of the tasks and where they begin, stacked; both empty where every task begins at the start."""
        by_task = self._resumes is not None and self._resumes.warm_start == "task"
        if (task_ids is not None) != by_task:
            raise ValueError(
                f"task_ids {'are needed' if task_ids is None else 'have no use'} here: give them with "
                "MemoryReduced(warm_start='task') and with nothing else"
            )
        if self._resumes is None:
            return (), ()
        keys = range(tasks) if task_ids is None else task_ids
        if len(keys) != tasks:
            raise ValueError(f"{len(keys)} task_ids were given for {tasks} tasks: give one a task")
        return keys, self.warm_starts.gather(keys, self._resumes.cold(self._problems[True], meta))

    def _single(self, inputs: Tensor, targets: Tensor) -> Task:
        """One task for adaptation, which has no queries; see _reduce."""
        if len(inputs) != len(targets):
            raise ValueError(
                f"adapt() was given {len(inputs)} inputs and {len(targets)} targets: give one target an input"
            )
        place = next(self.model.parameters())
        # autograd keeps no tensor that was made in inference mode
        inputs, targets = (part.clone() if part.is_inference() else part for part in (inputs, targets))
        support = Task((inputs, targets), ()).to(place.device, place.dtype).support
        return Task(support, support)

    def _checked(self, batch: Task) -> Task:
        support, query = (tuple(part) for part in batch)
        lengths = {len(tensor) for tensor in (*support, *query)}
        if len(lengths) != 1 or support[1].ndim < 2:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (*support, *query))
            raise ValueError(
                f"a batch of tasks has the same leading task dimension in all four tensors, but their shapes are "
                f"{shapes}; add it to a single task with tensor.unsqueeze(0)"
            )
        for part, (inputs, targets) in (("support", support), ("query", query)):
            if inputs.shape[1] != targets.shape[1]:
                raise ValueError(
                    f"the {part} set has {inputs.shape[1]} inputs but {targets.shape[1]} targets a task: give as many"
                )
        place = next(self.model.parameters())
        return Task(support, query).to(place.device, place.dtype)

    def _steps(self, steps: int | None) -> int:
        if steps is not None and steps < 0:
            raise ValueError(f"steps={steps}: give 0 or more inner steps")
        return self.inner.adaptation_steps if steps is None else steps

    def _meta(self) -> Tree:
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def _learned(self) -> Tree:
        return {name.replace("/", "."): rate.detach() for name, rate in self.rates.items()}

    def _seed(self) -> int | None:
        """A fresh seed for the inner loop's random draws, from torch's global generator; None if there are none."""
        return int(torch.randint(2**31, ())) if _random([self.model]) else None


def _accuracy(outputs: Tensor, task: Task) -> list[Tensor]:
    """The share of queries classified rightly, in a list that is empty where targets are not classes."""
    targets = task.query[1]
    if targets.is_floating_point() or outputs.ndim != targets.ndim + 1:
        return []
    return [(outputs.argmax(-1) == targets).float().mean()]


def _squared_error(output: Tensor, target: Tensor) -> Tensor:
    """``F.mse_loss`` in plain operations: torch's own has no forward-mode rule for its derivative."""
    if output.shape != target.shape:
        raise ValueError(
            f"the model gives {tuple(output.shape)} for targets {tuple(target.shape)}: make the shapes equal"
        )
    return (output - target).square().mean()


def _accumulate(parameter: nn.Parameter, grad: Tensor) -> None:
    parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad


def _random(parts: Sequence[nn.Module]) -> bool:
    """Whether the parts draw random numbers when called: an active dropout anywhere."""
    return any(
        module.training and getattr(module, name, 0) > 0
        for part in parts
        for module in part.modules()
        for name in ("p", "dropout", "drop_prob")
        if isinstance(getattr(module, name, 0), (int, float))
    )
