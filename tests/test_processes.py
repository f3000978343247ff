"""Several processes: killed and restarted, in error, and on which device."""

import os
import shlex
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from groups import together
from innerloop.cli import main
from innerloop.training import processes
from innerloop.training.build import choose_device
from innerloop.training.settings import Settings

RUN = shlex.split(
    "train --dataset=sinusoid --model=mlp --filters=8 --precision=float64 --inner-lr=0.01 --tasks-per-batch=3 "
    "--validate-every=10 --validation-tasks=8 --test-tasks=8 --device=cpu --threads=1 --clip=5"
)


def launch(arguments: list[str], log: Path, restarts: int = 1, **options: Any) -> subprocess.Popen[bytes]:
    """Two processes, which torchrun starts again where one dies."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("wb") as file:
        return subprocess.Popen(
            [*command, f"--max-restarts={restarts}", "-m", "innerloop", *arguments],
            stdout=file,
            stderr=file,
            env=environment,
            **options,
        )


def workers(launcher: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the processes in /proc")
def test_a_killed_worker_is_restarted_and_nothing_is_lost(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("whole", "killed")}
    launcher = launch([*RUN, "--steps=40", f"--out={runs['killed']}"], tmp_path / "killed.log")
    assert together(2, partial(main, [*RUN, "--steps=40", f"--out={runs['whole']}"])) == [0, 0]
    deadline = time.monotonic() + 120
    while not (runs["killed"] / "last-2.safetensors").exists():
        assert launcher.poll() is None, (tmp_path / "killed.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(workers(launcher.pid)[1], signal.SIGKILL)
    assert launcher.wait(120) == 0, (tmp_path / "killed.log").read_text()
    whole, killed = (load_file(run / "last.safetensors") for run in runs.values())
    assert whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
    told = (tmp_path / "killed.log").read_text().splitlines()
    lines = [line for line in told if line.startswith("innerloop: ")]
    assert len(lines) == 1
    assert lines[0].endswith(f"continue with: innerloop train --resume {runs['killed']}")
    assert not any("Traceback" in line for line in told)


def test_one_process_says_what_is_wrong_before_they_are_joined(tmp_path: Path) -> None:
    process = launch([*RUN, "--inner-lr=nan", "--out=run"], tmp_path / "log", cwd=tmp_path, restarts=0)
    assert process.wait(120) == 1  # torchrun's own
    lines = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("innerloop: ")]
    assert len(lines) == 1
    assert "inner-lr is nan" in lines[0]
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]


def test_one_process_says_what_is_wrong_once_they_are_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(processes, "AHEAD", 1.0)
    assert together(2, partial(main, [*RUN, "--tasks-per-batch=1", "--out=run"])) == [2, 2]
    (line,) = (line for line in capfd.readouterr().err.splitlines() if line.startswith("innerloop: "))
    assert "tasks_per_batch is 1, fewer than 2 processes: start 1" in line
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_restarted_needs_a_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(SystemExit):
        main(RUN)
    assert (
        "a run that torchrun restarts needs a folder that it finds again: give --out FOLDER" in capsys.readouterr().err
    )


def test_tasks_that_do_not_divide_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "world", lambda: 3)
    assert processes.shares(8) == [range(3), range(3, 6), range(6, 8)]
    assert processes.shares(3) == [range(1), range(1, 2), range(2, 3)]


def test_the_device_that_is_named_is_taken_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert choose_device(Settings(device="cuda:1")) == torch.device("cuda", 1)
    assert choose_device(Settings()) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="there are 2 GPUs here, counted from 0"):
        choose_device(Settings(device="cuda:2"))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device(Settings()) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="give cuda, so that each takes its own"):
        choose_device(Settings(device="cuda:1"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device is 'cuda:1' but torch finds no GPU here"):
        choose_device(Settings(device="cuda:1"))


@pytest.mark.parametrize("device", ["cpu:1", "auto:0", "cuda:", "cuda:x", "cuda:-1", "tpu"])
def test_a_device_that_is_none_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=r"^device "):
        Settings(device=device)
