"""The few-shot problem of a model: what its losses are, what all inner steps share, and what the model turns out to be.

    inner_loss(params, meta, (inputs, targets))  =  loss(model(inputs), targets)     with params in place of meta's

What lies below the lowest adapted block is computed once a task; its features enter the problem as meta-parameters,
so that no estimator knows about it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from innerloop.adapts import Adapts
from innerloop.batch_norm import BatchNormMode, affine_names, statistics_from_first
from innerloop.blocks import Chain, blocks_of, call, recomputation
from innerloop.curvature import pullback, python_states, random_states, replayed
from innerloop.data_checks import passed as taken
from innerloop.problem import Batch, Problem, Stage, Steps, Task, Tree
from innerloop.start import Start
from innerloop.trees import map_tensors, tensors, tree_leaves, tree_map

# Under these, and a space and a number, features enter a task's meta-parameters, and the loss's own under LOSS.
SUPPORT, QUERY, LOSS = "support features", "query features", "loss"


class Stated(NamedTuple):
    """A task's bilevel problem, and what carries its meta-gradient back to the model's (None: it is that already)."""

    problem: Problem
    meta: Tree
    task: Task
    carry: Callable[[Tree], Tree] | None


class FewShot:
    """The problem of a model whose batch norm is converted.

    Args:
        model: the learner's own copy.
        adapts: which parameters move.
        loss: ``loss(output, target) -> scalar``; the parameters of a module are meta-parameters.
        batch_norm: where queries take their statistics.
        start: None starts at the initialisation itself.
        reuse_prefix: compute what all inner steps share once.
        regulariser: ``regulariser(params) -> scalar``, of all parameters by name, a term of both losses; None for none.

    Raises:
        ValueError: the choice does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        adapts: Adapts,
        loss: Callable[[Any, Any], Tensor],
        batch_norm: BatchNormMode,
        start: Start | None,
        reuse_prefix: bool,
        regulariser: Callable[[Tree], Tensor] | None,
    ) -> None:
        self.model, self.adapts, self.loss, self.batch_norm, self.start = model, adapts, loss, batch_norm, start
        self.regulariser = regulariser
        trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        self._names = {name for name, _ in model.named_parameters()}
        selected, rows = set(adapts.select(model)), adapts.moves(model)
        if odd := selected - self._names:
            raise ValueError(f"{adapts!r} selects {min(odd)}, which is no name in model.named_parameters(): give those")
        if odd := set().union(*rows) - selected:
            raise ValueError(f"{adapts!r} moves {min(odd)}, which it does not select: let select() name all that moves")
        if batch_norm == "step":  # a step's own scale and shift are not what steps move
            selected -= affine_names(model)
        self.adapted = tuple(name for name in trainable if name in selected)
        if not self.adapted:
            raise ValueError(f"{adapts!r} selects only frozen parameters: unfreeze some, or adapt others")
        self.whole = len(self.adapted) == len(trainable)
        self.moves = tuple(frozenset(row).intersection(self.adapted) for row in rows)
        if not all(self.moves):
            raise ValueError(f"{adapts!r} has a row of frozen parameters alone: unfreeze some, or leave it out")
        self.layer = start.layer(model, self.adapted) if start else None
        self._moving_buffers: tuple[str, ...] = ()
        self._seen: dict[tuple[bool, ...], bool] = {}
        self._recomputes = False
        self.prefix: Chain | None = None
        self.suffix: Chain | None = None
        self.blocks: list[Chain] = []
        self._lowest = 0
        self._split(reuse_prefix and batch_norm != "step" and regulariser is None)
        begin = self._from_support if start else self._from_meta
        self.problem = Problem(begin, self._inner_loss, self._outer_loss)
        if self.blocks and regulariser is None:  # which is no stage of a chain
            inner, outer = (partial(self._stages, part) for part in (SUPPORT, QUERY))
            self.problem = replace(self.problem, inner_chain=inner, outer_chain=outer)

    @property
    def unlearned(self) -> set[str]:
        """Names of the head's parameters that its start replaces."""
        return set() if self.layer is None else {f"{self.layer}.weight", f"{self.layer}.bias"}

    def meta(self) -> Tree:
        """The meta-parameters: those of the model that are not frozen, and those of the loss."""
        found = {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}
        if isinstance(self.loss, nn.Module):
            found |= {f"{LOSS} {name}": p.detach() for name, p in self.loss.named_parameters() if p.requires_grad}
        return found

    def parameter(self, name: str) -> nn.Parameter:
        """The parameter of the model or of the loss that a meta-parameter is."""
        if name.startswith(f"{LOSS} ") and isinstance(self.loss, nn.Module):
            return self.loss.get_parameter(name.removeprefix(f"{LOSS} "))
        return self.model.get_parameter(name)

    @property
    def seen(self) -> bool:
        """Whether ``look`` has run in this training mode."""
        return self._mode in self._seen

    @property
    def _mode(self) -> tuple[bool, ...]:
        """Which modules are in training."""
        return tuple(module.training for module in self.model.modules())

    def look(self, inputs: Any) -> Any:
        """Run the model on real inputs and see what it is, where that is not ``seen`` yet.

        Args:
            inputs: of one task.

        Returns:
            What the model gives for them.

        Raises:
            ValueError: the choice of what adapts turns out wrong.
            BadData: the model cannot take these inputs.
        """
        mode, before = self._mode, dict(self.model.named_buffers())
        buffers = {name: buffer.clone() for name, buffer in before.items()}
        versions = {name: buffer._version for name, buffer in buffers.items()}
        passed, drawn = dict(buffers), python_states()
        with torch.no_grad(), replayed(0, 0, inputs):
            with _order_of_use(self.model) as order, recomputation() as again:
                outputs = taken(lambda: call(self.model, passed, inputs), inputs, type(self.model).__name__)
            self._recomputes = self._recomputes or bool(again)
            for chain in (*self.blocks, self.prefix, self.suffix):
                if chain is not None:
                    chain.recomputes = self._recomputes
            moving = (
                name
                for name, buffer in buffers.items()
                if passed[name] is not buffer or buffer._version != versions[name] or not _equal(buffer, before[name])
            )
            self._moving_buffers = tuple(dict.fromkeys((*self._moving_buffers, *moving)))
            self.adapts.verify(self.model, order)
            if self.layer is not None and order and order[-1] is not self.model.get_submodule(self.layer):
                raise ValueError(
                    f"{type(self.start).__name__}() takes {self.layer} for the head of {type(self.model).__name__}, "
                    "but its forward pass does not end there: let the model end in its linear layer, or leave start out"
                )
            if python_states() != drawn:
                raise ValueError(
                    f"the forward pass of {type(self.model).__name__} draws from Python's random or numpy, which steps "
                    "that are computed again would draw otherwise: draw with torch, such as torch.rand(())"
                )
            if self.blocks:
                self._compare(inputs)
            self._seen[mode] = self.prefix is None or _draws(partial(self.prefix, self._buffers(), inputs), inputs)
        return outputs

    def _compare(self, inputs: Any) -> None:
        """Do without a chain that does not give what the model gives, or whose blocks cannot be run one by one.

        At parameters beside the model's own: a head that begins at zero makes all chains alike.
        """
        found, alone = inputs, True
        generator = torch.Generator().manual_seed(0)
        beside = {
            name: value + 0.1 * torch.randn(value.shape, generator=generator).to(value)
            for name, value in self.model.named_parameters()
            if value.is_floating_point()
        }
        try:
            with replayed(0, 0, inputs):
                outputs = call(self.model, beside | self._buffers(), inputs)
            with replayed(0, 0, inputs):
                for block in self.blocks:
                    entering = tensors(found)
                    versions = [leaf._version for leaf in entering]
                    found = block(beside | self._buffers(), found)
                    alone = alone and versions == [leaf._version for leaf in entering]
            pairs = zip(*map(tree_leaves, (found, outputs)), strict=True)
            same = all(torch.allclose(one, other, equal_nan=True) for one, other in pairs)
        except (RuntimeError, TypeError, ValueError, AttributeError):
            same = False
        moved = [name for block in self.blocks for name in block.buffers.intersection(self._moving_buffers)]
        if not same or not alone or len(moved) > len(set(moved)):
            self.problem = replace(self.problem, inner_chain=None, outer_chain=None)
        if same:
            return
        self.blocks, reused = [], self.prefix is not None
        self.prefix = self.suffix = None
        if reused:
            warnings.warn(
                f"the blocks of {type(self.model).__name__}, one after the other, are not its forward pass: features "
                "below what adapts are computed in every inner step; same result, slower",
                stacklevel=6,
            )

    def _buffers(self) -> dict[str, Tensor]:
        """Copies of the buffers that a forward pass changes, so that the model's own never move."""
        return {name: self.model.get_buffer(name).clone() for name in self._moving_buffers}

    def _split(self, reuse_prefix: bool) -> None:
        """The model as a chain of blocks, and those below and from the lowest adapted one, where there are such."""
        blocks = blocks_of(self.model)
        if blocks is None:
            return
        self.blocks = [Chain(self.model, block) for block in blocks]
        self._lowest = next(place for place, block in enumerate(self.blocks) if {*self.adapted} & {*block.names})
        below, above = (
            [part for each in some for part in each] for some in (blocks[: self._lowest], blocks[self._lowest :])
        )
        if below and reuse_prefix:
            self.prefix, self.suffix = Chain(self.model, below), Chain(self.model, above)

    # The losses.

    def _from_meta(self, meta: Tree) -> Tree:
        if frozen := [name for name in self.adapted if name not in meta]:
            raise ValueError(f"{', '.join(frozen)} adapts, but was frozen since: make a new learner, or unfreeze it")
        return {name: meta[name] for name in self.adapted}

    def _from_support(self, meta: Tree, support: Batch, ways: int = 0) -> Tree:
        assert self.start is not None
        assert self.layer is not None
        if isinstance(support, Steps) and self.batch_norm == "step":
            support = support.row(0, 0)
        if isinstance(support, Steps):
            raise ValueError(f"{type(self.start).__name__}() needs one support set, not a batch for every step (Steps)")
        inputs, targets, _ = _parts(support)
        caught: list[Tensor] = []
        layer = self.model.get_submodule(self.layer)
        hook = layer.register_forward_pre_hook(lambda _, arguments: caught.append(arguments[0]))
        try:
            self._forward({}, meta, inputs, SUPPORT)
        finally:
            hook.remove()
        weight, bias = self.start.head(caught[-1], targets, ways)
        return {**self._from_meta(meta), f"{self.layer}.weight": weight, f"{self.layer}.bias": bias}

    def _forward(self, params: Tree, meta: Tree, inputs: Any, part: str) -> Any:
        tree = {name: value for name, value in {**meta, **params}.items() if name in self._names} | self._buffers()
        if self.suffix is None or f"{part} 0" not in meta:
            return call(self.model, tree, inputs, self._recomputes)
        return self.suffix(tree, self._given(meta, inputs, part))

    def _given(self, meta: Tree, inputs: Any, part: str) -> Any:
        """What enters the blocks: the features of the frozen prefix, where there are some, or the inputs."""
        if not (features := _features_in(meta, part)):
            return inputs
        # of a stream, the inputs are the number of the row
        rows = [meta[name].index_select(0, inputs.view(1))[0] if _is_place(inputs) else meta[name] for name in features]
        return pytree.tree_unflatten(rows, self._shape)

    def _stages(self, part: str, meta: Tree, batch: Batch, rows: int | None = None) -> list[Stage]:
        """The inner loss (of SUPPORT) or the outer (of QUERY) as a chain."""
        inputs, targets, step = _parts(batch)
        features = _features_in(meta, part)
        stages = [Stage(features, lambda params, meta, value: self._given(meta, inputs, part))]
        for block in self.blocks[self._lowest if features else 0 :]:
            stages.append(Stage(block.names, partial(self._through, block, rows, step)))
        own = [name for name in meta if name.startswith(f"{LOSS} ")]
        if part == SUPPORT:
            return [*stages, Stage(own, lambda params, meta, value: self._judged(meta, value, targets))]
        return [*stages, Stage(own, lambda params, meta, value: self._with_outputs(meta, value, targets, rows))]

    def _through(self, block: Chain, rows: int | None, step: int, params: Tree, meta: Tree, value: Any) -> Any:
        with statistics_from_first(self.model, rows, step):
            return block({**meta, **params, **self._buffers()}, value)

    def _judged(self, meta: Tree, outputs: Any, targets: Any) -> Tensor:
        loss = self.loss
        if not isinstance(loss, nn.Module):
            return loss(outputs, targets)
        own = {name.removeprefix(f"{LOSS} "): meta[name] for name in meta if name.startswith(f"{LOSS} ")}
        own |= {name: buffer.clone() for name, buffer in loss.named_buffers()}  # the loss's own never move
        value: Tensor = functional_call(loss, own, (outputs, targets))
        return value

    def _inner_loss(self, params: Tree, meta: Tree, batch: Batch) -> Tensor:
        inputs, targets, step = _parts(batch)
        with statistics_from_first(self.model, None, step) if step else contextlib.nullcontext():
            outputs = self._forward(params, meta, inputs, SUPPORT)
        return self._regularised(self._judged(meta, outputs, targets), params, meta)

    def _outer_loss(self, params: Tree, meta: Tree, batch: Batch, rows: int | None = None) -> tuple[Tensor, Any]:
        inputs, targets, step = _parts(batch)
        with statistics_from_first(self.model, rows, step):
            outputs = self._forward(params, meta, inputs, QUERY)
        loss, shown = self._with_outputs(meta, outputs, targets, rows)
        return self._regularised(loss, params, meta), shown

    def _regularised(self, loss: Tensor, params: Tree, meta: Tree) -> Tensor:
        return loss if self.regulariser is None else loss + self.regulariser({**meta, **params})

    def _with_outputs(self, meta: Tree, outputs: Any, targets: Any, rows: int | None) -> tuple[Tensor, Any]:
        if rows:
            judged = len(tree_leaves(targets)[0])

            def queries(value: Any) -> Any:
                whole = isinstance(value, Tensor) and value.ndim > 0 and len(value) == rows + judged
                return value[rows:] if whole else value

            outputs = tree_map(queries, outputs)
        return self._judged(meta, outputs, targets), map_tensors(Tensor.detach, outputs)

    # A task's problem.

    def state(
        self,
        task: Task,
        meta: Tree,
        *,
        transductive: bool = True,
        ways: int = 0,
        reuse: bool = True,
        differentiate: bool,
    ) -> Stated:
        """The problem of a task, on the features of the frozen prefix.

        Args:
            task: one task.
            meta: as ``meta()``.
            transductive: queries are normalised together; otherwise by the support set's statistics.
            ways: number of classes, for a start that makes the head.
            reuse: False leaves the prefix out.
            differentiate: whether its meta-gradient will be taken.
        """
        problem = self.problem
        if self.start:
            problem = replace(problem, start=partial(self._from_support, ways=ways))
        streams = [isinstance(part, Steps) for part in task]
        rows = None
        if any(streams) and self.batch_norm == "step":
            raise ValueError("batch_norm='step' with a batch for every step (Steps): use batch_norm='batch' with those")
        if not transductive:
            if any(streams):
                raise ValueError(
                    "with a batch for every step (Steps) no one support set gives the queries their statistics: use "
                    "batch_norm='batch' and leave inductive out, or batch_norm='frozen'"
                )
            inputs = task.support[0]
            rows = len(tree_leaves(inputs)[0])
            query = tree_map(lambda *pair: torch.cat(pair), inputs, task.query[0])
            task = task._replace(query=(query, task.query[1]))
            chain = problem.outer_chain and partial(self._stages, QUERY, rows=rows)
            problem = replace(problem, outer_loss=partial(self._outer_loss, rows=rows), outer_chain=chain)
        unknown = any(stream and callable(part.rows) for stream, part in zip(streams, task, strict=True))
        if not reuse or unknown or self.prefix is None or self.suffix is None or self._seen.get(self._mode, True):
            if self.batch_norm == "step":
                task = Task(*(Steps(lambda step, part=part: (*part, step)) for part in task))
            return Stated(problem, meta, task, None)
        prefix, suffix = self.prefix, self.suffix

        def features(tree: Tree) -> Tree:
            support, query = (part.rows[0] if stream else part[0] for stream, part in zip(streams, task, strict=True))
            if task.query is task.support:  # there are no queries, and nothing is computed twice
                found = self._named(SUPPORT, self._features(prefix, tree, support, streams[0]))
                return found | {name.replace(SUPPORT, QUERY): value for name, value in found.items()}
            with statistics_from_first(self.model, rows):
                judged = self._named(QUERY, self._features(prefix, tree, query, streams[1]))
            return judged | self._named(SUPPORT, self._features(prefix, tree, support, streams[0]))

        above = {name: meta[name] for name in meta if name in suffix.names or name not in self._names}
        below = {name: meta[name] for name in prefix.names if name in meta}
        reduced = Task(*(_numbered(part) if stream else part for stream, part in zip(streams, task, strict=True)))
        if not differentiate:
            return Stated(problem, above | features(below), reduced, None)
        found, pull = pullback(features, below)

        def carry(grad: Tree) -> Tree:
            (through,) = pull({name: grad[name] for name in found})
            total = {name: grad[name] for name in above}
            for name, value in through.items():
                total[name] = total[name] + value if name in total else value
            return total

        return Stated(problem, above | found, reduced, carry)

    def _features(self, prefix: Chain, tree: Tree, inputs: Any, stream: bool) -> Any:
        if not stream:
            return prefix({**tree, **self._buffers()}, inputs)
        count = len(tree_leaves(inputs)[0])
        rows = [tree_map(lambda value, row=row: value[row], inputs) for row in range(count)]
        each = [self._features(prefix, tree, row, False) for row in rows]
        return tree_map(lambda *values: torch.stack(values), *each)

    def _named(self, part: str, features: Any) -> Tree:
        values, self._shape = pytree.tree_flatten(features)
        return {f"{part} {number}": value for number, value in enumerate(values)}


def _equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other) or bool((one.isnan() & other.isnan() | (one == other)).all())


def _features_in(meta: Tree, part: str) -> list[str]:
    """The names of the features of a part among the meta-parameters, in order."""
    return list(takewhile(meta.__contains__, (f"{part} {number}" for number in range(len(meta)))))


def _parts(batch: Batch) -> tuple[Any, Any, int]:
    """Inputs, targets and the inner step, which only scales and shifts of a step's own are told."""
    inputs, targets, *step = batch
    return inputs, targets, step[0] if step else 0


def _numbered(stream: Steps) -> Steps:
    """A stream whose inputs are the number of their row."""
    inputs, targets = stream.rows
    first = tree_leaves(inputs)[0]
    return Steps((torch.arange(len(first), device=first.device), targets))


def _is_place(inputs: Any) -> bool:
    return isinstance(inputs, Tensor) and inputs.ndim == 0


def _draws(function: Callable[[], Any], like: Any) -> bool:
    """Whether a function draws random numbers; their generators are left as they were."""
    with replayed(0, 0, like):
        before = random_states(like)
        function()
        return any(not torch.equal(generator.get_state(), state) for generator, state in before)


@contextlib.contextmanager
def _order_of_use(model: nn.Module) -> Iterator[list[nn.Module]]:
    """Collects the modules with parameters of their own, in order of their last use within the block."""
    order: list[nn.Module] = []

    def used(module: nn.Module, *_: object) -> None:
        if module in order:
            order.remove(module)
        order.append(module)

    own = [module for module in model.modules() if next(module.parameters(recurse=False), None) is not None]
    hooks = [module.register_forward_pre_hook(used) for module in own]
    try:
        yield order
    finally:
        for hook in hooks:
            hook.remove()


def refuse_misread(model: nn.Module, loss: Any) -> None:
    """Refuse a model or a loss that would be misread.

    Raises:
        ValueError: so; the message says what to give instead.
    """
    if not callable(loss) or isinstance(loss, type):
        raise ValueError(f"loss={loss!r} is no function: give loss(output, target), such as F.cross_entropy")
    own = {id(parameter) for parameter in model.parameters()}
    if isinstance(loss, nn.Module) and any(id(parameter) in own for parameter in loss.parameters()):
        raise ValueError("the loss holds parameters of the model, and a learner copies both: pass them by the output")
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(f"{name} has sparse gradients, which inner steps cannot take: build it with sparse=False")
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(
                f"{name} has max_norm={module.max_norm}, by which a forward pass overwrites the weights: leave "
                "max_norm out, and shorten its rows after optimizer.step() or in the forward pass"
            )
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in ("SpectralNorm", "WeightNorm"):
                raise ValueError(
                    f"{name} has {type(hook).__name__} as a hook, whose result no copy can hold: use "
                    "torch.nn.utils.parametrizations.spectral_norm or weight_norm"
                )


def scores(output: Any) -> Any:
    """What a model gives; of an output with an attribute ``logits``, as of Hugging Face's models, those."""
    return getattr(output, "logits", output)


def cross_entropy(output: Any, target: Tensor) -> Tensor:
    """``F.cross_entropy`` of an output's scores."""
    return F.cross_entropy(scores(output), target)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """``F.mse_loss``, which refuses shapes that would only broadcast."""
    if output.shape != target.shape:
        raise ValueError(
            f"the model gives {tuple(output.shape)} for targets {tuple(target.shape)}: make the shapes equal"
        )
    return (output - target).square().mean()
