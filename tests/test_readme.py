"""The README's Python runs as printed, only shorter."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from commands import refused
from innerloop.cli import main
from innerloop.studies.patterns import movable_blocks
from innerloop.training.runs import load_learner, read_run

README = Path(__file__).parents[1] / "README.md"


def test_the_twenty_lines_run_as_printed():
    (code,) = re.findall(r"```python\n(import torch.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    short = code.replace("tasks_per_batch=4, steps=1000", "tasks_per_batch=2, steps=2")
    assert short != code
    names: dict = {}
    exec(compile(short, str(README), "exec"), names)
    assert names["metrics"].loss.isfinite()
    assert names["adapted"](names["new_images"]).argmax(-1).shape == torch.Size([25])


def test_it_comes_to_the_results_within_900_words_of_prose():
    before = README.read_text(encoding="utf-8").partition("\n## Results\n")[0]
    assert 300 < len(re.sub(r"```.*?```", "", before, flags=re.DOTALL).split()) < 900


def test_the_commands_it_names_exist():
    from innerloop.cli import COMMANDS

    named = set(
        re.findall(
            r"^innerloop (train|evaluate|adapt|compare|patterns|check|data|demo)\b",
            README.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    )
    assert {"train", "evaluate", "adapt"} <= named <= set(COMMANDS)


SHORT = {
    "train": "--steps=4 --validate-every=2 --validation-tasks=4 --test-tasks=4 --tasks-per-batch=2 --ways=3 "
    "--queries=2 --filters=4 --threads=1",
    "evaluate": "--tasks=4",
    "patterns": "--tasks=4 --repetitions=2 --steps=1",
    "adapt": "",
}


def test_the_way_from_train_to_patterns_to_adapt_runs_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("innerloop.studies.patterns.WARM_UP", 0)
    for number in range(18):
        for image in range(3):
            split = "train/" if number < 9 else "validation/" if number < 12 else "test/" if number < 15 else ""
            folder = tmp_path / ("flowers" if split else "new_flowers") / f"{split}kind{number}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng((number, image)).integers(0, 256, (16, 18, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.png")
    (tmp_path / "unlabelled").mkdir()
    Image.fromarray(pixels).save(tmp_path / "unlabelled" / "a.png")
    (lines,) = re.findall(r"```\n(innerloop train --dataset folder.*?)```", README.read_text("utf-8"), flags=re.DOTALL)
    commands = [shlex.split(line, comments=True)[1:] for line in lines.splitlines()]
    assert [command[0] for command in commands] == ["train", "evaluate", "patterns", "adapt", "adapt"]
    for command in commands:
        main([*command, *SHORT[command[0]].split()])
    assert "Blocks(" in capsys.readouterr().out.splitlines()[-2]
    assert '"augment": null' in (tmp_path / "run" / "settings.json").read_text()
    # A run of the default kind names the line that makes one of this kind.
    other = [each for each in commands[0] if each not in ("--adapts", "everything")]
    main([*other[:-1], "head", *SHORT["train"].split()])
    error = refused(capsys, "patterns", "head", "--tasks=4")
    cure = error.partition("write ")[2].strip().replace("NEW", "again")
    plain = "--inner-steps 5 --meta-gradient unrolled --batch-norm batch"
    assert cure == f"innerloop train --config head/settings.json --adapts everything --start none {plain} --out again"
    main(shlex.split(cure)[1:])
    again, _ = load_learner(tmp_path / "again", read_run(tmp_path / "again"))
    assert movable_blocks(again) == [True] * 5
