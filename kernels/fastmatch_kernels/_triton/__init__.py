"""What the Triton kernels share: tile choice and the tiled product."""
