"""How the meta-gradient is found: one estimator a file."""

from innerloop.meta_gradient.base import MetaGradient, Result
from innerloop.meta_gradient.first_order import FirstOrder
from innerloop.meta_gradient.hypergradient import hypergradient
from innerloop.meta_gradient.reptile import Reptile
from innerloop.meta_gradient.truncated import Truncated
from innerloop.meta_gradient.unrolled import Unrolled

__all__ = ["FirstOrder", "MetaGradient", "Reptile", "Result", "Truncated", "Unrolled", "hypergradient"]
