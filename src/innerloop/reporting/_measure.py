"""Peak memory and time of a function.

Memory is measured in a fresh process (`in_fresh_process`): what ran before leaves freed memory with the allocator, and
what is taken from there is not seen.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from innerloop.children import end_with_parent, tied
from innerloop.errors import Failed

_PROCESS = Path("/proc/self")
_QUIET = "MALLOC_MMAP_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


Key = TypeVar("Key")


class Timing(NamedTuple):
    """Seconds: the median of the repetitions, and the quartiles around it."""

    median: float
    lower: float
    upper: float


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, with as many threads, for honest peaks of memory.

    The C library of that process hands freed memory back at once. Everything is two to three times slower there, but
    for what `time_of` measures. The process ends with this one, on SIGKILL too.

    Args:
        function: of a module, or of the script that runs.
        *arguments: for it, which JSON can hold, as what it returns.

    Raises:
        Failed: the process did not end well; the message is the last line that it wrote.
    """
    script = sys.modules["__main__"].__file__ if function.__module__ == "__main__" else None
    asked = [script, function.__module__, function.__name__, torch.get_num_threads(), arguments]
    command = [sys.executable, "-c", f"from {__name__} import _serve; _serve()", json.dumps(asked)]
    # where what is freed goes back to the system at once
    environment = {**os.environ, _QUIET: "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(command, capture_output=True, text=True, **tied(environment))
    if done.returncode:
        raise Failed((done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1])
    return json.loads(done.stdout.splitlines()[-1])


def _serve() -> None:
    """In the fresh process: call what the command line asks for, and write what it returns to standard output."""
    end_with_parent()
    script, module, name, threads, arguments = json.loads(sys.argv[1])
    torch.set_num_threads(threads)
    function = runpy.run_path(script, run_name="fresh")[name] if script else getattr(import_module(module), name)
    sys.stdout.write("\n" + json.dumps(function(*arguments)) + "\n")


def peak_memory(function: Callable[[], object], device: str | torch.device) -> int:
    """Bytes that one call of a function takes, at its peak, above what was there before.

    On CUDA those that torch has allocated; on the CPU those of the process that are resident. Call something like it
    first, but smaller: libraries load their kernels on first use.
    """
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with suppress(OSError):  # lowers the mark to what is resident now, where the system can do that (Linux)
        (_PROCESS / "clear_refs").write_text("5")
    before = _mark()
    function()
    return _mark() - before


def time_of(function: Callable[[], object], repetitions: int, device: str | torch.device) -> Timing:
    """Seconds that a call of a function takes: median and quartiles of so many, after one that is not counted.

    Raises:
        ValueError: fewer than 2 repetitions, which have no quartiles.
    """
    if repetitions < 2:
        raise ValueError(f"repetitions={repetitions}: give 2 or more, or there are no quartiles")
    with _freed_memory_is_kept():
        return in_turns({"": function}, repetitions, device)[""]


def in_turns(
    functions: Mapping[Key, Callable[[], object]], rounds: int, device: str | torch.device = "cpu", warm_up: int = 1
) -> dict[Key, Timing]:
    """Time functions that take turns, so that a machine that is busy for a while is so for all of them.

    Args:
        functions: by name.
        rounds: calls of each, 2 or more.
        device: that they wait for.
        warm_up: rounds before, which are not counted.
    """
    cuda = torch.device(device).type == "cuda"

    def now() -> float:
        if cuda:
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds: dict[Key, list[float]] = {name: [] for name in functions}
    for _ in range(warm_up + rounds):
        for name, function in functions.items():
            began = now()
            function()
            seconds[name].append(now() - began)
    return {name: _timing(found[warm_up:]) for name, found in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper)


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Undo what a fresh process begins with, if this is one: what glibc comes to by itself, and back again."""
    if _QUIET not in os.environ or platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
    libc.mallopt(_M_TRIM_THRESHOLD, 64 * 2**20)
    try:
        yield
    finally:
        libc.mallopt(_M_MMAP_THRESHOLD, int(os.environ[_QUIET]))
        libc.mallopt(_M_TRIM_THRESHOLD, int(os.environ[_QUIET]))
        libc.malloc_trim(0)


def _mark() -> int:
    """High-water mark of resident memory, in bytes."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource  # not on Windows

    # On Linux this one begins at what the parent process had, so it comes last.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
