"""Kernels of fastmatch, one folder per operation: the public function, a torch reference, CPU code, Triton code.

The public functions are in :mod:`fastmatch_kernels.ops`. This package imports nothing from fastmatch.
"""
