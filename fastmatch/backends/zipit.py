"""ZipIt's matching functions (Stoica et al. 2023): merge and unmerge matrices from a joint covariance.

Features of the models follow each other in ``metric["covariance"]`` (N n, N n). ``merge`` (m, N n) averages
them into m common features, ``unmerge`` (N n, m) takes them apart again.
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
"""Added to the number of features merged, as there."""


def match_tensors_permute(
    metric: Mapping[str, torch.Tensor],
    r: float = 0.5,
    get_merge_value: bool = False,
    add_bias: bool = False,
    **ignored: Any,
) -> tuple[Any, ...]:
    """Every model's features permuted to the first model's, by correlation.

    Args:
        metric: holds ``"covariance"``.
        r: the share of features merged away: 1 - 1 / number of models.
        get_merge_value: also return the mean correlation of the last model's matched features.
        add_bias: let unmerge pass one more feature, a constant, through.
        ignored: arguments of ZipIt's other matching functions.

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
    matched = correlation[torch.arange(n), (count - 1) * n + torch.from_numpy(columns[-1])]
    return *result, float(matched.mean())


def match_tensors_identity(
    metric: Mapping[str, torch.Tensor], r: float = 0.5, add_bias: bool = False, **ignored: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feature k with feature k: plain averaging."""
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
    """ZipIt's greedy pairs: the most similar two features become one, within a model too, until (1 - r) N n are left.

    A merged feature is as similar to a third as the less similar of its parts, times ``a``. After ``b`` of its
    even share of merges within itself, a model only merges with others. Cost: O((N n)^2), against a
    fresh search and copy of the matrix at every pair there.

    Args:
        metric: holds ``"covariance"``, or ``"cossim"`` to be taken as it is; left unchanged.
        r, add_bias: as for :func:`match_tensors_permute`.
        a, b: alpha and beta of the paper's section 4.3; ``a`` above 0.
        print_merges: print how many features were merged within and across two models.
        get_merge_value: also return the mean similarity of the pairs.
        ignored: arguments of ZipIt's other matching functions.

    Raises:
        ValueError: ``a`` is not above 0, or ``r`` leaves no feature.
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
    """The Pearson correlation, with ZipIt's least denominator."""
    std = covariance.diagonal().sqrt()
    return covariance / torch.outer(std, std).clamp_(min=1e-7)


def _models(matrix: torch.Tensor, r: float) -> tuple[int, int]:
    """(number of models, features of each)."""
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"metric: expected a square matrix, got shape {tuple(matrix.shape)}")
    if not 0 <= r < 1:
        raise ValueError(f"r: expected a share of at least 0 and below 1, got {r}")
    count = int(1 / (1 - r) + 0.5)
    if len(matrix) % count:
        raise ValueError(f"metric: {len(matrix)} features are not {count} models of equal width")
    return count, len(matrix) // count


def _from_columns(
    columns: list[np.ndarray], n: int, add_bias: bool, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks with a one at (columns[k][i], i): feature columns[k][i] of model k joins common feature i."""
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
