"""How the meta-gradient is found: one estimator a file, and the parts of which a new one is made."""

from innerloop.meta_gradient._adjoint import Snapshot, Trail, bend, conclude, judge, outer_weights, pull, walk
from innerloop.meta_gradient._base import MetaGradient, Result, Seen
from innerloop.meta_gradient._binomial import Binomial
from innerloop.meta_gradient._evolution import EvolutionStrategies
from innerloop.meta_gradient._failures import fault, finite
from innerloop.meta_gradient._first_order import FirstOrder
from innerloop.meta_gradient._forward import ForwardGradient
from innerloop.meta_gradient._implicit import Implicit, MemoryReduced
from innerloop.meta_gradient._meta_rkhs import MetaRKHS
from innerloop.meta_gradient._mixed import Mixed
from innerloop.meta_gradient._moml import MOML, LocalMOML
from innerloop.meta_gradient._penalty import Penalty
from innerloop.meta_gradient._released import ReleasedIMAML
from innerloop.meta_gradient._reptile import Reptile
from innerloop.meta_gradient._sama import SAMA
from innerloop.meta_gradient._supervised import Supervised
from innerloop.meta_gradient._truncated import Truncated
from innerloop.meta_gradient._unrolled import Unrolled
from innerloop.meta_gradient._window import Window

__all__ = [
    "MOML",
    "SAMA",
    "Binomial",
    "EvolutionStrategies",
    "FirstOrder",
    "ForwardGradient",
    "Implicit",
    "LocalMOML",
    "MemoryReduced",
    "MetaGradient",
    "MetaRKHS",
    "Mixed",
    "Penalty",
    "ReleasedIMAML",
    "Reptile",
    "Result",
    "Seen",
    "Snapshot",
    "Supervised",
    "Trail",
    "Truncated",
    "Unrolled",
    "Window",
    "bend",
    "conclude",
    "fault",
    "finite",
    "judge",
    "outer_weights",
    "pull",
    "walk",
]
