"""What a number was made with."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parents[3]  # where the package is not installed


def provenance() -> dict[str, Any]:
    """What a number is made with: command, versions, machine, and the commit where the package is under git."""
    packages = ("innerloop", "torch", "numpy")
    return {
        "command": shlex.join([*_program(), *sys.argv[1:]]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "machine": {
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        },
    }


def made(found: Mapping[str, Any]) -> str:
    """A provenance, and the ``seconds`` that it took where they are known, in a line."""
    machine = found["machine"]
    versions = ", ".join(f"{package} {number}" for package, number in found["versions"].items())
    seconds = f"{found['seconds']:.0f} s " if "seconds" in found else ""
    day = f", {found['time'][:10]}" if "time" in found else ""
    return (
        f"`{found['command']}`, {seconds}on {machine.get('gpu') or machine['processor']} with {machine['threads']} "
        f"threads, {versions}, commit {found['commit']}{day}"
    )


def _program() -> list[str]:
    """A script of the repository, or else the command."""
    script = Path(sys.argv[0]).resolve()
    if script.suffix == ".py" and script.is_relative_to(REPOSITORY) and script.name != "__main__.py":
        return ["python", script.relative_to(REPOSITORY).as_posix()]
    return ["innerloop"]


def _commit() -> str | None:
    """The commit of this package's source, ``-dirty`` behind it where files differ; None if it is not under git."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40"], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
