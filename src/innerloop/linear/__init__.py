"""Linear systems with the Hessian of the inner loss, solved from its products alone: one solver a file."""

from innerloop.linear._base import Info, LinearSolver, Product, solve_tree
from innerloop.linear._cg import CG
from innerloop.linear._neumann import Neumann
from innerloop.linear._nystrom import Nystrom

__all__ = ["CG", "Info", "LinearSolver", "Neumann", "Nystrom", "Product", "solve_tree"]
