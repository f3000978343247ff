"""How the meta-gradient is found: one estimator a file."""

from innerloop.meta_gradient.base import MetaGradient, Result
from innerloop.meta_gradient.binomial import Binomial
from innerloop.meta_gradient.first_order import FirstOrder
from innerloop.meta_gradient.hypergradient import hypergradient
from innerloop.meta_gradient.implicit import Implicit
from innerloop.meta_gradient.memory_reduced import MemoryReduced, WarmStarts
from innerloop.meta_gradient.mixed import Mixed
from innerloop.meta_gradient.reptile import Reptile
from innerloop.meta_gradient.truncated import Truncated
from innerloop.meta_gradient.unrolled import Unrolled
from innerloop.meta_gradient.window import Window

__all__ = [
    "Binomial",
    "FirstOrder",
    "Implicit",
    "MemoryReduced",
    "MetaGradient",
    "Mixed",
    "Reptile",
    "Result",
    "Truncated",
    "Unrolled",
    "WarmStarts",
    "Window",
    "hypergradient",
]
