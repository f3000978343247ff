"""How parameters move in the inner loop: one solver a file."""

from innerloop.inner.adam import Adam
from innerloop.inner.base import InnerSolver
from innerloop.inner.learned_rates import LearnedRates
from innerloop.inner.loop import InnerLoop, bind
from innerloop.inner.momentum import Momentum
from innerloop.inner.newton_cg import NewtonCG
from innerloop.inner.sgd import SGD

__all__ = ["SGD", "Adam", "InnerLoop", "InnerSolver", "LearnedRates", "Momentum", "NewtonCG", "bind"]
