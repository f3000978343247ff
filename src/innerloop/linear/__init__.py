"""Linear systems with the Hessian of the inner loss, solved from its products alone: one solver a file."""

from innerloop.linear.base import Info, LinearSolver, Product, solve_tree
from innerloop.linear.cg import CG
from innerloop.linear.neumann import Neumann
from innerloop.linear.nystrom import Nystrom

__all__ = ["CG", "Info", "LinearSolver", "Neumann", "Nystrom", "Product", "solve_tree"]
