"""Shared by the Triton kernels: tile choice and the tiled product."""
