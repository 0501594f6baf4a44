"""The whole job in one call: trace, match, and hold the permutations ready to be applied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import torch
from torch import nn

from fastmatch.batches import Forward, default_forward
from fastmatch.files import load_permutations, save_permutations
from fastmatch.matching.activations import match_activations
from fastmatch.matching.weights import Matching, match_weights
from fastmatch.merge import with_state
from fastmatch.permute import apply_permutations, check_permutations, compose, invert
from fastmatch.spec import Permutations, PermutationSpec
from fastmatch.states import State, check_finite, check_same_architecture, check_spec, state_of
from fastmatch.verify import verify as verify_spec

__all__ = ["Alignment", "align"]


@dataclass(frozen=True)
class Alignment:
    """Permutations of one model's hidden units, with the spec that says where they apply.

    Attributes:
        permutations: group name -> LongTensor (size,); ``new_b[i] = b[perm[i]]``.
        spec: which axes move together.
        matching: how the permutations were found; None for loaded or composed ones.
    """

    permutations: Permutations
    spec: PermutationSpec
    matching: Matching | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutations", check_permutations(self.permutations, self.spec))

    @overload
    def apply(self, model: nn.Module) -> nn.Module: ...
    @overload
    def apply(self, model: State) -> dict[str, torch.Tensor]: ...
    def apply(self, model: nn.Module | State) -> nn.Module | dict[str, torch.Tensor]:
        """A new model (or state dict) with its units reordered; ``model`` is left as it was."""
        moved = apply_permutations(state_of(model, "model"), self.spec, self.permutations)
        return with_state(model, moved) if isinstance(model, nn.Module) else moved

    def invert(self) -> Alignment:
        """The alignment that undoes this one."""
        return Alignment(invert(self.permutations), self.spec)

    def compose(self, then: Alignment) -> Alignment:
        """One alignment equal to applying this one and then ``then``."""
        return Alignment(compose(self.permutations, then.permutations), self.spec)

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Writes permutations and spec as .safetensors; an existing file is replaced only with ``force``."""
        save_permutations(self.permutations, self.spec, path, force=force)

    @classmethod
    def load(cls, path: str | Path) -> Alignment:
        """What :meth:`save` wrote."""
        return cls(*load_permutations(path))


def align(
    model_a: nn.Module | State,
    model_b: nn.Module | State,
    example_inputs: Any = None,
    *,
    data: Iterable[Any] | None = None,
    spec: PermutationSpec | None = None,
    groups: list[str] | None = None,
    start: Mapping[str, torch.Tensor] | None = None,
    seed: int = 0,
    max_sweeps: int = 100,
    tolerance: float = 1e-12,
    include: str = "affine",
    similarity: str = "correlation",
    read: str = "after",
    several: str = "last",
    forward: Forward = default_forward,
    verify: bool = True,
    progress: bool | None = None,
) -> Alignment:
    """Finds which hidden unit of ``model_b`` is which of ``model_a``, by weights or, given data, by activations.

    Example:
        >>> alignment = fm.align(model_a, model_b, example_inputs=x)
        >>> model_b_aligned = alignment.apply(model_b)

    Args:
        model_a, model_b: modules of the same architecture, or state dicts (then ``spec`` is needed). A is
            the reference. Both are left as they are.
        example_inputs: what ``model_a`` is traced on: a tensor, or a tuple of positional inputs. Not needed
            with ``spec``, except to verify it.
        data: a loader of inputs or (inputs, targets); given one, activations are matched, in one read.
        spec: which axes move together, instead of tracing.
        groups: names of the groups to match; all where left out.
        start, seed, max_sweeps, tolerance, include: of weight matching, see
            :func:`fastmatch.matching.weights.match_weights`.
        similarity, read, several, forward: of activation matching, see
            :func:`fastmatch.matching.activations.match_activations`.
        verify: prove on ``example_inputs``, in float64, that the spec leaves ``model_b``'s function alone
            (two forward passes of a copy). State dicts cannot be run and are not verified.
        progress: show bars; None shows them on a terminal, for work of over a second.

    Returns:
        An :class:`Alignment`.

    Raises:
        ValueError: architectures differ (the first mismatch is named), weights hold NaN or infinity (the
            tensor is named), the spec changes the function (the group is named), the data yields nothing,
            or an argument is out of range.
        TypeError: something that is neither a module nor a state dict.
    """
    a, b = state_of(model_a, "model_a"), state_of(model_b, "model_b")
    check_same_architecture(a, b)
    check_finite(a, "model_a")
    check_finite(b, "model_b")
    if spec is None:
        if not isinstance(model_a, nn.Module):
            raise ValueError(
                "spec: state dicts cannot be traced; give a spec (PermutationSpec.trace(model, x))"
            )
        if example_inputs is None:
            raise ValueError(
                "example_inputs: needed to trace the structure of model_a; a batch of 2 is enough"
            )
        spec = PermutationSpec.trace(model_a, example_inputs)
    if groups is not None:
        spec = spec.select(groups)
    check_spec(spec, a, "model_a")
    if verify and example_inputs is not None and isinstance(model_b, nn.Module):
        verify_spec(model_b, spec, example_inputs)
    if data is None:
        matching = match_weights(
            a, b, spec, start=start, seed=seed, max_sweeps=max_sweeps, tolerance=tolerance,
            include=include, progress=progress,
        )  # fmt: skip
    else:
        if not isinstance(model_a, nn.Module) or not isinstance(model_b, nn.Module):
            raise TypeError("data: activation matching runs the models; give modules, not state dicts")
        if start is not None:
            raise ValueError("start: activation matching solves each group once and takes no start")
        matching = match_activations(
            model_a, model_b, spec, data, similarity=similarity, read=read, several=several,
            forward=forward, progress=progress,
        )  # fmt: skip
    return Alignment(matching.permutations, spec, matching)
