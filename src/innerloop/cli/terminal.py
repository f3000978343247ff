"""Standard output that may be closed, full or know ASCII alone, without ending what is running."""

from __future__ import annotations

import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """Writes to a file descriptor until that fails; what comes after is dropped."""

    lost = False

    def write(self, content: Any, /) -> int:
        try:
            return len(content) if self.lost else super().write(content)
        except OSError as error:
            self.lost = True
            if self.fileno() == 1:
                print(f"innerloop: standard output is lost ({error.strerror}), and all else goes on", file=sys.stderr)
            return len(content)


def lasting_output() -> None:
    """Make this process's own standard output and error last; streams that others have put there stay as they are."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or stream is not getattr(sys, f"__{name}__"):
            continue
        if os.name == "nt" and stream.isatty():  # a console takes text, not bytes
            continue
        stream.flush()
        raw = io.BufferedWriter(_Lasting(stream.fileno(), "w", closefd=False))
        terminal = stream.line_buffering or name == "stderr"
        encoding, errors = stream.encoding, "backslashreplace"
        setattr(sys, name, io.TextIOWrapper(raw, encoding, errors, line_buffering=terminal))
