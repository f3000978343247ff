"""A comparison run by others: its commands, workers that know nothing of each other, and what is made of it."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from innerloop.cli import main

OPTIONS = [
    "--methods=anil", "--seeds=3", "--dataset=glyphs", "--steps=6", "--filters=2", "--ways=3", "--queries=3",
    "--validation-tasks=6", "--test-tasks=8", "--threads=1", "--inner-steps=2", "--tasks-per-batch=2",
    "--memory-steps=2",
]  # fmt: skip


def test_two_workers_that_know_nothing_of_each_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "my study"
    main(["compare", "--plan", f"--out={study}", *OPTIONS])
    assert f"3 trainings: {study / 'commands.txt'}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["compare", "--collect", str(study)])
    assert "no training in" in capsys.readouterr().err
    commands = (study / "commands.txt").read_text().splitlines()
    assert len(commands) == 3
    last = shlex.split(commands.pop())
    assert last[:2] == ["innerloop", "train"]

    script = "import sys, shlex; from innerloop.cli import main; main(shlex.split(sys.argv[1])[1:])"
    workers = [subprocess.Popen([sys.executable, "-c", script, command]) for command in commands]
    for worker in workers:
        assert worker.wait(180) == 0
    main(shlex.split(commands[0])[1:])
    assert capsys.readouterr().out.startswith("finished before; report: ")

    main(["compare", "--collect", str(study)])
    told = capsys.readouterr().out
    assert f"anil: seed 2 is left out: not finished, 0 of 6 steps done: {shlex.join(last)}" in told
    assert "timed on " in told
    assert "; trained on " in told
    found = json.loads((study / "comparison.json").read_text())
    assert [len(entry["seeds"]) for entry in found["entries"]] == [2]
    assert len(found["entries"][0]["rates"]) == 3
    assert "Tuned, for every method alike: the outer rate" in told

    main(last[1:])
    capsys.readouterr()
    main(["compare", "--collect", str(study)])
    assert "left out" not in capsys.readouterr().out
    assert (study / "report.html").exists()
    with pytest.raises(SystemExit):
        main(["compare", "--collect", str(study), "--steps=3"])
    assert "--collect takes all from the folder; leave --steps out" in capsys.readouterr().err
