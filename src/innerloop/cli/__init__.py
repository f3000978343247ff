"""The command ``innerloop``: one file a sub-command."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from innerloop.children import end_with_parent
from innerloop.cli.parser import Parser
from innerloop.cli.terminal import lasting_output
from innerloop.errors import Diverged, Failed, Stopped, UsageError
from innerloop.files import shown

COMMANDS = ("train", "evaluate", "adapt", "compare", "patterns", "check", "data", "demo")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line.

    Exits with one line: code 2 on a wrong setting, 1 if a training fails or a disk is full, 128 and its number on a
    signal, as 130 on Ctrl-C and 143 on SIGTERM.
    """
    from innerloop.training.signals import heeded

    lasting_output()
    end_with_parent()
    with heeded(at_once=True) as signals:
        ended = _ended(argv)
        signals.at_once = False  # as torchrun stops the others too, and what is wrong is still to be said
        if ended:
            _exit(*ended)


def _ended(argv: Sequence[str] | None) -> tuple[int, object] | None:
    """Run a command line; the exit code and what to say where it did not succeed."""
    try:
        _run(argv)
    except UsageError as error:
        return 2, error
    except (Diverged, Failed) as error:
        return 1, error
    except Stopped as error:
        return 128 + error.number, error
    except KeyboardInterrupt:
        return 130, "stopped"
    return None


def _run(argv: Sequence[str] | None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = Parser(prog="innerloop", description="Meta-learning by optimisation.")
    parser.add_argument("--version", action="version", version=f"innerloop {version('innerloop')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        text = _docstring(name)
        sub = commands.add_parser(name, help=text.splitlines()[0].replace("%", "%%"), description=text)
        if name in argv[:1]:  # the others are not loaded
            module = import_module(f"innerloop.cli.{name}")
            sub.usage = f"innerloop {name} {module.USAGE}"
            module.add_arguments(sub)
    arguments = parser.parse_args(argv)
    from innerloop.training.allocator import keep_freed_memory

    keep_freed_memory()
    import_module(f"innerloop.cli.{arguments.command}").run(arguments)


def _docstring(name: str) -> str:
    """What a sub-command's file says on top, without running it."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source)) or ""


def _exit(code: int, message: object) -> None:
    sys.stdout.flush()  # into a file what was printed before comes before
    with suppress(Stopped):  # who asks twice need not be told
        if _speaks():
            print(f"innerloop: {shown(str(message))}", file=sys.stderr)
    raise SystemExit(code)


def _speaks() -> bool:
    """Whether it is for this process to say so, where torchrun has started several."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return True  # and torch is not loaded for it
    from innerloop.training.processes import speaks

    return speaks()
