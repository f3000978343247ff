"""Fixtures shared by the tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real few-shot data; tests that ask for it skip where it is missing."""
    folder = Path(os.environ.get("INNERLOOP_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "omniglot28.npz").is_file():
        pytest.skip("needs the real-data folder: set INNERLOOP_DATA")
    return folder
