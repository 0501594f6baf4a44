"""What the CPU kernels share: vector intrinsics, half precision, threads."""
