"""A few launches for Nsight Compute: products in each precision, and the memory kernels where they look worst.

ncu --csv --kernel-name regex:_kernel --metrics ... python3 -m bench.lib.gpu_probe
"""

from __future__ import annotations

import sys

import torch

from fastmatch_kernels import ops as kernels


def main(*, tiny: bool) -> None:
    """Launch each kernel once or twice."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    n, d = (64, 16) if tiny else (8192, 1024)
    a, b, v = (
        torch.randn(n, d, device=device),
        torch.randn(n, d, device=device),
        torch.zeros(n, device=device),
    )
    transposed = tuple(x.T.contiguous().T for x in (a, b))
    out, order = torch.empty(n, n, device=device), torch.randperm(d)
    on_gpu = device.type == "cuda"
    for precision in ("ieee", "fp16", "fp16x3"):
        kernels.gain([(a, b)], out=out, precision=precision)
        kernels.gain([(a, b)], out=out, precision=precision, contraction_index=order)
        kernels.row_topk([(a, b)], v, 48, precision=precision)
    kernels.gain([transposed], out=out)
    kernels.row_topk([(a.bfloat16(), b.bfloat16())], v, 48)
    for shape in ((4, 8, 6, 6), (64, 16)) if tiny else ((128, 64, 56, 56), (65536, 512)):
        x = torch.randn(shape, device=device)
        mean = torch.zeros(shape[1], dtype=torch.float64, device=device)
        kernels.moments(x, x + 1, precision="fp16x3")
        kernels.channel_affine(x, mean, mean + 1)
    w, index = torch.randn(n, n, device=device), torch.randperm(n)
    kernels.permute_merge([w, w], [0.5, 0.5], [None, index], [None, index])
    if on_gpu:
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(tiny="--tiny" in sys.argv)
