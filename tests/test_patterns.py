"""Lambda patterns: work that is really skipped, the cost model, the choice, and the command."""

import itertools
import json
import re
import types
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import innerloop as il
from innerloop.cli import main
from innerloop.problem import Tree
from innerloop.reporting import Timing
from innerloop.studies.patterns import (
    Row,
    best_trades,
    choose,
    deployed,
    movable_blocks,
    multiply_adds,
    patterns_for,
    predicted_cost,
    read_choice,
    study,
    times_of,
    with_pattern,
)
from innerloop.training.evaluation import Estimate
from innerloop.training.runs import load_learner, read_run

PATTERNS = ["".join(bits) for bits in itertools.product("10", repeat=5)]
MOVING = [pattern for pattern in PATTERNS if "1" in pattern]
LR, STEPS = 0.1, 3
BLOCKS = ["block1", "block2", "block3", "block4", "head"]


def conv4() -> il.models.Conv4:
    return il.models.Conv4(in_channels=1, ways=3, filters=4, size=20).double()


def learner(adapts: object = None, inner: object = None) -> il.MetaLearner:
    inner = inner or il.SGD(lr=LR, steps=STEPS)
    return il.MetaLearner(conv4(), adapts=adapts, inner=inner).eval()  # type: ignore[arg-type]


def support() -> tuple[Tensor, Tensor]:
    return torch.rand(6, 1, 20, 20, dtype=torch.float64), torch.arange(3).repeat_interleave(2)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def masked(trained: il.MetaLearner, pattern: str, inputs: Tensor, targets: Tensor) -> Tree:
    """The reference: all gradients in every step, by plain autograd, those of frozen blocks multiplied by 0."""
    params = {name: p.detach().clone().requires_grad_() for name, p in trained.model.named_parameters()}
    rates = {name: trained.rates.get(name.replace(".", "/"), LR) for name in params}
    moving = {block for block, bit in zip(BLOCKS, pattern, strict=True) if bit == "1"}
    for _ in range(trained.inner.steps):
        loss = nn.functional.cross_entropy(torch.func.functional_call(trained.model, params, (inputs,)), targets)
        grads = torch.autograd.grad(loss, list(params.values()))
        params = {
            name: (p - rates[name] * (name.split(".")[0] in moving) * g).detach().requires_grad_()
            for (name, p), g in zip(params.items(), grads, strict=True)
        }
    return params


@pytest.mark.parametrize(
    ("filters", "size", "ratios"),
    [  # the specification rounds the two 10.45 of 64 channels up
        (64, 32, "1.00 1.38(1.45) 2.30(4.66) 2.76(10.4) 2.87(14.4) 2.76(10.4) 1.44(1.44) 1.00"),
        (32, 32, "1.00 1.41(1.56) 2.27(4.87) 2.68(10.4) 2.78(13.9) 2.68(10.4) 1.39(1.39) 1.00"),
        (32, 84, "1.00 1.42(1.56) 2.28(4.94) 2.69(10.6) 2.78(13.9) 2.69(10.6) 1.39(1.39) 1.00"),
    ],
)
def test_the_cost_model_gives_the_published_ratios(filters: int, size: int, ratios: str) -> None:
    rows = "11111 01111 00111 00011 00001 00010 10000 11110"
    forward = multiply_adds(il.models.Conv4(filters=filters, size=size), torch.rand(2, 3, size, size))
    for pattern, text in zip(rows.split(), ratios.split(), strict=True):
        plain, _, reusing = text.rstrip(")").partition("(")
        for reuse, printed in ((False, plain), (True, reusing)):
            ratio = predicted_cost(forward, "11111", 5, reuse) / predicted_cost(forward, pattern, 5, reuse)
            if printed:
                assert f"{ratio:.{len(printed.partition('.')[2])}f}" == printed, (pattern, reuse)
    assert predicted_cost(forward, "00000", 5, False) == 0


@pytest.mark.parametrize("pattern", MOVING)
def test_the_cost_model_counts_what_is_computed(pattern: str) -> None:
    trained, (inputs, targets) = learner(), support()
    forward = multiply_adds(trained.model, inputs)
    for reuse in (False, True):
        patterned = with_pattern(trained, il.Blocks(pattern), reuse)
        patterned.adapted_parameters(inputs, targets)  # the first time the learner looks at the model as well
        with FlopCounterMode(display=False) as counter:
            patterned.adapted_parameters(inputs, targets)
        assert counter.get_total_flops() == 2 * len(inputs) * predicted_cost(forward, pattern, STEPS, reuse)


def test_the_longer_the_frozen_prefix_the_less_is_computed() -> None:
    trained, computed = il.MetaLearner(il.models.Conv4(filters=8), inner=il.SGD(lr=LR, steps=10)).eval(), []
    for pattern in ("11111", "01111", "00111", "00011", "00001"):
        with FlopCounterMode(display=False) as counter:
            with_pattern(trained, il.Blocks(pattern)).adapted_parameters(torch.rand(5, 3, 32, 32), torch.arange(5))
        computed.append(counter.get_total_flops())
    assert computed == sorted(set(computed), reverse=True)


def test_multiply_adds_are_those_of_the_layers() -> None:
    forward = multiply_adds(il.models.Conv4(), torch.rand(3, 3, 32, 32))
    assert forward == [32 * 32 * 27 * 64, 16 * 16 * 576 * 64, 8 * 8 * 576 * 64, 4 * 4 * 576 * 64, 256 * 5]
    grouped = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2, bias=False), nn.Flatten(), nn.Linear(8 * 9, 2))
    assert multiply_adds(grouped, torch.rand(2, 4, 5, 5)) == [8 * 9 * 2 * 9, 8 * 9 * 2]


@pytest.mark.parametrize("pattern", MOVING)
def test_skipping_changes_nothing_and_frozen_blocks_stay(pattern: str) -> None:
    trained = learner()
    before, (inputs, targets) = state(trained), support()
    patterned = with_pattern(trained, il.Blocks(pattern))
    expected = masked(trained, pattern, inputs, targets)
    plain = with_pattern(trained, il.Blocks(pattern), reuse_prefix=False).adapted_parameters(inputs, targets)
    reusing = patterned.adapted_parameters(inputs, targets)
    adapted = patterned.adapt(inputs, targets)
    assert plain.keys() == reusing.keys() == set(patterned.adapted)
    for name, start in trained.model.named_parameters():
        shipped = adapted.get_parameter(name)
        if name in plain:
            assert torch.equal(plain[name], reusing[name])
            torch.testing.assert_close(plain[name], expected[name], rtol=1e-12, atol=1e-14)
            assert torch.equal(shipped, reusing[name])
            # a bias before batch norm has no gradient but rounding
            assert name.endswith("conv.bias") or not torch.equal(plain[name], start)
        else:
            assert torch.equal(shipped, start)
            assert torch.equal(expected[name], start)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in (*trained.parameters(), *patterned.parameters()))


def test_no_adaptation_computes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = learner(il.Blocks("00111"))
    calls: list[int] = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *_, **__: calls.append(1))
    trained.model.register_forward_hook(lambda *_: calls.append(1))
    trained.model.get_submodule("block1").register_forward_hook(lambda *_: calls.append(1))
    found = trained.adapted_parameters(*support(), steps=0)
    assert not calls
    assert found.keys() == set(trained.adapted)
    assert all(torch.equal(value, trained.model.get_parameter(name)) for name, value in found.items())


def test_a_head_that_is_read_off_the_support_set_is_kept_and_leaves_no_choice() -> None:
    trained, given = il.MetaLearner(conv4(), inner=il.SGD(lr=LR, steps=STEPS), start=il.Prototypes()).eval(), support()
    found, expected = (each.adapted_parameters(*given) for each in (with_pattern(trained, il.Blocks("11111")), trained))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    with pytest.raises(ValueError, match="the model's last linear layer, but head has no bias or does not adapt"):
        with_pattern(trained, il.Blocks("11110"))
    with pytest.raises(ValueError, match="the head is made anew for every task"):
        movable_blocks(trained)


@pytest.mark.parametrize(("pattern", "same"), [("11111", il.Everything()), ("00001", il.Head()), ("11110", il.Body())])
def test_three_patterns_are_maml_anil_and_boil(pattern: str, same: il.adapts.Adapts) -> None:
    trained, given = learner(same), support()
    patterned = il.MetaLearner(trained.model, il.Blocks(pattern), trained.inner).eval()
    found, expected = (each.adapted_parameters(*given) for each in (patterned, trained))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    batch = il.Task(*(tuple(part[None] for part in given),) * 2)
    for each in (patterned, trained):
        each.meta_step(batch)
    for name, parameter in patterned.named_parameters():
        torch.testing.assert_close(parameter.grad, trained.get_parameter(name).grad, rtol=0, atol=0)


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("pattern", ["11111", "01111", "00111", "00011", "00001", "00100", "01010", "11110"])
def test_work_below_the_lowest_moving_block_is_skipped(pattern: str, reuse: bool) -> None:
    patterned = with_pattern(learner(), il.Blocks(pattern), reuse)
    forward, backward = [0] * 5, [0] * 5
    blocks = [patterned.model.get_submodule(name) for name in BLOCKS]
    for place, block in enumerate(blocks):

        def passed(module: nn.Module, given: tuple[Tensor], output: Tensor, place: int = place) -> None:
            forward[place] += 1
            if output.requires_grad:
                output.register_hook(lambda grad: backward.__setitem__(place, backward[place] + 1))

        block.register_forward_hook(passed)
    patterned.adapted_parameters(*support())  # the first time the learner looks at the model as well
    forward[:], backward[:] = [0] * 5, [0] * 5
    patterned.adapted_parameters(*support())
    lowest = pattern.index("1")
    assert forward == [1 if reuse else STEPS] * lowest + [STEPS] * (5 - lowest)
    assert backward == [0] * lowest + [STEPS] * (5 - lowest)


@pytest.mark.parametrize("pattern", ["00001", "00101", "11110"])
def test_only_what_moves_is_differentiated_and_only_once(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    patterned = with_pattern(learner(), il.Blocks(pattern), reuse_prefix=False)
    asked: list[int] = []
    saved: set[tuple[int, ...]] = set()
    original = torch.autograd.grad

    def watched(outputs: Tensor, inputs: list[Tensor], **options: Any) -> tuple[Tensor, ...]:
        assert not options.get("create_graph")
        assert not options.get("retain_graph")
        asked.append(len(inputs))
        grads = original(outputs, inputs, **options)
        assert not any(grad.requires_grad for grad in grads)
        return grads

    def kept(value: Tensor) -> Tensor:
        saved.add(tuple(value.shape))
        return value

    monkeypatch.setattr(torch.autograd, "grad", watched)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda value: value):
        found = patterned.adapted_parameters(*support())
    assert saved
    assert asked == [len(patterned.adapted)] * STEPS
    assert not any(value.requires_grad for value in found.values())
    # the activations of block n are 20, 10, 5, 2 pixels wide inside
    sides = {shape[-1] for shape in saved if len(shape) == 4 and shape[0] == 6}
    lowest = pattern.index("1")
    assert not sides & {20, 10, 5, 2} - {[20, 10, 5, 2, 1][place] for place in range(lowest, 5)}


@pytest.mark.parametrize("batch_norm", ["batch", "frozen"])
def test_a_prefix_that_draws_is_computed_in_every_step(batch_norm: Any) -> None:
    first = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3)).double().eval()
    inputs, targets = torch.randn(6, 4, dtype=torch.float64), support()[1]
    reusing, plain = (
        il.MetaLearner(model, il.Head(), il.SGD(lr=LR, steps=STEPS), batch_norm=batch_norm, reuse_prefix=reuse)
        for reuse in (True, False)
    )
    before, calls = state(reusing), []
    reusing.model.get_submodule("0.0").register_forward_hook(lambda *_: calls.append(1))
    for training in (False, True):
        adapted = []
        for each in (reusing, plain):
            each.train(training)
            each.adapted_parameters(inputs, targets)  # the first time the learner looks at the model as well
            torch.manual_seed(0)
            calls.clear()
            adapted.append(each.adapted_parameters(inputs, targets))
            if each is reusing:
                assert len(calls) == (STEPS if training else 1)
        torch.testing.assert_close(*adapted, rtol=0, atol=0)
    # the stored statistics of batch norm, where there are any, are not updated
    assert all(torch.equal(value, before[name]) for name, value in reusing.state_dict().items())


class WatchedScale(torch.autograd.Function):
    """Twice its input; notes whether a graph of its backward pass is made."""

    generate_vmap_rule = True
    graphs: ClassVar[list[bool]] = []

    @staticmethod
    def forward(inputs: Tensor) -> Tensor:
        return 2 * inputs

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        WatchedScale.graphs.append(torch.is_grad_enabled())
        return 2 * cotangent


class Doubled(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        return WatchedScale.apply(inputs)


def test_adaptation_makes_no_second_order_graph() -> None:
    model = nn.Sequential(nn.Linear(4, 6), Doubled(), nn.Linear(6, 6), Doubled(), nn.Linear(6, 3)).double()
    trained = il.MetaLearner(model, inner=il.SGD(lr=LR, steps=STEPS))
    inputs, targets = torch.rand(6, 4, dtype=torch.float64), support()[1]
    for pattern in ("111", "011"):
        WatchedScale.graphs.clear()
        with_pattern(trained, il.Blocks(pattern)).adapt(inputs, targets)
        # the scale below the lowest moving block is not gone back through
        assert WatchedScale.graphs == [False] * STEPS * (2 if pattern == "111" else 1)
    WatchedScale.graphs.clear()
    trained.meta_step(il.Task(*((inputs[None], targets[None]),) * 2))
    assert any(WatchedScale.graphs)


def test_learned_rates_come_along_and_are_not_invented() -> None:
    trained = learner(il.Blocks("00111"), il.LearnedRates(lr=0.1, steps=2))
    with torch.no_grad():
        for rate in trained.rates.values():
            rate.copy_(torch.rand_like(rate))
    patterned, given = with_pattern(trained, il.Blocks("00011")), support()
    assert all(torch.equal(rate, trained.rates[name]) for name, rate in patterned.rates.items())
    expected = masked(trained, "00011", *given)
    for name, value in patterned.adapted_parameters(*given).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-14)
    with pytest.raises(ValueError, match=r"moves block2.conv.(weight|bias), for which training has learned no rate"):
        with_pattern(trained, il.Blocks("01000"))
    assert movable_blocks(trained) == [False, False, True, True, True]
    with pytest.raises(
        ValueError, match=r"0 of 5 blocks can move; rates were learned for Named\(.*train with adapts everything"
    ):
        movable_blocks(learner(il.Named("*.bias"), il.LearnedRates(lr=0.1, steps=2)))
    with pytest.raises(ValueError, match="does not say what its blocks are"):
        movable_blocks(il.MetaLearner(nn.Linear(2, 2)))
    norms = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    assert movable_blocks(il.MetaLearner(norms)) == [True, True, True]


def test_the_patterns_tried() -> None:
    assert sorted(patterns_for([True] * 5)) == sorted(PATTERNS)
    assert patterns_for([False, True, True]) == ["011", "001", "010", "000"]
    deep = patterns_for([True] * 10)
    assert len(deep) == 20  # ten suffixes, ten single blocks of which the last is a suffix, and none
    assert (deep[0], deep[-1]) == ("1" * 10, "0" * 10)
    assert "0000000011" in deep
    assert "0000100000" in deep


def row(pattern: str, accuracy: float, seconds: float, full: float = 0.6) -> Row:
    timing, exact = Timing(seconds, seconds, seconds), Estimate(accuracy, 0.0)
    return Row(pattern, pattern.count("1"), exact, Estimate(accuracy - full, 0.0), 1, 1, timing, timing)


def random_rows(seed: int) -> list[Row]:
    generator = np.random.default_rng(seed)
    return [row("11111", 0.6, 1.0)] + [
        row(pattern, float(generator.choice([0.5, 0.57, 0.59, 0.6, 0.61])), float(generator.choice([0.2, 0.4, 2.0])))
        for pattern in PATTERNS[1:]
    ]


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_obeys_its_rules(seed: int) -> None:
    rows = random_rows(seed)
    assert choose(rows, 0.0).accuracy.mean >= 0.6
    chosen = [choose(rows, tolerance) for tolerance in (0.0, 0.5, 1.0, 2.0, 5.0, 100.0)]
    times = [each.time_reusing.median for each in chosen]
    assert times == sorted(times, reverse=True)
    assert times[-1] == min(each.time_reusing.median for each in rows if "1" in each.pattern)
    assert all("1" in each.pattern for each in chosen)
    shuffled = [rows[place] for place in np.random.default_rng(seed).permutation(len(rows))]
    assert choose(shuffled, 1.0) == chosen[2]


def test_a_pattern_that_may_lose_more_than_the_tolerance_is_not_chosen() -> None:
    full, noisy = row("11111", 0.6, 1.0), row("00001", 0.6, 0.1)
    noisy = noisy._replace(difference=Estimate(0.0, 0.015))
    assert choose([full, noisy], 1.0) == full
    assert choose([full, noisy], 1.5) == noisy


def test_ties_and_the_last_resort() -> None:
    full = row("11111", 0.6, 1.0)
    assert choose([full, row("00011", 0.5, 0.1), row("00000", 0.9, 0.0)], 1.0) == full
    tied = [full, row("00111", 0.6, 0.5), row("00011", 0.6, 0.5), row("00001", 0.595, 0.5), row("00110", 0.6, 0.5)]
    assert choose(tied, 1.0).pattern == "00011"
    assert choose([*tied, row("00010", 0.6, 0.5), row("00001", 0.6, 0.5)], 1.0).pattern == "00001"
    assert [each.pattern for each in best_trades(tied)] == ["00011"]
    assert [each.pattern for each in best_trades([full, row("00001", 0.5, 0.1), row("10000", 0.5, 0.9)])] == [
        "00001",
        "11111",
    ]
    for tolerance in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be 0 or more percentage points"):
            choose(tied, tolerance)


def test_timing_warms_up_and_takes_turns() -> None:
    seen: list[tuple[str, int]] = []
    runs = [lambda inputs, _, name=name: seen.append((name, int(inputs))) for name in "ab"]
    timings = times_of(runs, [(torch.tensor(n), torch.tensor(0)) for n in range(3)], 7)
    assert len(seen) == 2 * 17
    assert seen[:5] == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2)]
    assert all(0 <= timing.lower <= timing.median <= timing.upper for timing in timings)


def test_timing_waits_for_the_device_before_and_after(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: events.append(f"wait for {device}"))
    inputs = types.SimpleNamespace(device=torch.device("cuda"))
    times_of([lambda *_: events.append("run")], [(inputs, inputs)], 2)  # type: ignore[list-item]
    assert events == ["wait for cuda", "run", "wait for cuda"] * 12


def test_the_study_leaves_the_learner_alone_and_pairs_tasks(tmp_path: Path) -> None:
    draw_classes(tmp_path, 16)
    tasks = il.tasks.folder(tmp_path, ways=3, shots=2, queries=3, size=16, channels=1)
    trained = il.MetaLearner(
        il.models.Conv4(in_channels=1, ways=3, filters=4, downsample="stride", size=16), il.Blocks("00111")
    )
    trained.model.get_submodule("block1").eval()
    trained.model.get_parameter("block2.conv.weight").requires_grad_(False)
    before = state(trained)
    modes = [module.training for module in trained.modules()]
    flags = [p.requires_grad for p in trained.parameters()]
    drawn: list[tuple[str, int, int]] = []
    batch = tasks.batch
    tasks.batch = lambda *which: drawn.append(which) or batch(*which)  # type: ignore[func-returns-value, method-assign]
    sections = study(trained, tasks, [2, 1], tolerance=100.0, count=6, repetitions=2)
    # a section: the same validation tasks for 32 patterns, and only then test tasks, for full adaptation and the choice
    seen, last = ("validation", 0, 6), ("test", 0, 6)
    drawn = [each for each in drawn if each[2] > 1]  # a single one tells the data from others
    assert drawn == [seen] + 2 * ([seen] * 32 + [last] * 2)
    assert [section.steps for section in sections] == [1, 2]
    assert (deployed(sections, 1).steps, deployed(sections, 7).steps) == (1, 2)
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    assert [module.training for module in trained.modules()] == modes
    assert [p.requires_grad for p in trained.parameters()] == flags
    trained.eval()
    values = {
        pattern: trained_accuracy(with_pattern(trained, il.Blocks(pattern)), batch("validation", 0, 6))
        for pattern in ("11111", "00011")
    }
    found = next(each for each in sections[1].rows if each.pattern == "00011")
    assert found.accuracy == pytest.approx(Estimate.of(values["00011"]))
    assert found.difference == pytest.approx(Estimate.of(values["00011"] - values["11111"]))
    none = sections[1].rows[-1]
    assert (none.pattern, none.weights, none.cost) == ("00000", 0, 0)
    for steps, message in (([], "steps are"), ([0], "1 or more")):
        with pytest.raises(ValueError, match=message):
            study(trained, tasks, steps)
    with pytest.raises(ValueError, match="they need classes"):
        study(trained, il.tasks.sinusoid())


def test_an_interrupted_study_goes_on_where_it_stood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw_classes(tmp_path / "images", 16)
    tasks = il.tasks.folder(tmp_path / "images", ways=3, shots=2, queries=3, size=16, channels=1)
    trained = il.MetaLearner(il.models.Conv4(in_channels=1, ways=3, filters=4, downsample="stride", size=16)).eval()
    calls: list[str] = []
    evaluated = il.MetaLearner.evaluate

    def evaluate(*given: Any, **options: Any) -> Any:
        calls.append("evaluate")
        if len(calls) == last:
            raise KeyboardInterrupt
        return evaluated(*given, **options)

    def timed(runs: Any, *_: Any) -> list[Timing]:
        calls.append("time")
        return [Timing(1 / (place + 3), 0.1, 0.2) for place in range(len(runs))]

    monkeypatch.setattr(il.MetaLearner, "evaluate", evaluate)
    monkeypatch.setattr("innerloop.studies.patterns.times_of", timed)

    def go(kept: Path | None) -> Any:
        calls.clear()
        return study(trained, tasks, [1, 2], tolerance=100.0, count=4, repetitions=2, kept=kept)

    last = 10**6
    whole, every = go(None), 2 * (32 + 1 + 2)
    assert len(calls) == every
    last = 50
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path / "kept")
    last = 10**6
    assert go(tmp_path / "kept") == whole
    assert len(calls) == every - 49 - 1  # no adaptation at all is the same in any number of steps
    assert calls.count("time") == 1


def trained_accuracy(patterned: il.MetaLearner, batch: il.Task) -> Tensor:
    accuracy = patterned.evaluate(batch, steps=2).accuracy
    assert accuracy is not None
    return accuracy.double()


def draw_classes(folder: Path, classes: int) -> None:
    for label in range(classes):
        generator = np.random.default_rng(label)
        (folder / f"class{label}").mkdir(parents=True)
        shape = np.kron(generator.random((4, 4)) > 0.5, np.ones((4, 4)))
        for number in range(6):
            grey = 200 * shape + generator.normal(20, 40, (16, 16))
            Image.fromarray(grey.clip(0, 255).astype(np.uint8)).save(folder / f"class{label}" / f"{number}.png")


def test_the_command_from_a_run_to_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw_classes(tmp_path / "images", 16)
    run = tmp_path / "run"
    data = ["--dataset=folder", f"--data={tmp_path / 'images'}", "--size=16", "--channels=1", "--ways=3", "--queries=3"]
    model = ["--model=conv4", "--filters=4", "--downsample=stride", "--inner-lr=0.3", "--inner-steps=2"]
    length = [
        "--device=cpu",
        "--tasks-per-batch=2",
        "--steps=10",
        "--validate-every=5",
        "--validation-tasks=4",
        "--test-tasks=4",
    ]
    method = ["--adapts=everything", "--inner=sgd", "--meta-gradient=first-order", "--threads=1"]
    main(["train", f"--out={run}", *data, *model, *method, *length])
    capsys.readouterr()
    measure = ["--tolerance=5", "--steps=1,2", "--tasks=8", "--repetitions=3"]
    main(["patterns", str(run), *measure])
    out = capsys.readouterr().out
    assert "2 steps  pattern 32/32  00000" in out
    results = json.loads((run / "patterns.json").read_text())
    assert [len(section["rows"]) for section in results["sections"]] == [32, 32]
    assert {"command", "commit", "machine", "versions", "threads", "inductive", "parts"} <= results.keys()
    blocks, steps = read_choice(run / "pattern.json")
    pattern = blocks.pattern
    assert isinstance(pattern, str)
    assert steps == 2
    assert pattern == results["sections"][1]["chosen"]
    assert f"{pattern} in 2 steps" in out
    rows = {each["pattern"]: each for each in results["sections"][1]["rows"]}
    assert rows["11111"]["difference"] == {"mean": 0.0, "interval": 0.0}
    assert rows["11111"]["weights"] == (9 * 4 + 4) + 3 * (9 * 16 + 4) + 4 * 8 + (4 * 3 + 3)  # with scale and shift
    assert 100 * rows[pattern]["difference"]["mean"] >= -5
    page = (run / "patterns.md").read_text()
    assert page.count("\n| ") == 2 * 34  # a header, a rule and 32 patterns
    one_step = page.partition("## 1 step\n")[2].partition("## 2 steps")[0]
    for each in PATTERNS:
        assert re.search(rf"\| \**{each}\** \| (yes)? \| \d+\.\d+ ± \d+\.\d+ \| [+-]\d+\.\d+ ± \d+\.\d+ \|", one_step)
    assert f"**{pattern}**" in page
    pixels = np.asarray(Image.open(run / "patterns.png").convert("L"))
    assert min(pixels.shape) > 300
    assert len(np.unique(pixels)) > 50
    restored, _ = load_learner(run, read_run(run))
    assert with_pattern(restored, blocks).adapted
    draw_classes(tmp_path / "new", 3)
    new = [f"--support={tmp_path / 'new'}", f"--query={tmp_path / 'new'}", f"--pattern={run / 'pattern.json'}"]
    main(["adapt", str(run), *new])
    assert f"in 2 steps of {blocks!r}; the trained head is used as it is" in capsys.readouterr().out

    for broken, fault in (
        ('{"pattern": "0x1", "steps": 2, "parts": []}', "0 or 1 a block"),
        ('{"pattern": "011"}', "'parts'"),
        ("[", "Expecting value"),
    ):
        (run / "pattern.json").write_text(broken)
        with pytest.raises(ValueError, match=f"holds no pattern .*{fault}"):
            read_choice(run / "pattern.json")
    for arguments, cure in (
        (["--steps=1,x"], "give whole numbers separated by commas"),
        (["--steps=0"], "1 or more"),
        (["--tolerance=-1"], "must be 0 or more percentage points"),
        (["--tasks=1"], "both must be 2 or more"),
    ):
        with pytest.raises(SystemExit):
            main(["patterns", str(run), *arguments])
        error = capsys.readouterr().err
        assert cure in error
        assert error.count("\n") == 1
