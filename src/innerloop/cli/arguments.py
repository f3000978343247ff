"""Settings as command-line arguments, and errors as one line."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from datetime import datetime
from pathlib import Path
from typing import Any

from innerloop.errors import Failed, UsageError
from innerloop.training.settings import Settings, flag


@contextlib.contextmanager
def usage_errors() -> Iterator[None]:
    """Turn the errors with which the library refuses settings and data into `UsageError`."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error


@contextlib.contextmanager
def writing_results(what: str = "the results are printed above but") -> Iterator[None]:
    """Turn a file that cannot be written into one line, by default where the numbers are printed already."""
    try:
        yield
    except OSError as error:
        raise Failed(f"{what} could not be written: {error}") from error


def add_settings(
    parser: argparse.ArgumentParser,
    names: Collection[str] | None = None,
    run: bool = False,
    otherwise: Mapping[str, str] | None = None,
) -> None:
    """Add an option for each of the named fields of `Settings`, or for all. Values stay text, which `Settings` checks.

    Args:
        parser: where the options go.
        names: the fields.
        run: where an option is left out, a run's setting holds instead of the default.
        otherwise: by field, in words, what holds where its option is left out, if it is not the default.
    """
    group: argparse._ActionsContainer = parser
    for each in fields(Settings):
        if each.name in Settings.GROUPS:
            group = parser.add_argument_group(Settings.GROUPS[each.name])
        if names is not None and each.name not in names:
            continue
        allowed = each.metadata["names"]
        default = "the run's" if run else each.metadata["otherwise"] or _text(each.default)
        default = (otherwise or {}).get(each.name, default)
        choices = f" ({', '.join(allowed)})" if allowed else ""
        kind = {"int": "N", "float": "X", "bool": "BOOL", "str": "TEXT"}[each.type.split()[0]]
        text = f"{each.metadata['help']}{choices} [{default}]".replace("%", "%%")
        metavar = "NAME" if allowed else kind
        group.add_argument(f"--{flag(each.name)}", default=argparse.SUPPRESS, metavar=metavar, help=text)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gives, by field."""
    return {each.name: getattr(arguments, each.name) for each in fields(Settings) if hasattr(arguments, each.name)}


def default_folder(what: str) -> Path:
    """Where results go that name no folder: below ``runs``, by what they are and when they were begun."""
    return Path("runs", f"{what}-{datetime.now():%Y%m%d-%H%M%S}")


def names(text: str) -> list[str]:
    """The parts of a list such as ``maml,anil``, as a type of `argparse`."""
    return [part.strip() for part in text.split(",") if part.strip()]


def whole_numbers(text: str) -> list[int]:
    """The numbers of a list such as ``1,5,10``, as a type of `argparse`; an empty text has none."""
    try:
        return [int(part) for part in names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; give whole numbers separated by commas, such as 1,5,10") from None


def _text(default: Any) -> str:
    return "none" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
