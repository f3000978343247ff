"""The outer loop: what is kept, when it stops, and that a killed run ends as if nothing had happened."""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import innerloop as il
from innerloop.choices import META_GRADIENT, make
from innerloop.errors import Diverged
from innerloop.meta_gradient import Mixed
from innerloop.tasks import Episodes, ImageSet
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint
from innerloop.training.evaluation import evaluate
from innerloop.training.fit import Fitted, fit
from innerloop.training.session import multi_step_weights
from innerloop.training.store import Record, read_records

Schedule = Callable[[torch.optim.Optimizer], Any]


class Killed(BaseException):
    """Stands in for a process that ends without a word."""


@pytest.fixture(scope="module")
def tasks() -> Episodes:
    """3-way 2-shot tasks on 5x5 images: a pattern a class, and noise."""
    generator = torch.Generator().manual_seed(1)
    patterns = torch.rand(18, 1, 1, 5, 5, generator=generator)
    images = (patterns + 0.4 * torch.rand(18, 8, 1, 5, 5, generator=generator)) / 1.4
    splits = {"train": tuple(range(10)), "validation": (10, 11, 12, 13), "test": (14, 15, 16, 17)}
    names = tuple(map(str, range(18)))
    image_set = ImageSet("patterns", (images * 255).byte().flatten(0, 1), (8,) * 18, names, splits)
    return Episodes(image_set, ways=3, shots=2, queries=4)


def make_learner(inner_lr: float = 0.3, dropout: float = 0.0) -> il.MetaLearner:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 3))
    return il.MetaLearner(model, inner=il.SGD(lr=inner_lr, steps=2))


def same(first: il.MetaLearner, second: il.MetaLearner) -> bool:
    other = second.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in first.state_dict().items())


def without_time(path: Path) -> list[Record]:
    return [{key: value for key, value in record.items() if key != "seconds"} for record in read_records(path)]


OUTER: dict[str, tuple[Callable[..., torch.optim.Optimizer], Schedule | None]] = {
    "adam, cosine": (
        lambda p: torch.optim.Adam(p, lr=0.01),
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.5 * (1 + math.cos(step / 4))),
    ),
    "adamw, one cycle": (
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=12),
    ),
    "sgd with momentum, milestones": (
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7]),
    ),
    "rmsprop, plateau": (
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
    ),
    "nadam": (lambda p: torch.optim.NAdam(p, lr=0.01), None),
}


@pytest.mark.parametrize("outer", OUTER)
def test_a_killed_run_resumes_bit_for_bit(tasks: Episodes, tmp_path: Path, outer: str) -> None:
    def session(folder: Path, log: Callable[[Record], None] | None = None) -> tuple[il.MetaLearner, Fitted]:
        learner = make_learner(dropout=0.2)
        optimizer = OUTER[outer][0](learner.parameters())
        schedule = OUTER[outer][1]
        fitted = fit(
            learner,
            tasks,
            steps=12,
            tasks_per_batch=3,
            optimizer=optimizer,
            scheduler=schedule and schedule(optimizer),
            clip=0.5,
            multi_step_loss=8,
            first_order=5,
            validate_every=4,
            validation_tasks=6,
            folder=folder,
            resume=True,
            progress=False,
            log=log,
        )
        return learner, fitted

    def kill(record: Record) -> None:
        if record["step"] == 7:
            raise Killed

    whole, expected = session(tmp_path / "whole")
    with pytest.raises(Killed):
        session(tmp_path / "killed", kill)
    torch.manual_seed(123)  # whatever a new process does before
    resumed, found = session(tmp_path / "killed")
    assert same(whole, resumed)
    assert found._replace(seconds=0) == expected._replace(seconds=0)
    assert without_time(tmp_path / "killed" / "metrics.jsonl") == without_time(tmp_path / "whole" / "metrics.jsonl")
    first, second = (load_file(tmp_path / name / "last.safetensors") for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_killed_run_keeps_where_its_tasks_were_left(tasks: Episodes, tmp_path: Path) -> None:
    def session(folder: Path, carry: Literal["slot", "none"], stop: int | None = None) -> il.MetaLearner:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Linear(12, 3))
        inner = il.SGD(lr=0.3, steps=1, weight_decay=0.1)
        learner = il.MetaLearner(model, il.Head(), inner, "memory-reduced:iterations=2", carry=carry)

        def kill(record: Record) -> None:
            if record["step"] == stop:
                raise Killed

        options: dict[str, Any] = dict(steps=8, tasks_per_batch=3, validate_every=3, validation_tasks=2, progress=False)
        fit(learner, tasks, folder=folder, resume=True, log=kill, **options)
        return learner

    with pytest.raises(Killed):
        session(tmp_path / "killed", "slot", 5)
    session(tmp_path / "killed", "slot")
    session(tmp_path / "whole", "slot")
    session(tmp_path / "cold", "none")
    killed, whole, cold = (load_file(tmp_path / name / "last.safetensors") for name in ("killed", "whole", "cold"))
    assert killed.keys() == whole.keys() > cold.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
    body = "learner/model.1.weight"
    assert not torch.equal(whole[body], cold[body])
    assert {"carried/2/params/3.weight", "carried/2/solution/3.weight"} <= whole.keys()

    states = load_checkpoint(tmp_path / "killed" / "last.safetensors")
    assert [left["step"] for left in states["carried"].values()] == [8, 8, 8]


def test_evaluation_is_without_dropout_and_leaves_the_modes(tasks: Episodes) -> None:
    learner = make_learner(dropout=0.5)
    learner.model.get_submodule("1").eval()
    modes = [module.training for module in learner.modules()]
    first, second = (evaluate(learner, tasks, "test", 6, tasks_per_batch=size) for size in (6, 4))
    assert first.loss.mean == pytest.approx(second.loss.mean, rel=1e-6)
    assert [module.training for module in learner.modules()] == modes
    values = torch.cat([learner.eval().evaluate(batch).loss for batch in tasks.test(6, 6)]).double()
    assert first.loss.interval == pytest.approx(1.96 * values.std().item() / math.sqrt(6))


@pytest.mark.parametrize(("pressed", "seen"), [(2, 3), (8, 8)])
def test_an_interrupt_finishes_the_step_and_can_be_resumed(
    tasks: Episodes, tmp_path: Path, pressed: int, seen: int
) -> None:
    def session(folder: Path, log: Callable[[Record], None] | None = None) -> il.MetaLearner:
        learner = make_learner()
        options: dict[str, Any] = dict(steps=8, tasks_per_batch=2, validate_every=4, validation_tasks=6, resume=True)
        fit(learner, tasks, folder=folder, progress=False, log=log, **options)
        return learner

    def press(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == pressed:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        session(tmp_path / "stopped", press)
    assert signal.getsignal(signal.SIGINT) is before
    # The signal comes when a step is done, and is seen by the next, if there is one.
    assert load_checkpoint(tmp_path / "stopped" / "last.safetensors")["progress"]["step"] == seen
    assert same(session(tmp_path / "stopped"), session(tmp_path / "whole"))


def test_the_best_weights_are_kept(tasks: Episodes, tmp_path: Path) -> None:
    learner = make_learner()
    records: list[Record] = []
    # So large a rate that training goes up and down.
    optimizer = torch.optim.SGD(learner.parameters(), lr=3.0)
    options: dict[str, Any] = dict(steps=10, tasks_per_batch=2, validate_every=1, validation_tasks=8, progress=False)
    fitted = fit(learner, tasks, optimizer=optimizer, folder=tmp_path, log=records.append, **options)
    accuracies = [record["accuracy"] for record in records if record["kind"] == "validation"]
    assert accuracies[-1] < max(accuracies)
    assert fitted.best == max(accuracies)
    assert fitted.best_step == 1 + accuracies.index(max(accuracies))
    assert evaluate(learner, tasks, "validation", 8).quality == fitted.best
    kept = load_file(tmp_path / "best.safetensors")
    assert all(torch.equal(kept[name], tensor) for name, tensor in learner.state_dict().items())


def test_early_stop(tasks: Episodes) -> None:
    learner = make_learner()
    still = torch.optim.SGD(learner.parameters(), lr=0.0)
    options: dict[str, Any] = dict(steps=50, tasks_per_batch=2, validate_every=2, validation_tasks=4, progress=False)
    fitted = fit(learner, tasks, optimizer=still, patience=2, **options)
    assert (fitted.step, fitted.best_step, fitted.stopped) == (6, 2, "patience")


def test_time_limit_and_going_on_with_a_longer_one(tasks: Episodes, tmp_path: Path) -> None:
    learner = make_learner()
    options: dict[str, Any] = dict(steps=4, tasks_per_batch=2, validation_tasks=4, folder=tmp_path, resume=True)
    fitted = fit(learner, tasks, minutes=1e-9, progress=False, **options)
    assert (fitted.step, fitted.best_step, fitted.stopped) == (1, 1, "minutes")
    assert fit(make_learner(), tasks, minutes=1e-9, progress=False, **options).step == 1
    fitted = fit(make_learner(), tasks, minutes=5, progress=False, **options)
    assert (fitted.step, fitted.stopped) == (4, "steps")


def test_divergence_names_the_step_and_leaves_the_checkpoint(tasks: Episodes, tmp_path: Path) -> None:
    learner = make_learner()
    good = {name: tensor.clone() for name, tensor in learner.state_dict().items()}

    def poison(record: Record) -> None:
        if record["kind"] == "train" and record["step"] == 3:
            with torch.no_grad():
                learner.model.get_parameter("1.weight").fill_(math.inf)

    still = torch.optim.SGD(learner.parameters(), lr=0.0)
    options: dict[str, Any] = dict(steps=9, tasks_per_batch=2, validate_every=2, validation_tasks=4, progress=False)
    with pytest.raises(
        Diverged, match=r"^outer step 4: loss nan.*resume from a checkpoint.*checkpoint of step 2 is in"
    ):
        fit(learner, tasks, optimizer=still, folder=tmp_path, log=poison, **options)
    saved = load_checkpoint(tmp_path / "last.safetensors")
    assert saved["progress"]["step"] == 2
    assert all(torch.equal(saved["learner"][name], tensor) for name, tensor in good.items())


def test_clipping_shortens_the_whole_gradient(tasks: Episodes) -> None:
    learner = make_learner()
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    optimizer = torch.optim.SGD(learner.parameters(), lr=1.0)
    records: list[Record] = []
    options: dict[str, Any] = dict(steps=1, tasks_per_batch=2, validation_tasks=0, progress=False, log=records.append)
    fit(learner, tasks, optimizer=optimizer, clip=0.01, **options)
    moved = torch.cat([(a - b).flatten() for a, b in zip(before, learner.parameters(), strict=True)]).norm()
    assert records[0]["gradient_norm"] > 0.01
    assert moved.item() == pytest.approx(0.01, rel=1e-3)


def test_regression_is_judged_by_its_loss(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tasks = il.tasks.sinusoid(shots=5, queries=5)
    learner = il.MetaLearner(il.models.MLP([1, 16, 1]), inner=il.SGD(lr=0.01, steps=1), loss=nn.functional.mse_loss)
    records: list[Record] = []
    options: dict[str, Any] = dict(steps=20, validate_every=5, validation_tasks=20, folder=tmp_path, progress=False)
    fitted = fit(learner, tasks, log=records.append, **options)
    losses = [record["loss"] for record in records if record["kind"] == "validation"]
    assert fitted.best == -min(losses)
    assert all(record["accuracy"] is None for record in records if record["kind"] == "validation")


def test_a_folder_that_holds_a_run_is_not_overwritten(tasks: Episodes, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(tasks_per_batch=1, validation_tasks=0, folder=tmp_path, progress=False)
    fit(make_learner(), tasks, steps=1, **options)
    with pytest.raises(ValueError, match="already holds a run"):
        fit(make_learner(), tasks, steps=2, **options)
    learner = make_learner()
    other = torch.optim.SGD(learner.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"trained with.*Adam.*not.*SGD"):
        fit(learner, tasks, steps=2, optimizer=other, resume=True, **options)


@pytest.mark.parametrize("wrong", ["steps", "tasks_per_batch", "clip", "patience", "minutes", "validate_every"])
def test_settings_out_of_range(tasks: Episodes, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"{wrong} is 0; it must be above 0"):
        fit(make_learner(), tasks, progress=False, **{"steps": 1, wrong: 0})  # type: ignore[arg-type]


def test_derivatives_are_annealed_from_first_to_second_order(tasks: Episodes) -> None:
    learner = make_learner()
    learner.meta_gradient = il.Unrolled(record=False)
    records: list[Record] = []
    fit(
        learner,
        tasks,
        steps=5,
        tasks_per_batch=2,
        first_order=3,
        validation_tasks=0,
        progress=False,
        log=records.append,
    )
    assert [each["curvature_products"] for each in records] == [0, 0, 0, learner.inner.steps, learner.inner.steps]
    assert learner.meta_gradient == il.Unrolled(record=False)
    itd_bio = il.MetaLearner(learner.model, il.Head(), meta_gradient=il.Unrolled(learn_start=False))
    with pytest.raises(ValueError, match="leave one out"):
        fit(itd_bio, tasks, steps=5, first_order=3, progress=False)


def test_weights_of_the_multi_step_loss() -> None:
    assert multi_step_weights(4, 0, 100) == [0.25] * 4
    # Halfway the early ones have half of what they began with.
    assert multi_step_weights(4, 50, 100) == pytest.approx([0.125, 0.125, 0.125, 0.625])
    assert multi_step_weights(4, 99, 100) == pytest.approx([0.0075, 0.0075, 0.0075, 0.9775])
    assert multi_step_weights(4, 100, 100) is None


def test_checkpoints_hold_any_state_without_pickle(tmp_path: Path) -> None:
    state = {
        "numbers": (1, 2.5, -math.inf, True, None, "text"),
        3: [torch.arange(3), {"deep": torch.tensor(1.5, dtype=torch.float64)}],
        "tied": torch.ones(2)[:1],
        "1": {"a": torch.tensor(1.0)},
        1: {"a": torch.tensor(2.0)},
        "1/a": torch.tensor(3.0),
    }
    save_checkpoint(tmp_path / "state.safetensors", {"it": state})
    found = load_checkpoint(tmp_path / "state.safetensors")["it"]
    assert found["numbers"] == state["numbers"]
    assert torch.equal(found[3][0], torch.arange(3))
    assert found[3][1]["deep"].dtype == torch.float64
    assert [found["1"]["a"].item(), found[1]["a"].item(), found["1/a"].item()] == [1, 2, 3]  # names that collide
    with pytest.raises(TypeError, match="cannot store it/function, a builtin_function_or_method"):
        save_checkpoint(tmp_path / "other.safetensors", {"it": {"function": print}})
    assert [file.name for file in tmp_path.iterdir()] == ["state.safetensors"]
    (tmp_path / "state.safetensors").write_bytes(b"cut short")
    with pytest.raises(ValueError, match="damaged"):
        load_checkpoint(tmp_path / "state.safetensors")


def test_metrics_are_json_lines_and_tensorboard(tasks: Episodes, tmp_path: Path) -> None:
    options: dict[str, Any] = dict(steps=10, tasks_per_batch=1, validate_every=5, validation_tasks=2, progress=False)
    fit(make_learner(), tasks, folder=tmp_path, **options)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == list(range(1, 11))
    assert [record["step"] for record in records if record["kind"] == "validation"] == [5, 10]
    assert {"loss", "accuracy", "gradient_norm", "lr", "seconds"} <= records[0].keys()

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("validation/accuracy")] == [5, 10]
    (last,) = events.Scalars("train/loss")
    assert last.value == pytest.approx([record["loss"] for record in records if record["kind"] == "train"][-1])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mixed", "^mixed takes horizon=weight, as in mixed:1=0.2,5=0.8, not ''$"),
        ("mixed:1,5", "not '1,5'$"),
        ("mixed:1=half,5=0.5", "not '1=half,5=0.5'$"),
        ("mixed:1=0.2,5=0.2", "their sum 1"),
    ],
)
def test_estimators_that_cannot_be_typed(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make("meta-gradient", META_GRADIENT, text)


def test_estimators_that_can_be_typed() -> None:
    assert make("meta-gradient", META_GRADIENT, "mixed:1=0.2,3=0.3, 5=0.5") == Mixed((1, 3, 5), (0.2, 0.3, 0.5))
    assert make("meta-gradient", META_GRADIENT, "memory-reduced:iterations=3") == il.MemoryReduced(il.CG(3))
    implicit = make("meta-gradient", META_GRADIENT, "implicit:damping=0.5,iterations=3")
    assert implicit == il.Implicit(il.CG(3, damping=0.5))


def in_a_fresh_process(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_importing_the_library_loads_neither_studies_nor_what_draws_and_logs() -> None:
    heavy = "innerloop.studies", "innerloop.training", "innerloop.cli", "matplotlib", "tensorboard", "rich"
    shown = in_a_fresh_process(
        f"import sys, innerloop as il; il.MetaLearner, il.Bilevel, il.tasks.glyphs; dir(il)\n"
        f"print([name for name in {heavy} if any(each.split('.')[:1 + name.count('.')] == name.split('.') "
        "for each in sys.modules)])"
    )
    assert shown == "[]\n"


def test_a_function_never_shadows_its_module() -> None:
    shown = in_a_fresh_process(
        "import sys, types\n"
        "import innerloop as il\n"
        "il.fit, il.check, il.compare\n"
        "import innerloop.training.fit, innerloop.studies.check, innerloop.studies.compare\n"
        "import innerloop.training.fit as fit\n"
        "modules = fit, il.training.fit, il.studies.check, il.studies.compare\n"
        "print([type(each) is types.ModuleType for each in modules])\n"
        "print([il.fit is fit.fit, il.check is il.studies.check.check, il.compare is il.studies.compare.compare])"
    )
    assert shown == "[True, True, True, True]\n[True, True, True]\n"


def test_a_run_starts_from_the_weights_of_another_where_they_fit(tasks, tmp_path, caplog):
    fit(make_learner(), tasks, steps=4, tasks_per_batch=2, validate_every=4, validation_tasks=4, folder=tmp_path / "a",
        progress=False)  # fmt: skip
    weights = load_file(tmp_path / "a" / "best.safetensors")
    model = nn.Sequential(nn.Flatten(), nn.Linear(25, 12), nn.ReLU(), nn.Dropout(0.0), nn.Linear(12, 5))
    wider = il.MetaLearner(model, il.Head(), il.SGD(lr=0.1, steps=1), start=il.Ridge())
    head = wider.model[4].weight.detach().clone()
    optimizer = torch.optim.SGD(wider.parameters(), lr=1e-12)
    with caplog.at_level("INFO", "innerloop"):
        fit(wider, tasks, steps=1, tasks_per_batch=2, optimizer=optimizer, validation_tasks=0, progress=False,
            start_from=tmp_path / "a")  # fmt: skip
    assert "left as they are: model.4.weight (5 x 12), model.4.bias (5)" in caplog.text
    torch.testing.assert_close(wider.model[1].weight, weights["model.1.weight"])
    assert torch.equal(wider.model[4].weight, head)
    other = il.MetaLearner(nn.Sequential(nn.Flatten(), nn.Linear(25, 7), nn.Linear(7, 3)))
    with pytest.raises(ValueError, match=r"no weights of .*best.safetensors fit model.1.weight \(7"):
        fit(other, tasks, steps=1, start_from=tmp_path / "a", progress=False)
    with pytest.raises(FileNotFoundError, match="start from a folder"):
        fit(other, tasks, steps=1, start_from=tmp_path / "none", progress=False)
