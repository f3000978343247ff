"""How parameters move in the inner loop: one solver a file."""

from innerloop.inner._adam import Adam, AdamW
from innerloop.inner._alfa import ALFA
from innerloop.inner._base import InnerSolver
from innerloop.inner._learned_rates import LearnedRates
from innerloop.inner._loop import InnerLoop, bind, minibatches
from innerloop.inner._momentum import Momentum
from innerloop.inner._newton_cg import NewtonCG
from innerloop.inner._sgd import SGD

__all__ = [
    "ALFA",
    "SGD",
    "Adam",
    "AdamW",
    "InnerLoop",
    "InnerSolver",
    "LearnedRates",
    "Momentum",
    "NewtonCG",
    "bind",
    "minibatches",
]
