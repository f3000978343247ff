"""What the papers measured, on a user's own model and tasks: one study a file."""

from innerloop.studies.check import Check, check
from innerloop.studies.compare import compare

__all__ = ["Check", "check", "compare"]
