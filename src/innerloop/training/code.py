"""The user's own models and tasks, named as text: ``path/to/file.py:name`` or ``package.module:name``.

Behind a second colon come arguments of the function or class, as behind the name of any choice:
``nets.py:ConvNet:width=32``.

Naming code runs it. So a command imports what was typed to it, or to an earlier command of this user: those texts are
kept in the cache folder, of files with the checksum. What a run folder names beside that has to be typed anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from innerloop.choices import make
from innerloop.reporting import write_json
from innerloop.tasks._cache import cache_folder

PYTHON = "python"
"""In the settings of a run made in Python: what has no text."""

KNOWN = "code.json"
_TEXT = re.compile(r"(?P<where>.+?\.py|\w+(?:\.\w+)*):(?P<name>[A-Za-z_]\w*)(?::(?P<arguments>.*))?")


def is_code(text: str) -> bool:
    """Whether a text names a function in a file or a module."""
    return _TEXT.fullmatch(text) is not None


def absolute(text: str) -> str:
    """The text with the whole path of its file."""
    where, name, arguments = _parts(text)
    where = str(Path(where).expanduser().absolute()) if where.endswith(".py") else where
    return ":".join([where, name, *([arguments] if arguments else [])])


def short(text: str) -> str:
    """The text without folders, for people."""
    return Path(text).name if is_code(text) else text


def remember(*texts: str) -> None:
    """Keep that the user has typed these; where the cache folder cannot be written, they are forgotten."""
    with contextlib.suppress(OSError):
        known = _known() | {text: _checksum(text) for text in texts}
        write_json(cache_folder() / KNOWN, known)


def check_known(folder: Path, named: Mapping[str, str]) -> None:
    """Refuse code that a run folder names and the user has not typed, or that has changed since.

    Args:
        folder: of the run.
        named: its code, by the option that names it.

    Raises:
        ValueError: so; the message gives what to type.
    """
    known = _known()
    strange = {what: text for what, text in named.items() if known.get(text) != _checksum(text)}
    if strange:
        options = " ".join(f"--{what} {text}" for what, text in strange.items())
        raise ValueError(
            f"{folder} names code that you have not typed yet, or that has changed: look at it, then add {options}"
        )


def load(text: str) -> Callable[..., Any]:
    """Import the function or class that a text names.

    Raises:
        ValueError: no such file, module or name, or the import fails.
    """
    where, name, _ = _parts(text)
    try:
        module = _module(where)
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        raise ValueError(
            f"{where} cannot be imported ({type(error).__name__}: {error}): name a file.py:name or package.module:name"
        ) from error
    found = getattr(module, name, None)
    if not callable(found):
        public = [each for each, value in vars(module).items() if callable(value) and each[0] != "_"]
        raise ValueError(f"{where} has no function or class {name}: it has {', '.join(public) or 'none'}")
    function: Callable[..., Any] = found
    return function


def build(what: str, text: str, offered: Mapping[str, Any], **options: Any) -> Any:
    """Call what a text names, with its own arguments, and of those offered the ones that it takes.

    Args:
        what: what is built, for messages.
        text: as it was typed.
        offered: arguments by name.
        **options: arguments that it must take, unless they are None.

    Raises:
        ValueError: the code cannot be imported, takes other arguments, or fails.
    """
    function, (_, name, arguments) = load(text), _parts(text)
    try:
        taken = inspect.signature(function).parameters
        typed = {part.partition("=")[0].strip() for part in arguments.split(",") if "=" in part}
        passed = {key: value for key, value in offered.items() if key in taken and key not in typed}
        return make(what, {name: function}, f"{name}:{arguments}", **passed | options)
    except Exception as error:
        cause = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise ValueError(f"{what} {short(text)} failed: {cause}") from error


def _parts(text: str) -> tuple[str, str, str]:
    found = _TEXT.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} names no code: write path/to/file.py:name or package.module:name")
    return found["where"], found["name"], found["arguments"] or ""


def _module(where: str) -> ModuleType:
    if not where.endswith(".py"):
        _findable(Path.cwd())
        return importlib.import_module(where)
    path = Path(where).expanduser()
    name = f"innerloop_code_{hashlib.sha256(path.read_bytes() + str(path).encode()).hexdigest()[:16]}"
    if name not in sys.modules:
        _findable(path.parent)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)  # which dataclasses look themselves up in
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _findable(folder: Path) -> None:
    """Let imports find what lies in a folder, behind all else."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _known() -> dict[str, str]:
    try:
        known: dict[str, str] = json.loads((cache_folder() / KNOWN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known


def _checksum(text: str) -> str:
    """Of a file; a module goes by its name."""
    where, _, _ = _parts(text)
    try:
        return hashlib.sha256(Path(where).read_bytes()).hexdigest() if where.endswith(".py") else ""
    except OSError:
        return "missing"
