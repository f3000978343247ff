"""Freed memory kept by the process, for the command alone: a library leaves its host's allocator as it is.

glibc gives large freed blocks back to the system and faults them in again, page by page, when the next step asks for as
much. For a convolutional network on a CPU that is a third of the time.
"""

from __future__ import annotations

import ctypes
import os
import platform

SWITCH = "INNERLOOP_KEEP_MEMORY"
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of mallopt


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed; the environment variable INNERLOOP_KEEP_MEMORY=0 leaves it as it is.

    Library users get the same by the environment: ``MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_MMAP_MAX_=0``.
    """
    if os.environ.get(SWITCH) != "0" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(_MMAP_MAX, 0)
