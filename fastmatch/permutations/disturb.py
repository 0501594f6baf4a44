"""Other weights and inputs of the same kind, on which a proof runs as well.

Fresh biases are zero and fresh scales are one, at every unit alike. A spec that forgets such an axis would pass on
them, so the weights are disturbed until they differ from unit to unit.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastmatch._internal.dispatch_mode import DispatchMode
from fastmatch.spec.operations import op_name, tensors_in

__all__ = ["RoundedSums", "disturb_weights", "disturbed", "other_batches", "round_weights", "with_rows"]

SPREAD = 0.1
"""How far weights are disturbed, relative to themselves and to the tensor's root mean square."""


def disturb_weights(model: nn.Module, generator: torch.Generator) -> None:
    """Disturb every floating point weight in place; a tensor without negative values, such as variances, stays so.

    Buffers that no state dict carries are constants: a spec may rest on their values, such as ones for every unit.
    """
    for tensor in _floating([*model.parameters(), *_carried_buffers(model)]):
        finite = torch.isfinite(tensor)
        scale = float(tensor[finite].abs().square().mean().sqrt()) if finite.any() else 0.0
        noise = _uniform(tensor, generator) * (SPREAD * (scale or 1.0))
        if not tensor.is_complex() and scale:
            noise = noise.abs() if bool((tensor >= 0).all()) else noise
            noise = -noise.abs() if bool((tensor <= 0).all()) else noise
        tensor.add_(torch.where(finite, noise, torch.zeros_like(noise)))


def round_weights(model: nn.Module, epsilon: float, generator: torch.Generator) -> None:
    """Change every weight in place by a few rounding errors."""
    for tensor in _floating([*model.parameters(), *model.buffers()]):
        tensor.mul_(1 + 4 * epsilon * _uniform(tensor, generator))


SUMS = frozenset(
    "aten." + name
    for name in (
        "_cdist_forward", "_euclidean_dist", "_fft_c2c", "_fft_c2r", "_fft_r2c", "_log_softmax",
        "_scaled_dot_product_flash_attention_for_cpu", "_softmax", "_trilinear", "_weight_norm_interface", "addbmm", "addmm", "addmv",
        "baddbmm", "bmm", "convolution", "cumsum", "dot", "index_add", "linalg_vector_norm", "logsumexp", "mean", "mm", "mv",
        "native_batch_norm", "native_group_norm", "native_layer_norm", "norm", "prod", "scatter_add", "std", "std_mean", "sum", "var",
        "var_mean", "vdot",
    )
)  # fmt: skip
"""Operations whose rounding depends on the order of what they add."""

MATRIX_FUNCTIONS = frozenset(
    "aten." + name
    for name in (
        "_linalg_det", "_linalg_eigh", "_linalg_eigvals", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky",
        "cholesky_inverse", "cholesky_solve", "geqrf", "linalg_cholesky_ex", "linalg_eig", "linalg_eigvals",
        "linalg_householder_product", "linalg_inv_ex", "linalg_ldl_factor_ex", "linalg_ldl_solve", "linalg_lstsq", "linalg_lu",
        "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_matrix_exp", "linalg_qr", "linalg_solve_triangular", "ormqr",
        "triangular_solve",
    )
)  # fmt: skip
"""Operations that magnify their own rounding: their results are those of matrices that differ by rounding errors.

Results that such matrices share are few: signs and phases of singular vectors and eigenvectors depend on rounding, and so on
where in memory a matrix is.
"""


class RoundedSums(DispatchMode):
    """Change the results of sums by a rounding error, as another order of their terms does, and the operands of matrix functions.

    Attributes:
        decided: whether there was a matrix function. One draw may then show nothing, as of a sign that rounding chooses.
    """

    def __init__(self, epsilon: float, generator: torch.Generator) -> None:
        super().__init__()
        self._epsilon, self._generator = epsilon, generator
        self.decided = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = op_name(func)
        if name in MATRIX_FUNCTIONS:
            self.decided = True
            args = tuple(self._rounded(a) if isinstance(a, torch.Tensor) else a for a in args)
        out = func(*args, **(kwargs or {}))
        for tensor in tensors_in(out) if name in SUMS else ():
            if _has_rounding(tensor):
                tensor.mul_(1 + self._epsilon * _uniform(tensor, self._generator))
        return out

    def _rounded(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor whose entries differ by rounding errors; integers, such as pivots, as they are."""
        if not _has_rounding(tensor):
            return tensor
        return tensor * (1 + self._epsilon * _uniform(tensor, self._generator))


def _has_rounding(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def disturbed(value: Any, generator: torch.Generator) -> Any:
    """Return nested inputs with noise on floating point tensors, and the entries of integer rows shifted by one."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.numel() > 1:
            scale = float(value.detach().double().square().mean().sqrt()) or 1.0
            return value + (0.5 * scale if scale < float("inf") else 0.0) * _uniform(value, generator)
        # A shift makes no value that was not there, which a table might not have.
        rows = value.dtype == torch.int64 and value.ndim > 1 and value.shape[-1] > 3
        return value.roll(1, -1) if rows else value
    if isinstance(value, dict):
        return {k: disturbed(v, generator) for k, v in value.items()}
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(disturbed(v, generator) for v in value)
    return value


def other_batches(example: Any) -> tuple[int, ...]:
    """Return how many rows other batches of nested inputs get: the next multiple of six, which is one of two and three, and one.

    None where a tensor is not on the CPU: a batch may have more rows than a table of the model, and an index out of
    range leaves an accelerator unusable.
    """
    tensors = tensors_in(example)
    rows = next((t.shape[0] for t in tensors if t.layout == torch.strided and t.ndim), 0)
    if not rows or any(t.device.type != "cpu" or t.layout != torch.strided or t.is_nested for t in tensors):
        return ()
    return rows - rows % 6 + 6, 1 if rows > 1 else 2


def with_rows(example: Any, rows: int) -> Any:
    """Return nested inputs with so many rows in every tensor that has as many as the first: its own, over and over."""
    before = next(t.shape[0] for t in tensors_in(example) if t.ndim)

    def change(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            same = value.ndim and value.shape[0] == before
            return value[torch.arange(rows, device="cpu") % before] if same else value
        if isinstance(value, dict):
            return {k: change(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
            return type(value)(change(v) for v in value)
        return value

    return change(example)


def _carried_buffers(model: nn.Module) -> list[torch.Tensor]:
    """Return the buffers that a state dict of the model carries."""
    return [
        buffer
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    ]


def _floating(tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Return the memory of those that hold rounded numbers, each once."""
    return [t for t in {id(t): t.data for t in tensors}.values() if _has_rounding(t)]


def _uniform(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return numbers from -1 to 1 of the shape, type and device of ``tensor``."""
    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float64, device="cpu") * 2 - 1
    return values.to(tensor)
