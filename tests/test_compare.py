"""Comparisons: what is planned, measured, trained and made of it."""

import importlib
import json
import math
import signal
import time
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

from innerloop.cli import main
from innerloop.errors import Failed
from innerloop.reporting import Timing
from innerloop.studies import costs, trainings, tuning
from innerloop.studies.compare import Plan, compare, plan, read_plan, time_to
from innerloop.studies.comparison import Point
from innerloop.studies.costs import Cost, cost, save_tasks
from innerloop.training.build import build_learner, build_tasks
from innerloop.training.checkpoints import load_checkpoint, load_weights
from innerloop.training.evaluation import Estimate
from innerloop.training.methods import method_settings
from innerloop.training.settings import Settings

studies = importlib.import_module("innerloop.studies.compare")  # the package has the function under this name
TINY = {
    "filters": 2, "ways": 3, "queries": 3, "validation_tasks": 6, "test_tasks": 8, "threads": 1, "inner_steps": 2,
    "tasks_per_batch": 2,
}  # fmt: skip
COST = Cost(Timing(0.5, 0.4, 0.6), {2: 1000}, 2.0, Timing(0.01, 0.01, 0.01))


def curve(*accuracies):
    return [Point(10 * place, float(place), each, each, each) for place, each in enumerate(accuracies, 1)]


def test_a_method_reaches_the_target_where_its_smoothed_curve_begins_to_stay_above():
    assert time_to(curve(0.2, 0.9, 0.2, 0.8, 0.8, 0.8, 0.8), 0.62) == 6.0  # the fifth mean, 0.6, is below
    assert time_to(curve(0.7, 0.7), 0.6) == 1.0
    assert time_to(curve(0.7, 0.1, 0.1), 0.6) is None
    assert time_to([], 0.6) is None


def test_the_interval_over_seeds_is_the_wider_of_tasks_and_seeds():
    alike = [Estimate(0.5, 0.03)] * 3
    found = studies._over_seeds(alike)
    assert found.mean == pytest.approx(0.5)
    assert found.interval == pytest.approx(0.03 / math.sqrt(3))
    apart = [Estimate(value, 0.001) for value in (0.4, 0.5, 0.6)]
    assert studies._over_seeds(apart).interval == pytest.approx(4.303 * 0.1 / math.sqrt(3), rel=1e-3)
    pair = [Estimate(value, 0.04) for value in (0.4, 0.6)]
    assert studies._over_seeds(pair).interval == pytest.approx(0.04 / math.sqrt(2))


def test_settings_of_one_method_win_over_those_of_all_and_those_over_the_methods_own():
    found = plan(["maml", "anil"], changes={"anil": {"inner_lr": "0.2"}}, inner_lr=0.3, **TINY).methods
    assert (found["maml"].inner_lr, found["anil"].inner_lr) == (0.3, 0.2)
    assert (found["maml"].adapts, found["anil"].adapts) == ("everything", "head")


def test_a_plan_survives_its_file():
    found = plan(["window:2", "reptile"], minutes=2.0, seeds=3, **TINY)
    assert found.notes
    assert Plan.of(json.loads(json.dumps(asdict(found)))) == found


def test_without_a_bound_each_method_has_five_minutes():
    assert plan(["maml"]).minutes == 5
    assert plan(["maml"], steps=10).minutes is None


def test_what_a_method_chooses_and_an_option_sets_for_all_is_noted():
    note = "meta-gradient=first-order is set for all methods: they no longer are what their names say"
    assert plan(["maml", "anil"], meta_gradient="first-order", ways=3).notes == [note]
    assert plan(["maml", "anil"], outer_lr=1e-3, inner="sgd", changes={"anil": {"inner_lr": 0.2}}).notes == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ["maml", "maml"]}, "each once"),
        ({"methods": []}, "each once"),
        ({"methods": ["mamml"]}, "did you mean 'maml'"),
        ({"methods": ["maml"], "changes": {"anil": {}}}, "'anil' is changed but not compared"),
        (
            {"methods": ["maml"], "changes": {"maml": {"filters": 8}}},
            "filters of maml alone .* its own adapts, inner, ",
        ),
        ({"methods": ["maml"], "minutes": 1.0, "steps": 10}, "give one of them"),
        ({"methods": ["maml"], "inner_lr": -1.0}, "method maml: inner-lr is -1.0"),
        ({"methods": ["maml"], "colour": 1}, "method maml: .*colour"),
        ({"methods": ["maml"], "seeds": 0}, "0 seeds"),
        ({"methods": ["maml"], "seed": 3}, "seed is the comparison's business"),
        ({"methods": ["maml"], "minutes": 0.0}, "must be above 0"),
        ({"methods": ["maml"], "tune": 1}, "give 2 or more, or 0"),
        ({"methods": ["maml"], "memory_steps": [0]}, "memory at 0 inner steps"),
        ({"methods": ["maml"], "dataset": "sinusoid"}, "regression"),
    ],
)
def test_what_cannot_be_compared_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(**options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--budget", "10"], "such as 90s, 10m or 1h"),
        (["--budget", "1m", "--steps", "10"], "give one of them"),
        (["--set", "maml:inner"], "METHOD.SETTING=VALUE"),
        (["--memory-steps", "1,x"], "whole numbers"),
        (["--resume", "nowhere"], "holds no comparison"),
        (["--resume", "nowhere", "--ways", "3"], "leave --ways out"),
        (["--resume", "nowhere", "--methods", "maml"], "leave --methods out"),
        (["--resume", "nowhere", "--budget", "1m"], "leave --budget out"),
        (["--resume", "nowhere", "--seeds", "2"], "leave --seeds out"),
        (["--resume", "nowhere", "--memory-steps", "1"], "leave --memory-steps out"),
        (["--resume", "nowhere", "--set", "maml.inner-lr=0.1"], "leave --set out"),
        (["--resume", "nowhere", "--out", "somewhere"], "leave --out out"),
        (["--resume", "nowhere", "--jobs", "2"], "holds no comparison"),
        (["--set", "maml.tasks-per-batch=8"], "tasks-per-batch of maml alone cannot be changed"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(arguments, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["compare", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_help_says_what_holds_where_an_option_is_left_out(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--weight-decay X weight decay of the inner loop [the method's]" in text
    assert "--steps N outer steps [as many as --budget allows]" in text
    assert all(f" {group}: --" in text for group in ("tasks", "model", "method", "outer loop", "machine"))


def test_a_folder_is_not_taken_before_the_data_is_read(tmp_path, capsys):
    folder = tmp_path / "study"
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--out", str(folder), "--methods=maml", "--dataset=folder", f"--data={tmp_path / 'none'}"])
    assert exit.value.code == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
    assert not folder.exists()


def test_a_number_of_inner_steps_at_which_memory_cannot_be_measured_is_left_out(tmp_path, monkeypatch):
    def measured(_, settings, tasks, everything):
        if settings["inner_steps"] == 20:
            raise Failed("exit -9")
        return {**COST._asdict(), "memory": 100 * settings["inner_steps"]} if everything else {"memory": 7}

    monkeypatch.setattr(costs, "in_fresh_process", measured)
    assert cost(Settings(**TINY), tmp_path / "tasks", (1, 2, 20)).memory_at == {1: 7, 2: 200}


def test_costs_are_measured(tmp_path):
    settings = Settings(adapts="everything", inner="sgd", meta_gradient="unrolled:record=false", **TINY)
    save_tasks(tmp_path / "tasks.safetensors", settings)
    found = cost(settings, tmp_path / "tasks.safetensors", (1,))
    assert found.products == 2
    assert set(found.memory_at) == {1, 2}
    assert all(size > 0 for size in found.memory_at.values())
    assert 0 < found.adaptation.median < 10
    assert Cost.of(json.loads(json.dumps(found._asdict()))) == found


def test_a_method_that_needs_two_steps_is_measured(tmp_path):
    settings = Settings(dataset="sinusoid", model="mlp", **method_settings("alfa-l2f", "sinusoid"))
    save_tasks(tmp_path / "tasks.safetensors", settings)
    assert costs.measure_here(asdict(settings), str(tmp_path / "tasks.safetensors"), False)["memory"] >= 0


def test_the_dearer_first_meta_steps_of_a_multi_step_loss_count(monkeypatch):
    settings = Settings(adapts="everything", inner="sgd", meta_gradient="unrolled", multi_step_loss=0.25, **TINY)
    tasks = build_tasks(settings, ["train"])
    learner = build_learner(settings, tasks.input_shape, tasks.output_size, regression=False)
    weights, seconds = [], iter([Timing(5.0, 4.0, 6.0), Timing(1.0, 1.0, 1.0), Timing(0.1, 0.1, 0.1)])
    meta_step = learner.meta_step

    def noted(batch, *, step_weights=None):
        weights.append(step_weights)
        return meta_step(batch, step_weights=step_weights)

    monkeypatch.setattr(learner, "meta_step", noted)
    monkeypatch.setattr(costs, "_timed", lambda function, _: (function(), next(seconds))[1])
    found = costs._measure(learner, tasks.batch("train", 0, 2), learner, settings, everything=True)
    assert found["meta_step"] == (2.0, 1.75, 2.25)
    assert weights == [None, [0.5, 0.5], [0.5, 0.5], None]  # a warm-up, memory, and both timings


def test_a_comparison_on_the_command_line(tmp_path, capsys):
    folder = tmp_path / "study"
    options = ["--tune=0", *(f"--{name.replace('_', '-')}={value}" for name, value in TINY.items())]
    main(["compare", "--out", str(folder), "--methods", "maml,anil", "--steps", "4", "--memory-steps", "2", *options])
    found = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
    entries = found["entries"]
    assert [entry["method"] for entry in entries] == ["maml", "anil"]
    assert [entry["steps"] for entry in entries] == [4, 4]
    assert [point["step"] for point in entries[0]["curve"]] == [1, 2, 3, 4]
    assert entries[0]["curve"][1]["seconds"] == pytest.approx(2 * entries[0]["meta_step"]["median"])
    assert entries[0]["differs"] == {"adapts": "everything", "inner-lr": "0.4"}
    note = "inner-steps=2 is set for all methods: they no longer are what their names say"
    assert found["notes"] == [note]
    assert found["made"]["machine"]["threads"] == 1
    out, err = capsys.readouterr()
    assert "Recommended" in out
    assert "Nothing was tuned" in out
    assert f"study: {folder}; an interrupted one goes on with innerloop compare --resume {folder}" in out
    assert "trained: anil, seed 0; 0 to go" in out
    assert err == f"{note}\n"
    assert note in (folder / "report.md").read_text(encoding="utf-8")
    assert (folder / "report.html").stat().st_size > 10_000
    maml, anil = (
        load_weights(folder / "runs" / name / "seed-0" / "test.safetensors")[0]["transductive"]
        for name in ("maml", "anil")
    )
    first, second = (maml, anil) if maml.mean() >= anil.mean() else (anil, maml)
    none, behind = sorted((entry["behind"] for entry in entries), key=lambda behind: behind["mean"])
    assert behind["mean"] == pytest.approx((first - second).mean().item())
    assert behind["interval"] == pytest.approx(1.96 * (first - second).std().item() / math.sqrt(TINY["test_tasks"]))
    assert none == {"mean": 0.0, "interval": 0.0}

    report = (folder / "report.html").stat().st_mtime_ns
    trained = (folder / "runs" / "maml" / "seed-0" / "results.json").stat().st_mtime_ns
    main(["compare", "--resume", str(folder)])
    assert (folder / "report.html").stat().st_mtime_ns > report
    assert (folder / "runs" / "maml" / "seed-0" / "results.json").stat().st_mtime_ns == trained
    with pytest.raises(SystemExit):
        main(["compare", "--out", str(folder), "--methods", "maml", "--steps", "4", *options])
    assert "holds another comparison" in capsys.readouterr().err


@pytest.fixture
def measured(monkeypatch):
    """Costs without measuring, and outer rates without trying."""
    monkeypatch.setattr(studies, "cost", lambda *_: COST)
    monkeypatch.setattr(tuning, "search", lambda settings, *_: {str(settings.outer_lr): 0.5})


def test_a_budget_of_time_becomes_steps_and_an_interruption_loses_nothing(tmp_path, monkeypatch, measured):
    asked = []

    def interrupted(runs, jobs, bar):
        asked.extend(runs)
        raise KeyboardInterrupt

    monkeypatch.setattr(studies, "train_all", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(["maml", "anil"], folder=tmp_path / "study", minutes=0.05, seeds=2, jobs=2, progress=False, **TINY)
    assert [each.settings.steps for each in asked] == [6] * 4  # 3 seconds of 0.5 each
    assert [each.settings.seed for each in asked] == [0, 1, 0, 1]
    assert len({each.folder for each in asked}) == 4
    again = read_plan(tmp_path / "study")
    assert again == plan(["maml", "anil"], minutes=0.05, seeds=2, **TINY)
    monkeypatch.setattr(studies, "cost", lambda *_: pytest.fail("measured twice"))
    with pytest.raises(KeyboardInterrupt):
        studies.carry_out(again, tmp_path / "study", progress=False)


def test_every_method_trains_at_the_outer_rate_that_was_best_in_validation(tmp_path, monkeypatch, measured):
    asked = []

    def search(settings, count, steps):
        asked.append((settings.outer_lr, count, steps))
        last = 0.7 if settings.adapts == "everything" else None
        return dict(zip(map(str, tuning.rates(settings.outer_lr, count)), (0.5, 0.6, last), strict=True))

    monkeypatch.setattr(tuning, "search", search)
    settings = {"steps": 2, "progress": False, **TINY}
    found = compare(["anil", "maml"], folder=tmp_path / "study", changes={"anil": {"outer_lr": 3e-3}}, **settings)
    assert asked == [(3e-3, 3, 2), (1e-3, 3, 2)]
    assert found.entries[0].rates == {"0.001": 0.5, "0.003": 0.6, "0.009": None}
    (note,) = (note for note in found.notes if "--tune 5" in note)
    assert note.startswith("the best outer rate of maml is")
    run = tmp_path / "study" / "runs" / "anil" / "seed-0"
    assert Settings.load(run / "settings.json").outer_lr == 3e-3
    report = (tmp_path / "study" / "report.md").read_text(encoding="utf-8")
    assert report.splitlines()[2] == found.first_line
    assert "the outer rate, 3 values a factor of 3 apart around its own" in found.first_line
    assert "| 0.001: 50.0 % | **0.003: 60.0 %** | 0.009: diverged |" in report


def test_the_search_over_outer_rates_takes_its_share_and_survives_divergence(monkeypatch):
    asked = []

    def here(function, settings, tried, steps):
        asked.append(steps)
        return function(settings, tried, steps)

    monkeypatch.setattr(tuning, "in_fresh_process", here)
    settings = Settings(**{**TINY, "outer_lr": 1e-3, "clip": None, "optimizer": "sgd"})
    assert tuning.rates(1e-3, 2) == [1e-3, 3e-3]
    found = tuning.search(settings, 3, 20)
    assert asked == [2]  # of 20, 30 % for three rates
    assert list(found) == ["0.000333", "0.001", "0.003"]
    assert all(0 <= each <= 1 for each in found.values())
    monkeypatch.setattr(tuning, "rates", lambda *_: [1e-3, 1e30])
    lost = tuning.search(settings, 2, 20)
    assert lost["1e+30"] is None
    assert tuning.best(lost, 5.0) == 1e-3
    assert tuning.best({"1.0": None}, 5.0) == 5.0


def test_a_method_with_other_training_shots_is_measured_on_its_own_tasks(tmp_path, monkeypatch):
    sizes = {}

    def measured(settings, file, _):
        sizes[settings.meta_gradient] = len(load_checkpoint(file)["task"]["support"][1][0])
        return COST

    monkeypatch.setattr(studies, "cost", measured)
    monkeypatch.setattr(studies, "trainings_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        compare(["maml", "reptile"], folder=tmp_path / "study", steps=2, tune=0, progress=False, **TINY)
    assert sizes == {"unrolled": 3, "reptile": 30}


def test_methods_that_diverge_or_cannot_be_measured_are_named_and_the_others_are_compared(tmp_path, monkeypatch):
    def measured(settings, *_):
        if settings.meta_gradient == "first-order":
            raise Failed("exit -9")
        return COST

    monkeypatch.setattr(studies, "cost", measured)
    found = compare(
        ["fomaml", "maml", "anil"], folder=tmp_path / "study", steps=3, progress=False, memory_steps=(2, 5), tune=0,
        changes={"maml": {"inner_lr": 1e30}}, **TINY,
    )  # fmt: skip
    assert [entry.method for entry in found.entries] == ["anil"]
    assert found.failed["fomaml"] == "its costs could not be measured: exit -9"
    assert "outer step 1" in found.failed["maml"]
    assert "anil: memory at 5 inner steps could not be measured" in found.notes
    report = (tmp_path / "study" / "report.md").read_text(encoding="utf-8")
    assert all(why in report for why in found.failed.values())


def test_a_seed_that_diverges_is_named_and_the_others_count(tmp_path, monkeypatch, measured):
    def train_all(runs, jobs, bar):
        assert trainings.train_all(runs[:1], jobs, bar) == {}
        return {runs[1].folder: "outer step 3: loss nan"}

    monkeypatch.setattr(studies, "train_all", train_all)
    found = compare(["anil"], folder=tmp_path / "study", steps=3, seeds=2, progress=False, **TINY)
    assert found.failed == {}
    assert len(found.entries[0].seeds) == 1
    assert "anil: seed 1 is left out: outer step 3: loss nan" in found.notes


def test_methods_are_compared_over_the_seeds_that_both_have():
    first = {0: torch.tensor([1.0, 0.0]), 1: torch.tensor([0.5, 0.5])}
    second = {1: torch.tensor([0.25, 0.25]), 2: torch.tensor([0.0, 0.0])}
    assert studies._difference(first, second) == (0.25, 0.0)
    alone = {2: torch.tensor([0.25, 0.25])}
    apart = studies._difference(first, alone)
    assert apart.mean == 0.25
    assert apart.interval == pytest.approx(studies._over_seeds([Estimate.of(each) for each in first.values()]).interval)


def test_a_process_that_fails_costs_one_line_and_nothing_else(tmp_path, monkeypatch, capsys):
    def killed(*_):
        raise Failed("exit -9")

    monkeypatch.setattr(studies, "cost", killed)
    with pytest.raises(SystemExit) as exit:
        main(["compare", "--out", str(tmp_path / "study"), "--methods=maml", "--steps=4", "--filters=2"])
    assert exit.value.code == 1
    assert capsys.readouterr().err == (
        "innerloop: no method could be trained; maml: its costs could not be measured: exit -9\n"
    )
    assert read_plan(tmp_path / "study") == plan(["maml"], steps="4", filters="2")


def test_a_signal_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with trainings._stopped({}):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(("stop", "names"), [(signal.SIGINT, "ab"), (signal.SIGTERM, "a"), (signal.SIGHUP, "a")])
def test_trainings_that_are_stopped_write_their_checkpoint(tmp_path, monkeypatch, stop, names):
    settings = Settings(steps=5000, validate_every=5000, **TINY)
    runs = [trainings.Training(tmp_path / name, name, settings, 0.1) for name in names]
    sleep = time.sleep

    def nap(seconds):
        sleep(seconds)
        if all((each.folder / "metrics.jsonl").exists() for each in runs):
            monkeypatch.undo()  # whatever waits for the trainings sleeps as well
            signal.raise_signal(stop)

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(KeyboardInterrupt):
        trainings.train_all(runs, 2, Console(quiet=True))
    assert all((each.folder / "last.safetensors").exists() for each in runs)
