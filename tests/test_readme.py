"""The README's Python runs as printed, only shorter."""

import re
from pathlib import Path

import torch

README = Path(__file__).parents[1] / "README.md"


def test_the_twenty_lines_run_as_printed():
    (code,) = re.findall(r"```python\n(import torch.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    short = code.replace("tasks_per_batch=32, steps=1000", "tasks_per_batch=2, steps=2")
    assert short != code
    names: dict = {}
    exec(compile(short, str(README), "exec"), names)
    assert names["metrics"].loss.isfinite()
    assert names["adapted"](names["new_images"]).argmax(-1).shape == torch.Size([75])


def test_the_commands_it_names_exist():
    from innerloop.cli import COMMANDS

    named = set(
        re.findall(
            r"^innerloop (train|evaluate|adapt|compare|patterns|check|data)\b",
            README.read_text(encoding="utf-8"),
            flags=re.MULTILINE,
        )
    )
    assert {"train", "evaluate", "adapt"} <= named <= set(COMMANDS)
