"""The command as tests run it, where it must fail."""

import pytest

from innerloop.cli import main


def refused(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 2) -> str:
    """Run a command that must fail; returns its one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == code
    out, error = capsys.readouterr()
    assert error.startswith("innerloop: ")
    assert error.count("\n") == 1, error
    assert "Traceback" not in out + error
    return error
