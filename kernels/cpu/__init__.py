"""The operations on CPU: numba, or tiled torch."""
