"""Where the inner loop begins, if not at the model itself: with a head made of the support set, one rule a file."""

from innerloop.start._base import Start
from innerloop.start._prototypes import Prototypes
from innerloop.start._ridge import Ridge

__all__ = ["Prototypes", "Ridge", "Start"]
