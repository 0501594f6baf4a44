"""Rules that say which units of N models become one: by position, by permutation, zipped, or by CCA."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch

from fastmatch._internal.batches import Forward, check_data, check_forward, default_forward
from fastmatch._internal.checks import check_choice, check_fraction, check_number
from fastmatch.matching.activations import best_permutation
from fastmatch.matching.cca import RIDGE, roots
from fastmatch.merging.units import UnitMaps, cluster_maps, matrix_maps
from fastmatch.merging.zip import zip_units
from fastmatch.spec.activation_sites import Site
from fastmatch.statistics.moments import CrossMoments

__all__ = ["CCA", "Identity", "MatchedUnits", "Permute", "RuleName", "Zip"]

RuleName: TypeAlias = Literal["identity", "permute", "zip", "cca"]


@dataclass(frozen=True)
class Identity:
    """Merge unit j with unit j of every model, without data.

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Identity(), start_at=1)
    """

    name: ClassVar[RuleName] = "identity"


@dataclass(frozen=True, eq=False)
class MatchedUnits(ABC):
    """Base of the rules that match units by their activations on data.

    Attributes:
        data: a loader of inputs or (inputs, targets); read once. It is not read if no unit is merged.
        site: read activations after (``"post"``) or before (``"pre"``) the nonlinearity.
        forward: ``forward(model, batch)`` runs a model on a batch.

    Raises:
        ValueError: no data, or an option is out of range; the message names it.
        TypeError: ``data`` is not an iterable of batches, or ``forward`` is not callable.
    """

    name: ClassVar[RuleName]
    pairwise: ClassVar[bool] = False
    """Whether the rule compares the first model with each other one, instead of all models' units at once."""

    data: Iterable[Any] = field(repr=False)
    _: KW_ONLY
    site: Site = "post"
    forward: Forward = field(default=default_forward, repr=False)

    def __post_init__(self) -> None:
        if self.data is None:
            raise ValueError(f"data: needed by rule {self.name!r}, which matches activations")
        check_data(self.data)
        check_choice("site", self.site, Site)
        check_forward(self.forward)

    @abstractmethod
    def maps(self, moments: Sequence[CrossMoments], weights: Sequence[float]) -> UnitMaps:
        """Return the maps of one group.

        Args:
            moments: if ``pairwise``, those of the first model's activations with each other model's; otherwise one,
                of all models' activations side by side, (samples, N n), with themselves.
            weights: one per model, positive, of sum one.
        """


@dataclass(frozen=True, eq=False)
class Permute(MatchedUnits):
    """Permute the units of each model to those of the first, by the correlation of activations.

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Permute(loader), start_at=1)

    Attributes:
        data: a loader of inputs or (inputs, targets); read once.
        site: read activations after (``"post"``) or before (``"pre"``) the nonlinearity.
        forward: ``forward(model, batch)`` runs a model on a batch.
    """

    name: ClassVar[RuleName] = "permute"
    pairwise: ClassVar[bool] = True

    def maps(self, moments: Sequence[CrossMoments], weights: Sequence[float]) -> UnitMaps:
        """Return the maps of one group; see :meth:`MatchedUnits.maps`."""
        found = [best_permutation(m.similarity("correlation")) for m in moments]
        return cluster_maps(
            [torch.arange(len(found[0]), device="cpu"), *(perm.argsort() for perm in found)], weights
        )


@dataclass(frozen=True, eq=False)
class Zip(MatchedUnits):
    """Merge the most similar units, within a model too (ZipIt, Stoica et al. 2023).

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.Zip(loader), start_at=1)

    Attributes:
        data, site, forward: as for :class:`Permute`.
        a: the similarity of a merged unit to a third one is the smaller similarity of its parts, times this. None
            takes 0.3 for two models, as published, and 1 for more, where a merged pair must remain similar to the
            third model's unit.
        b: from 0 to 1; see :func:`fastmatch.merging.zip.zip_units`.
    """

    name: ClassVar[RuleName] = "zip"

    _: KW_ONLY
    a: float | None = None
    b: float = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a is not None:
            check_number("a", self.a, exclusive=True)
        check_fraction("b", self.b)

    def maps(self, moments: Sequence[CrossMoments], weights: Sequence[float]) -> UnitMaps:
        """Return the maps of one group; see :meth:`MatchedUnits.maps`."""
        (joint,) = moments
        count = len(weights)
        a = (0.3 if count == 2 else 1.0) if self.a is None else self.a
        similarity = _without_ties(joint.similarity("correlation"), count).cpu().numpy().astype(np.float32)
        columns = torch.from_numpy(zip_units(similarity, count, len(similarity) // count, a, self.b)[0])
        # Clones, because torch.export saves the whole storage of a tensor.
        return cluster_maps([part.clone() for part in columns.long().chunk(count)], weights)


@dataclass(frozen=True, eq=False)
class CCA(MatchedUnits):
    """Map each model into the first one's units along canonical directions (CCA-Merge, Horoi et al. 2024).

    With covariances S and the orthogonal factor Q of ``S_a^-1/2 S_ab S_b^-1/2``: ``R_b = S_a^1/2 Q S_b^-1/2``, and U_b
    is its inverse. Both are the identity for the first model. A batch norm after a layer keeps the first model's scale, and
    the other models' scales go through the layer: see :mod:`fastmatch.merging.mixed_norms`.

    Example:
        >>> found = fm.merge_partial([model_a, model_b], x, fm.CCA(loader, ridge=0.1), start_at=1)

    Attributes:
        data: a loader of inputs or (inputs, targets); read once.
        site: read activations after (``"post"``) or before (``"pre"``) the nonlinearity.
        forward: ``forward(model, batch)`` runs a model on a batch.
        ridge: added to the diagonal of each covariance, as a fraction of the mean variance, so that the scale of
            activations does not count.
        gamma: added to the diagonal as it is, instead of ``ridge``; 0.1 in the published CCA-Merge.
    """

    name: ClassVar[RuleName] = "cca"

    _: KW_ONLY
    ridge: float = RIDGE
    gamma: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("ridge", self.ridge)
        if self.gamma is not None:
            check_number("gamma", self.gamma, exclusive=True)
            if self.ridge != RIDGE:
                raise ValueError(
                    f"gamma: it replaces ridge, so give one of them; got {self.gamma} and {self.ridge}"
                )

    def maps(self, moments: Sequence[CrossMoments], weights: Sequence[float]) -> UnitMaps:
        """Return the maps of one group; see :meth:`MatchedUnits.maps`."""
        (joint,) = moments
        covariance = joint.similarity("covariance")
        n = len(covariance) // len(weights)
        root_a, inverse_a = roots(covariance[:n, :n], self.ridge, self.gamma)
        merge, unmerge = (
            [torch.eye(n, dtype=torch.float64, device="cpu")],
            [torch.eye(n, dtype=torch.float64, device="cpu")],
        )
        for k in range(1, len(weights)):
            own = slice(k * n, (k + 1) * n)
            root_b, inverse_b = roots(covariance[own, own], self.ridge, self.gamma)
            near = _pair_constants(covariance[:n, :n].diagonal(), covariance[own, own].diagonal())
            rotation = _orthogonal(inverse_a @ covariance[:n, own] @ inverse_b, near)
            merge.append((root_a @ rotation @ inverse_b).cpu())
            unmerge.append((root_b @ rotation.T @ inverse_a).cpu())
        return matrix_maps(merge, unmerge)


def _without_ties(similarity: torch.Tensor, count: int) -> torch.Tensor:
    """Return the similarity with ties broken such that a model zipped with itself does not change.

    Constant units count as similar across models; at similarity zero they would be merged with units that vary. Among
    equally similar units, those of the same index count as slightly more similar.
    """
    index = torch.arange(len(similarity), device=similarity.device)
    model, unit = index // (len(index) // count), index % (len(index) // count)
    other = model[:, None] != model
    constant = similarity.diagonal() == 0
    alike = similarity.masked_fill(constant[:, None] & constant & other, 1.0)
    return alike + 1e-6 * ((unit[:, None] == unit) & other)


def _pair_constants(variances_a: torch.Tensor, variances_b: torch.Tensor) -> torch.Tensor:
    """Return a permutation matrix that maps constant units to constant units, and keeps the index where it can.

    Units that a ReLU holds at zero have negative inputs. Those of a rotated pair may be positive; those of a permuted
    pair, averaged with another one's, are not.
    """
    constant = torch.stack([v <= 1e-12 * v.max() for v in (variances_a, variances_b)])
    alike = constant[0] == constant[1]
    rows = torch.arange(constant.shape[1], device=constant.device)
    columns = rows.clone()
    # Sorted, the constants of both come first, so that as many as possible meet.
    left_a, left_b = (rows[~alike][torch.argsort(~own[~alike], stable=True)] for own in constant)
    columns[left_a] = left_b
    found = torch.zeros(len(rows), len(rows), dtype=variances_a.dtype, device=constant.device)
    found[rows, columns] = 1
    return found


def _orthogonal(cross: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """Return the orthogonal matrix nearest to ``cross``; in its null space, the one nearest to ``near``."""
    left, values, right = torch.linalg.svd(cross)
    known = int((values > 1e-6 * values[:1].clamp(min=1e-300)).sum())
    left, rest_left, right, rest_right = left[:, :known], left[:, known:], right[:known], right[known:]
    u, _, v = torch.linalg.svd(rest_left.T @ near @ rest_right.T)
    return left @ right + rest_left @ u @ v @ rest_right
