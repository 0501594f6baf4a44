"""The operations as Triton kernels, with their launchers."""
