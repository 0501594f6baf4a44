"""Numba kernels of the assignment solvers."""
