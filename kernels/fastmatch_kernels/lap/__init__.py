"""Numba kernels of the assignment solvers: see ``state`` for the arrays that they share."""
