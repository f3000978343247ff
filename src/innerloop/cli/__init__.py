"""The command ``innerloop``: one file a sub-command."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.metadata import version

from innerloop.cli import adapt, check, compare, data, evaluate, patterns, train
from innerloop.cli.arguments import Parser, UsageError
from innerloop.studies.measure import Failed
from innerloop.training.fit import Diverged

COMMANDS = {
    "train": train,
    "evaluate": evaluate,
    "adapt": adapt,
    "compare": compare,
    "patterns": patterns,
    "check": check,
    "data": data,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command line. Exits with 2 on a wrong setting, 1 if a training fails, 130 on Ctrl-C, and one line each."""
    parser = Parser(prog="innerloop", description="Meta-learning by optimisation.")
    parser.add_argument("--version", action="version", version=f"innerloop {version('innerloop')}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        text = module.__doc__ or ""
        usage = f"innerloop {name} {module.USAGE}"
        module.add_arguments(
            commands.add_parser(name, help=text.splitlines()[0].replace("%", "%%"), description=text, usage=usage)
        )
    try:
        arguments = parser.parse_args(argv)
        COMMANDS[arguments.command].run(arguments)
    except UsageError as error:
        _exit(2, error)
    except (Diverged, Failed) as error:
        _exit(1, error)
    except KeyboardInterrupt as error:
        _exit(130, str(error) or "stopped")


def _exit(code: int, message: object) -> None:
    sys.stdout.flush()  # into a file what was printed before comes before
    print(f"innerloop: {message}", file=sys.stderr)
    raise SystemExit(code)
