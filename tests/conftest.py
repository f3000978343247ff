"""Fixtures shared by the tests."""

import logging
import os
import signal
from pathlib import Path

import pytest
import torch

# The tests run side by side, one process a core.
torch.set_num_threads(1)

# A shell ignores them in what it starts in the background, and nohup too; here they are what is tested.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real few-shot data; tests that ask for it skip where it is missing."""
    folder = Path(os.environ.get("INNERLOOP_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "omniglot28.npz").is_file():
        pytest.skip("needs the real-data folder: set INNERLOOP_DATA")
    return folder


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def log_is_heard(monkeypatch):
    """Other libraries' set-up of logging, import-linter's for one, turns loggers off that are there already."""
    monkeypatch.setattr(logging.getLogger("innerloop"), "disabled", False)
