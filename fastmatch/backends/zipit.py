"""ZipIt's matching functions (Stoica et al. 2023): merge and unmerge matrices from a joint covariance.

``metric["covariance"]`` (N n, N n) holds the n features of model 1, then those of model 2, up to model N. ``merge``
(m, N n) averages them into m common features. ``unmerge`` (N n, m) maps the common features back.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from fastmatch.assignment import solve
from fastmatch.merging.zip import zip_units

__all__ = ["match_tensors_identity", "match_tensors_permute", "match_tensors_zipit"]

EPS = 1e-5
"""Added to the number of merged features before dividing by it, as in ZipIt."""


def match_tensors_permute(
    metric: Mapping[str, torch.Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **ignored: Any,
) -> tuple[Any, ...]:
    """Permute every model's features to the first model's order, by correlation.

    Args:
        metric: a mapping with ``"covariance"``.
        r: fraction of the features that merging removes: 1 - 1 / number of models.
        get_merge_value: also return the mean correlation of the last model's matched features.
        add_bias: make unmerge pass one more feature through, a constant.
        ignored: arguments of ZipIt's other matching functions, which have no effect here.

    Returns:
        (merge, unmerge) or (merge, unmerge, value), float32 on the covariance's device.
    """
    count, n = _models(metric["covariance"], r)
    correlation = _correlation(metric["covariance"])
    blocks = [correlation[:n, n * k : n * (k + 1)] for k in range(1, count)]
    columns = [np.arange(n), *(solve(block, maximize=True).col_ind for block in blocks)]
    result = _from_columns(columns, n, add_bias, correlation.device)
    if not get_merge_value:
        return result
    matched = correlation[torch.arange(n, device="cpu"), (count - 1) * n + torch.from_numpy(columns[-1])]
    return *result, float(matched.mean())


def match_tensors_identity(
    metric: Mapping[str, torch.Tensor], r: float = 0.5, add_bias: bool = False, **ignored: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge feature k of every model with feature k of the others: plain averaging."""
    covariance = metric["covariance"]
    count, n = _models(covariance, r)
    return _from_columns([np.arange(n)] * count, n, add_bias, covariance.device)


def match_tensors_zipit(
    metric: Mapping[str, torch.Tensor],
    r: float = 0.5,
    a: float = 0.3,
    b: float = 0.125,
    print_merges: bool = False,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **ignored: Any,
) -> tuple[Any, ...]:
    """Merge the two most similar features repeatedly, also within a model, until (1 - r) N n features remain.

    The similarity of a merged feature to a third one is the smaller similarity of its two parts, times ``a``. Once a
    model has made the fraction ``b`` of its even share of merges within itself, it merges only with other models.

    Args:
        metric: a mapping with ``"covariance"``, or with ``"cossim"``, which is used as given. It is not changed.
        r, add_bias: see :func:`match_tensors_permute`.
        a, b: alpha (above 0) and beta of the paper's section 4.3.
        print_merges: print the number of features merged within each model and across models.
        get_merge_value: also return the mean similarity of the merged pairs.
        ignored: arguments of ZipIt's other matching functions, which have no effect here.

    Returns:
        (merge, unmerge) or (merge, unmerge, value), float32 on the similarity's device.

    Raises:
        ValueError: ``a`` is not above 0, or no feature would remain under ``r``.

    Cost: O((N n)^2) in total. ZipIt searches and copies the matrix again for every pair.
    """
    count, n = _models(metric["covariance"] if "covariance" in metric else metric["cossim"], r)
    given = _correlation(metric["covariance"]) if "covariance" in metric else metric["cossim"]
    remaining = int(count * n * (1 - r) + 1e-4)
    similarity = given.detach().cpu().numpy().astype(np.float32, copy=True)
    column, values = zip_units(similarity, count, remaining, a, b)
    unmerge = torch.nn.functional.one_hot(torch.from_numpy(column), remaining).float().to(given.device)
    if print_merges:
        within = [int((unmerge[k * n : (k + 1) * n].sum(dim=0) > 1).sum()) for k in range(count)]
        across = int((unmerge.view(count, n, -1).any(dim=1).sum(dim=0) > 1).sum())
        print(f"merged within each model: {within}; across models: {across}")
    merge = (unmerge / (unmerge.sum(dim=0) + EPS)).T
    if add_bias:
        unmerge = torch.cat([_with_bias(part) for part in unmerge.chunk(count)])
    return (merge, unmerge, float(np.mean(values))) if get_merge_value else (merge, unmerge)


def _correlation(covariance: torch.Tensor) -> torch.Tensor:
    """Return the Pearson correlation, with ZipIt's smallest denominator."""
    std = covariance.diagonal().sqrt()
    return covariance / torch.outer(std, std).clamp_(min=1e-7)


def _models(matrix: torch.Tensor, r: float) -> tuple[int, int]:
    """Return (number of models, features per model)."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"metric: expected a square matrix, got shape {tuple(matrix.shape)}")
    if not 0 <= r < 1:
        raise ValueError(f"r: expected a fraction of at least 0 and below 1, got {r}")
    count = int(1 / (1 - r) + 0.5)
    if len(matrix) % count:
        raise ValueError(f"metric: {len(matrix)} features are not {count} models of equal width")
    return count, len(matrix) // count


def _from_columns(
    columns: list[np.ndarray], n: int, add_bias: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (merge, unmerge) in which feature columns[k][i] of model k belongs to common feature i."""
    blocks = []
    for column in columns:
        block = torch.zeros(n, n, device=device)
        block[torch.from_numpy(column).to(device), torch.arange(n, device=device)] = 1
        blocks.append(block)
    joined = torch.cat(blocks)
    merge = (joined / (joined.sum(dim=0) + EPS)).T
    return merge, torch.cat([_with_bias(block) for block in blocks]) if add_bias else joined


def _with_bias(block: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(block, (0, 1, 0, 1))
    padded[-1, -1] = 1
    return padded
