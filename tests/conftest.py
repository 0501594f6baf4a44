"""One torch thread a worker, since the tests run in parallel already; Triton in its interpreter without a GPU."""

from __future__ import annotations

import os

import torch

torch.set_num_threads(1)

# Before anything imports triton: without a GPU its kernels run in the interpreter, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
