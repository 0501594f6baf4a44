"""One torch thread a worker: the tests run in parallel already."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
