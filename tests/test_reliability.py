"""A run survives what happens to it: real processes, real signals, damaged files, full disks.

INNERLOOP_KILLS and INNERLOOP_FLIPS make the long form of the test (make test-long).
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from innerloop import files
from innerloop.cli import main
from innerloop.reporting import in_fresh_process
from innerloop.training import store
from innerloop.training.checkpoints import load_checkpoint
from innerloop.training.settings import Settings
from innerloop.training.store import LAST, METRICS, load_newest, locked, read_records
from trials import CONTEXT, STEPS, TINY, command, damages, end_of, killed_runs, same, whole_run

KILLS, FLIPS = (int(os.environ.get(f"INNERLOOP_{name}", few)) for name, few in (("KILLS", 20), ("FLIPS", 150)))
ENDLESS = [*TINY, "--steps=1000000", "--validate-every=1000000", "--checkpoint-every=1h"]

Start = Callable[..., ForkServerProcess]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command in a process of its own, whose output goes to ``tmp_path / "output"``."""
    begun: list[ForkServerProcess] = []

    def starts(*argv: str, before: Callable[..., None] | None = None, given: tuple[Any, ...] = ()) -> ForkServerProcess:
        process = CONTEXT.Process(target=command, args=(tmp_path / "output", list(argv), before, *given))
        process.start()
        begun.append(process)
        return process

    yield starts
    for process in begun:
        process.kill()
        process.join()


def wait_for(what: Callable[[], Any]) -> Any:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.005)
    raise AssertionError("what was waited for did not happen")


def training(run: Path) -> Callable[[], bool]:
    """Whether a run takes its steps."""
    return lambda: store.last_step(run / METRICS) > 3


def saved_step(run: Path) -> int:
    return int(load_checkpoint(run / LAST)["progress"]["step"])


def saved_after(run: Path, step: int) -> int:
    """The step of the checkpoint, if it is a later one."""
    with suppress(FileNotFoundError):  # while it takes its place
        return found if (found := saved_step(run)) > step else 0
    return 0


def recorded_after(run: Path, step: int) -> bool:
    return store.last_step(run / METRICS) > step


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    return whole_run(tmp_path_factory.mktemp("whole") / "run")


def test_killed_at_random_moments_it_ends_bit_for_bit_as_if_nothing_had_happened(whole: Path, tmp_path: Path) -> None:
    kills, ends = killed_runs(tmp_path, KILLS, end_of(whole))
    assert ends.keys() == {"equal"}, (tmp_path / "output").read_text()[-2000:]
    assert not list(tmp_path.glob("*/*.part"))
    assert sum(each.in_write for each in kills) >= KILLS // 4
    assert max(each.lost for each in kills) <= 2  # a checkpoint comes every second step


def test_one_process_at_a_time_has_a_folder_and_signals_save(tmp_path: Path, start: Start) -> None:
    run, output = tmp_path / "run", tmp_path / "output"
    first = start("train", f"--out={run}", *ENDLESS)
    wait_for(training(run))
    second = start("train", "--resume", str(run))
    second.join(120)
    assert second.exitcode == 2
    assert f"{run} is in use by process {first.pid} on " in output.read_text()

    # SIGUSR1 and SIGUSR2 save, and training goes on
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        before = saved_step(run)
        assert first.pid
        os.kill(first.pid, number)
        after = wait_for(partial(saved_after, run, before))
        wait_for(partial(recorded_after, run, after))
    first.terminate()
    first.join(120)
    assert first.exitcode == 128 + signal.SIGTERM
    assert output.read_text().endswith(f"stopped; continue with: innerloop train --resume {run}\n")
    done = saved_step(run)
    assert [record["step"] for record in read_records(run / METRICS)] == list(range(1, done + 1))

    third = start("train", "--resume", str(run), f"--steps={done - 1}")
    third.join(120)
    assert third.exitcode == 2
    assert f"has done {done} outer steps; --steps {done - 1} is less: give {done} or more" in output.read_text()

    # the terminal is closed; another outer rate is allowed and recorded
    fourth = start("train", "--resume", str(run), "--outer-lr=2e-3", "--clip=1")
    wait_for(lambda: store.last_step(run / METRICS) > done)
    assert fourth.pid
    os.kill(fourth.pid, signal.SIGHUP)
    fourth.join(120)
    assert fourth.exitcode == 128 + signal.SIGHUP
    changed = [record["what"] for record in read_records(run / METRICS) if record["kind"] == "changed"]
    assert changed == ["outer rate [0.001] -> [0.002]", "clip 10.0 -> 1.0"]
    assert "Traceback" not in output.read_text()


@pytest.mark.parametrize("times", [1, 2])
def test_one_signal_does_not_silence_an_error_and_two_do(
    times: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped_meanwhile() -> bool:
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        return True

    monkeypatch.setattr("innerloop.cli._speaks", stopped_meanwhile)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # the test survives where it fails
    try:
        with pytest.raises(SystemExit) as ended:
            main(["train", "--steps=-1"])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert told.startswith("innerloop: ") if times == 1 else told == ""  # who asks twice wants no more


@pytest.mark.parametrize("place", ["validation", "test"])
def test_a_signal_in_the_midst_of_validation_or_test_loses_nothing(
    whole: Path, tmp_path: Path, start: Start, place: str
) -> None:
    run = tmp_path / "run"
    process = start("train", f"--out={run}", *TINY, before=signalled_in, given=(place,))
    process.join(120)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "output").read_text()
    assert saved_step(run) == (12 if place == "validation" else STEPS)
    kept = run / "test.partial.jsonl"
    if place == "test":
        (part,) = read_records(kept)  # the first of two evaluations, which is not computed again
        assert len(part["parts"]["loss"][1]) == 4
    again = start("train", "--resume", str(run), before=counting if place == "test" else None)
    again.join(120)
    assert again.exitcode == 0, (tmp_path / "output").read_text()
    assert not kept.exists()
    assert same(end_of(run), end_of(whole))


def counting() -> None:
    """Take one evaluation and no more."""
    from innerloop.learner import MetaLearner

    evaluate, seen = MetaLearner.evaluate, []

    def counted(self: MetaLearner, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        assert len(seen) == 1
        return evaluate(self, *arguments, **options)

    MetaLearner.evaluate = counted  # type: ignore[assignment, method-assign]


def signalled_in(place: str) -> None:
    """Be sent SIGTERM in the second validation, or in the second part of the test."""
    from innerloop.learner import MetaLearner

    evaluate, seen = MetaLearner.evaluate, []

    def interrupted(self: MetaLearner, *arguments: Any, **options: Any) -> Any:
        seen.append(1)
        if len(seen) == {"validation": 2, "test": STEPS // 6 + 2}[place]:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, *arguments, **options)

    MetaLearner.evaluate = interrupted  # type: ignore[assignment, method-assign]


def test_children_end_with_their_parent(tmp_path: Path, start: Start) -> None:
    """A comparison that is killed leaves no training behind: it is told, saves and ends."""
    run = tmp_path / "runs" / "one"
    parent = CONTEXT.Process(target=train_as_compare_does, args=(run,))
    parent.start()
    wait_for(training(run))
    holder = json.loads((run / store.LOCK).read_text())["process"]
    assert holder != parent.pid
    parent.kill()
    parent.join()
    with locked(run, patience=60):
        pass
    assert saved_step(run) >= 3
    assert "stopped; continue with" in (run.parent / "one.log").read_text()


def train_as_compare_does(run: Path) -> None:
    from rich.console import Console

    from innerloop.studies.trainings import Training, train_all

    pairs = (option.removeprefix("--").split("=") for option in ENDLESS)
    given: dict[str, Any] = {name.replace("-", "_"): value for name, value in pairs}
    train_all([Training(run, "one", Settings(**given), 1.0)], 1, Console(quiet=True))


def test_a_process_that_measures_ends_with_its_parent(tmp_path: Path) -> None:
    file = tmp_path / "process"
    parent = CONTEXT.Process(target=in_fresh_process, args=(linger, str(file)))
    parent.start()
    child = int(wait_for(lambda: file.exists() and file.read_text()))
    parent.kill()
    parent.join()
    wait_for(lambda: not Path(f"/proc/{child}").exists())


def linger(file: str) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(300)


def test_output_that_is_closed_or_ascii_ends_nothing(tmp_path: Path, start: Start) -> None:
    run = tmp_path / "run"
    process = start("train", f"--out={run}", *TINY, before=write_to_a_closed_pipe)
    process.join(120)
    output = (tmp_path / "output").read_text()
    assert process.exitcode == 0, output
    assert output.count("standard output is lost (Broken pipe), and all else goes on") == 1
    assert (run / "results.json").exists()
    code = (
        "import sys; from innerloop.cli.terminal import lasting_output; lasting_output(); print('δ ± 1'); "
        "print('δ', file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True
    )
    assert (done.stdout, done.stderr) == (b"\\u03b4 \\xb1 1\n", b"\\u03b4\n")


def write_to_a_closed_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)


def test_a_full_disk_stops_with_one_line_and_the_last_checkpoint_whole(tmp_path: Path, start: Start) -> None:
    """Files may grow to so many bytes: none, before the run; then enough for its records and not for a checkpoint."""
    run, output = tmp_path / "run", tmp_path / "output"
    process = start("train", f"--out={run}", *TINY, before=fill_the_disk, given=(100,))
    process.join(120)
    assert process.exitcode == 2
    assert "File too large" in output.read_text()
    assert not (run / "settings.json").exists()

    process = start("train", f"--out={run}", *TINY, "--filters=64", before=fill_the_disk, given=(20_000,))
    process.join(120)
    assert process.exitcode == 1
    last = output.read_text().splitlines()[-1]
    assert re.match(
        r"innerloop: .*File too large.*last checkpoint is whole.*continue with: innerloop train --res", last
    )
    process = start("train", "--resume", str(run))
    process.join(120)
    assert process.exitcode == 0
    assert "Traceback" not in output.read_text()


def fill_the_disk(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_each_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def state(step: int) -> dict[str, dict[str, Any]]:
        return {"progress": {"step": step, "records": []}, "learner": {"weight": torch.full((3,), float(step))}}

    for failing in ("fsync", "open", "replace"):
        folder = tmp_path / failing
        folder.mkdir()
        for step in (1, 2):
            store.save_newest(folder, state(step))
        with monkeypatch.context() as patch:
            fail_at(patch, failing)
            with pytest.raises(OSError, match="No space left on device"):
                store.save_newest(folder, state(3))
        assert sorted(file.name for file in folder.iterdir()) == ["last-2.safetensors", LAST]
        assert same(load_newest(folder), state(2))
        store.save_newest(folder, state(3))
        assert same(load_newest(folder), state(3))


def fail_at(patch: pytest.MonkeyPatch, name: str) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    patch.setattr(*{"fsync": (os, "fsync"), "open": (Path, "open"), "replace": (Path, "replace")}[name], full)


def test_every_damaged_byte_of_a_run_is_found_or_costs_its_line(whole: Path, tmp_path: Path) -> None:
    """One byte of one file is changed, or the file ends there: the run is the same, or one line says what is wrong."""
    for each in damages(whole, tmp_path / "run", FLIPS):
        assert each.outcome not in ("not noticed", "wrong")
        assert each.lost <= 2 or each.what == "the end cut off"


def test_damaged_best_weights_and_all_checkpoints(whole: Path, tmp_path: Path) -> None:
    from innerloop.training.runs import load_learner, read_run

    run = tmp_path / "run"
    shutil.copytree(whole, run)
    settings = read_run(run)
    expected = load_learner(run, settings)[0].state_dict()
    best = bytearray((run / "best.safetensors").read_bytes())
    best[-1] ^= 1
    (run / "best.safetensors").write_bytes(best)
    with pytest.warns(UserWarning, match="best.safetensors is damaged .*its checksum.* taken from the checkpoint"):
        found = load_learner(run, settings)[0].state_dict()
    assert same(dict(found), dict(expected))
    for file in store.generations(run):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"last.safetensors is damaged .*last-2.safetensors is damaged"):
        load_newest(run)
    for file in store.generations(run):
        file.unlink()
    with pytest.raises(ValueError, match="was trained but has no checkpoint"):
        load_newest(run)


@pytest.mark.parametrize("content", ["", "{}", '{"steps": 5}', "\0" * 40])
def test_settings_that_are_not_whole_are_refused(whole: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(ValueError, match=r"lacks dataset, model, .* it is damaged|cannot be read|is empty"):
        Settings.load(tmp_path / "settings.json")


@contextmanager
def rewritten(file: Path, **changes: Any) -> Iterator[None]:
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | changes))
    yield
    file.write_text(before)


def test_what_must_not_change_is_refused_by_name(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    refused: dict[str, dict[str, Any]] = {
        "seed, 0, not 1": {"seed": 1},
        "inner, SGD(": {"inner_lr": 0.02},
        "model": {"filters": 5},
        "meta_gradient, Unrolled(": {"meta_gradient": "first-order"},
        "data": {"shots": 5},
        "number of tasks a batch, 2, not 3": {"tasks_per_batch": 3},
    }
    for name, changes in refused.items():
        with rewritten(run / "settings.json", **changes), pytest.raises(SystemExit) as caught:
            main(["train", "--resume", str(run)])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert f"{run} was trained with another {name}" in error, error
        assert error.count("\n") == 1


def test_records_are_appended_and_never_rewritten(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    log = store.JsonLines(path, 0)
    for step in range(1, 9):
        log({"kind": "train", "step": step, "loss": 1 / step})
    log.close()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], bytes(30) + b"\n", *lines[3:7], lines[7][:10]]))
    with pytest.warns(UserWarning, match="2 lines left out, the first is 3: unreadable"):
        assert [record["step"] for record in read_records(path)] == [1, 2, 4, 5, 6, 7]
    assert store.last_step(path) == 7
    inode = path.stat().st_ino
    log = store.JsonLines(path, 5)
    assert path.read_bytes() == b"".join([*lines[:2], bytes(30) + b"\n", *lines[3:5]])
    log({"kind": "train", "step": 6, "loss": 0.5})
    log.close()
    assert path.stat().st_ino == inode
    with pytest.warns(UserWarning, match="1 line left out, the first is 3"):
        assert read_records(path)[-1] == {"kind": "train", "step": 6, "loss": 0.5}


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_computed(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(30, "Read-only file system")

    for asked in (["evaluate"], ["check"], ["patterns"], ["train", "--resume"]):
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", refuse)
            with pytest.raises(SystemExit) as caught:
                main([*asked, str(whole)])
        error = capsys.readouterr().err
        assert caught.value.code == 2
        assert "cannot be written (Read-only file system), and the results go there" in error
    monkeypatch.setattr("innerloop.cli.evaluate.save_results", refuse)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", str(whole), "--tasks=4"])
    found = capsys.readouterr()
    assert caught.value.code == 1
    assert "4 test tasks" in found.out
    assert "the results are printed above but could not be written" in found.err


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "file"
    files.write(file, "before")
    (tmp_path / f"file.{os.getpid()}.part").symlink_to(tmp_path / "elsewhere")
    files.write(file, "after")
    assert file.read_text() == "after"
    assert not (tmp_path / "elsewhere").exists()
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        files.write(tmp_path, "a folder")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
