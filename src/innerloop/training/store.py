"""The run folder as a store: one process at a time, the newest checkpoints, records that are only appended.

A checkpoint is on the disk before anything that it makes true is told. It holds the records of its own step, so that
a resumed run has each record once, whenever it was killed.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from innerloop.files import check_writable, clean
from innerloop.training.checkpoints import load_checkpoint, save_checkpoint

BEST, LAST, METRICS, TENSORBOARD = "best.safetensors", "last.safetensors", "metrics.jsonl", "tensorboard"
LOCK = "lock"
CRC = b', "crc": '  # the last entry of a record: the CRC-32 of it all without this entry
UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # some network file systems have no locks

Record = dict[str, Any]
Parts = dict[str, Tensor]
_held: dict[Path, int] = {}


@contextmanager
def locked(folder: Path, patience: float = 0.0) -> Iterator[None]:
    """Within the block no other process trains in a folder; the lock ends with the process, however that ends.

    A thread that has the lock already is let through. What killed processes left half-written is deleted.

    Args:
        folder: an existing one.
        patience: seconds to wait for another process to end.

    Raises:
        ValueError: another process has it; the message says which.
        OSError: the folder cannot be written.
    """
    where = folder.resolve()
    if _held.get(where) == threading.get_ident():
        yield
        return
    check_writable(folder)
    until = time.monotonic() + patience
    with (folder / LOCK).open("a+b") as file:
        while not _lock(file):
            if time.monotonic() >= until:
                raise ValueError(f"{folder} is in use by {_holder(folder)}: wait for it to end, or choose another")
            time.sleep(0.1)
        _held[where] = threading.get_ident()
        try:
            file.truncate(0)
            started = datetime.now(UTC).isoformat(timespec="seconds")
            file.write(json.dumps({"process": os.getpid(), "host": platform.node(), "since": started}).encode())
            file.flush()
            clean(folder)
            yield
        finally:
            del _held[where]


def _lock(file: BinaryIO) -> bool:
    try:
        if os.name == "nt":
            import msvcrt

            file.seek(2**30)  # beyond what is written, which stays readable so
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            return False
        warnings.warn(f"{file.name} cannot be locked here: let one process alone use its folder", stacklevel=4)
    return True


def _holder(folder: Path) -> str:
    try:
        found = json.loads((folder / LOCK).read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['host']}, since {found['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def generations(folder: Path) -> list[Path]:
    """The checkpoints that a run has, the newest first: ``last.safetensors``, ``last-2.safetensors`` and so on."""
    older = (path for path in folder.glob("last-*.safetensors") if path.stem[5:].isdecimal())
    newest = folder / LAST
    return [newest] * newest.exists() + sorted(older, key=lambda path: int(path.stem[5:]))


def save_newest(folder: Path, states: Mapping[str, Mapping[Any, Any]], keep: int = 2) -> None:
    """Write a checkpoint and keep so many of the newest in all.

    Raises:
        OSError: it cannot be written; those before are still there.
    """

    def make_room() -> None:
        for place, path in reversed([*enumerate(generations(folder), 2)]):
            if place <= keep:
                path.replace(folder / f"last-{place}.safetensors")
            elif place > keep + 1:  # else the one before takes its name
                path.unlink()

    save_checkpoint(folder / LAST, states, make_room)


def load_newest(folder: Path, before: int | None = None) -> dict[str, dict[Any, Any]] | None:
    """The newest checkpoint that is whole, or that is of a step before one; None where there is no run yet.

    A damaged one, or that the newest is missing, is warned of.

    Raises:
        ValueError: all are damaged, or missing beside the results of training.
    """
    found = generations(folder)
    wrong = [] if not found or found[0].name == LAST else [f"{folder / LAST} is missing"]
    for path in found:
        try:
            states = load_checkpoint(path)
        except ValueError as error:
            wrong.append(str(error))
            continue
        if before is not None and states["progress"]["step"] >= before and path != found[-1]:
            continue
        for each in wrong:
            warnings.warn(f"{each}; going on from {path.name}, of step {states['progress']['step']}", stacklevel=2)
        return states
    if found:
        raise ValueError("; ".join(wrong))
    if (folder / BEST).exists() or last_step(folder / METRICS):
        raise ValueError(f"{folder} was trained but has no checkpoint ({LAST}): restore it, or train in another folder")
    return None


class JsonLines:
    """One record a line, each written at once and never again.

    Records after step ``keep``, which are told again, are cut off first.
    """

    def __init__(self, path: Path, keep: int) -> None:
        if path.exists():
            os.truncate(path, _end(path, keep))
        self._file = path.open("ab", buffering=0)

    def __call__(self, record: Record) -> None:
        text = json.dumps(record).encode()
        line = text[:-1] + CRC + b"%d}\n" % zlib.crc32(text)
        if self._file.write(line) < len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self._file.name)

    def sync(self) -> None:
        """See the records to the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_records(path: Path) -> list[Record]:
    """The records of a ``metrics.jsonl``; lines that cannot be read are left out, with one warning."""
    found = [_record(line) for line in path.read_bytes().splitlines(keepends=True)]
    if lost := [number for number, record in enumerate(found, 1) if record is None]:
        lines = "line" if len(lost) == 1 else "lines"
        warnings.warn(f"{path}: {len(lost)} {lines} left out, the first is {lost[0]}: unreadable", stacklevel=2)
    return [record for record in found if record is not None]


@contextmanager
def resumable(path: Path | None, key: str) -> Iterator[tuple[dict[int, Parts], Callable[[int, Parts], None]]]:
    """For a computation in parts: those that an interrupted process has left, and a function that keeps one more.

    Args:
        path: a file of records, to which several computations may write; None keeps nothing.
        key: names the computation: a hash of all that its results follow from.
    """
    if path is None:
        yield {}, lambda step, parts: None
        return
    there = read_records(path) if path.exists() else []
    before = {
        record["step"]: {
            name: torch.tensor(values, dtype=getattr(torch, kind)) for name, (kind, values) in record["parts"].items()
        }
        for record in there
        if record["kind"] == key
    }
    with closing(JsonLines(path, sys.maxsize)) as lines:

        def keep(step: int, parts: Parts) -> None:
            values = {name: [str(value.dtype)[6:], value.tolist()] for name, value in parts.items()}
            lines({"kind": key, "step": step, "parts": values})

        yield before, keep


def last_step(path: Path) -> int:
    """The step of the last whole record of a file that may be long; 0 where there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 65536))
        lines = file.read().splitlines(keepends=True)
    return next((record["step"] for record in map(_record, reversed(lines)) if record), 0)


def _record(line: bytes) -> Record | None:
    """The record of a line; None where it is torn or damaged."""
    text, crc, given = line.rpartition(CRC)
    text += b"}"
    if not crc or given != b"%d}\n" % zlib.crc32(text):
        return None
    try:
        record = json.loads(text)
        return record if isinstance(record["step"], int) and isinstance(record["kind"], str) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _end(path: Path, keep: int) -> int:
    """Where the last record of step ``keep`` or one before it ends, in bytes."""
    end = place = 0
    with path.open("rb") as file:
        for line in file:
            place += len(line)
            record = _record(line)
            if record is not None and record["step"] <= keep:
                end = place
    return end
