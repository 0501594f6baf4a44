"""Shared by the CPU kernels: compilation and its cache, vector intrinsics, half precision, threads."""
