"""Peak memory and time of a function.

Memory is measured in a fresh process, started with `quiet_environment`: what ran before leaves freed memory with the
allocator, and what is taken from there is not seen.
"""

from __future__ import annotations

import ctypes
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from innerloop.studies.comparison import Timing

_PROCESS = Path("/proc/self")
_QUIET = "MALLOC_MMAP_THRESHOLD_"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def quiet_environment() -> dict[str, str]:
    """This process's environment for another one, whose C library hands freed memory back to the system at once.

    Everything is two to three times slower there, but for what `time_of` measures.
    """
    return {**os.environ, _QUIET: "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


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
    _lower_mark()
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
    device = torch.device(device)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    seconds = []
    with _freed_memory_is_kept():
        function()
        for _ in range(repetitions):
            began = now()
            function()
            seconds.append(now() - began)
    lower, median, upper = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, lower, upper)


@contextmanager
def _freed_memory_is_kept() -> Iterator[None]:
    """Undo the `quiet_environment`, if this process has it: what glibc comes to by itself, and back again."""
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


def _lower_mark() -> None:
    """Set the process's high-water mark to what is resident now, where the system can do that (Linux)."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return


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
