"""An argument parser whose errors are one line."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from innerloop.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` and takes no abbreviated options."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `UsageError`."""
        raise UsageError(f"{message}; see {self.prog} --help")
