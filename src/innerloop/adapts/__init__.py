"""Which parameters move in the inner loop: one choice a file."""

from innerloop.adapts._base import Adapts
from innerloop.adapts._blocks import Blocks
from innerloop.adapts._everything import Everything
from innerloop.adapts._head import Body, Head, head_of
from innerloop.adapts._lora import LoRA
from innerloop.adapts._named import Named

__all__ = ["Adapts", "Blocks", "Body", "Everything", "Head", "LoRA", "Named", "head_of"]
