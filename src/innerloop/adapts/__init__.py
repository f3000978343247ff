"""Which parameters move in the inner loop: one choice a file."""

from innerloop.adapts.base import Adapts
from innerloop.adapts.blocks import Blocks
from innerloop.adapts.everything import Everything
from innerloop.adapts.head import Body, Head
from innerloop.adapts.named import Named

__all__ = ["Adapts", "Blocks", "Body", "Everything", "Head", "Named"]
