"""Who may import whom: the contracts of ``[tool.importlinter]`` in pyproject.toml."""

from pathlib import Path

import pytest


def test_imports_run_down_only() -> None:
    cli = pytest.importorskip("importlinter.cli", reason="needs import-linter: install innerloop[dev]")
    # On failure pytest shows the captured report, which names the import and its line.
    assert (
        cli.lint_imports(config_filename=str(Path(__file__).parents[1] / "pyproject.toml"), no_cache=True)
        == cli.EXIT_STATUS_SUCCESS
    )
