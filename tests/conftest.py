"""Threads and backends of the test processes, set before anything loads OpenMP, numba or Triton."""

from __future__ import annotations

import os

# Tests run in parallel processes, one for each core. OpenMP's threads spin while they wait for each other, which
# slows every process of a full machine down by an order of magnitude; passive ones sleep.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Without a GPU, Triton runs kernels in its interpreter, on CPU tensors. It reads this when it is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

torch.set_num_threads(1)
