"""The package as others get it: a wheel that works away from the repository, and honest requirements."""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import innerloop

ROOT = Path(__file__).parents[1]


def requirements() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]


def test_requirements_are_lower_bounds_only() -> None:
    for requirement in requirements():
        assert re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", requirement), requirement


def test_constraints_pin_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\d.]+(post\d+)?", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    required = {re.match(r"[\w-]+", line)[0].lower().replace("_", "-") for line in requirements()}  # type: ignore[index]
    assert required <= pinned


def test_importing_the_package_loads_neither_studies_nor_drawing() -> None:
    command = "import sys, innerloop as il; print(*sys.modules); il.check, il.compare, il.fit; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    early, late = ({name.split(".")[0] for name in line.split()} for line in done.stdout.splitlines())
    assert not early & {"matplotlib", "tensorboard", "rich", "PIL", "requests"}
    assert "matplotlib" in late
    early, late = (set(line.split()) for line in done.stdout.splitlines())
    studies = {"innerloop.studies.check", "innerloop.studies.compare", "innerloop.training.fit"}
    assert not early & studies
    assert studies <= late


def test_a_function_never_shadows_its_module() -> None:
    public = [name for name in dir(innerloop) if not name.startswith("_")]
    assert set(innerloop.__all__) == set(public)
    for module in ("innerloop.training.fit", "innerloop.studies.check", "innerloop.studies.compare"):
        package, _, name = module.rpartition(".")
        assert importlib.import_module(module) is vars(importlib.import_module(package))[name]
    with pytest.raises(AttributeError, match="has no attribute 'compete'"):
        innerloop.compete  # noqa: B018


def test_the_wheel_runs_outside_the_repository(tmp_path: Path) -> None:
    copy = tmp_path / "copy"  # the build leaves its working files beside the sources
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = "from setuptools.build_meta import build_wheel; build_wheel('.')"
    subprocess.run([sys.executable, "-c", build], cwd=copy, check=True, capture_output=True)
    (wheel,) = copy.glob("innerloop-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "installed")
        packed = {name for name in archive.namelist() if name.startswith("innerloop/")}
    assert packed == {
        str(file.relative_to(copy / "src")) for file in (copy / "src/innerloop").rglob("*") if file.is_file()
    }

    command = [sys.executable, "-c", "import innerloop, innerloop.cli; print(innerloop.__file__); innerloop.cli.main()"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "installed")}
    done = subprocess.run(
        [*command, "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))
    assert "train" in done.stdout
