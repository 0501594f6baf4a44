"""The plan of a renormalization: the method and its reason, the layers, and what is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from torch import nn

from fastmatch.renorm.layers import survey
from fastmatch.renorm.norms import batch_norms
from fastmatch.renorm.options import Method, Renormalization, renormalization_of
from fastmatch.renorm.outputs import Disagreement
from fastmatch.renorm.published import published_layers

__all__ = [
    "Plan",
    "Treatment",
    "applied_plan",
    "candidates",
    "new_biases",
    "plan_renormalization",
    "remember_plan",
    "tries_least_squares",
]

Treatment: TypeAlias = Method | Literal["none"]
"""A method, or ``"none"``: the merge is left as it is."""

_NOTE = "fastmatch_renormalization"


@dataclass(frozen=True)
class Plan:
    """What a renormalization will do, or what it did (:func:`fastmatch.applied_plan`).

    Example:
        >>> plan = fm.plan_renormalization(model_a, "repair")
        >>> plan.method
        'repair'

    Attributes:
        method: ``"repair"``, ``"rescale"``, ``"reshift"``, ``"reset"`` or ``"least-squares"``; ``"none"`` if the automatic choice left the
            merge as it is; ``"auto"`` if the choice is still to be made, because it is measured on the data.
        why: the reason for the method.
        layers: names of the layers to renormalize (of the batch norms for ``"reset"``).
        left_alone: module name -> the reason why it is left alone.
        kept: layer -> the channels that kept gain one because theirs would have done harm, such as those whose weights
            are all pruned. Known after the calibration.
        scores: method -> how its outputs differ from the endpoints', if the automatic choice compared methods:
            (fraction of samples with another class or None without classes, one minus the mean cosine, relative squared error). That of least
            squares is on samples that it was not fitted to.
        added: names of the biases that layers without one have got; a network needs them to load the result. Known after the
            calibration.
    """

    method: Treatment
    why: str
    layers: tuple[str, ...]
    left_alone: dict[str, str] = field(hash=False)
    kept: dict[str, tuple[int, ...]] = field(default_factory=dict, hash=False)
    scores: dict[Treatment, Disagreement] = field(default_factory=dict, hash=False)
    added: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The plan as text: the method, the reason, a line per module left alone and per layer with channels kept, and new biases."""
        lines = [f"{self.method}: {self.why}; {len(self.layers)} layers"]
        lines += [f"  left alone: {name}: {reason}" for name, reason in self.left_alone.items()]
        for name, channels in self.kept.items():
            first = ", ".join(map(str, channels[:8])) + (", ..." if len(channels) > 8 else "")
            lines.append(f"  gain one in {name}: {len(channels)} channels ({first}); a gain would do harm")
        if self.added:
            lines.append(f"  {new_biases(self.added)}")
        return "\n".join(lines)


def candidates(model: nn.Module, options: Renormalization) -> tuple[Treatment, ...]:
    """Return the methods to try: the one that is asked for, or what ``"auto"`` chooses from, the preferred one first.

    ``"reset"`` is one of them for batch norm, unless an option is given that it does not use. Least squares is tried after them.
    """
    if options.method != "auto":
        return (options.method,)
    unused_by_reset = options.layers is not None or options.target != "weighted" or options.std_factor != 1.0
    if batch_norms(model) and not unused_by_reset:
        return ("repair", "reset", "rescale", "none")
    return ("repair", "rescale", "none")


def tries_least_squares(options: Renormalization) -> bool:
    """Return whether ``"auto"`` tries least squares too, which has no target statistics that could be mixed or multiplied."""
    return options.target == "weighted" and options.std_factor == 1.0


def plan_renormalization(model: nn.Module, method: Method | Renormalization = "auto") -> Plan:
    """Return what :func:`fastmatch.renormalize` would do to ``model``. Nothing is run or changed.

    The automatic choice is measured: :func:`fastmatch.renormalize` calibrates each candidate on the data and keeps the one
    whose outputs are nearest to the endpoints'. If the endpoints are models, not statistics, it also tries least squares. Until then,
    the plan's method is ``"auto"``.

    Example:
        >>> plan = fm.plan_renormalization(model_a)
        >>> text = str(plan)  # such as "auto: the best of repair, rescale, none, least-squares on the data; 8 layers"

    Args:
        model: the merged or pruned model.
        method: a method's word, or a :class:`fastmatch.Renormalization`.

    Raises:
        ValueError: an unknown method, ``"reset"`` for a model without batch norm, a layer that cannot be renormalized,
            or no layer at all.
    """
    options = renormalization_of(method)
    if options.method == "reset":
        norms = batch_norms(model)
        if not norms:
            raise ValueError(
                'model: method "reset" needs batch norm with running statistics, and there is none; '
                'use "repair" or "rescale"'
            )
        return Plan("reset", "as asked", tuple(norms), {})
    layers = published_layers(model) if options.layers == "published" else options.layers
    found, left = survey(model, layers)
    why = "as asked"
    if options.method == "auto":
        tried = [*candidates(model, options), *(["least-squares"] if tries_least_squares(options) else [])]
        why = f"the best of {', '.join(tried)} on the data"
    return Plan(options.method, why, tuple(found), left)


def remember_plan(model: nn.Module, merged: nn.Module, plan: Plan, kept: Mapping[str, torch.Tensor]) -> None:
    """Note on a renormalized module what was done to it; copies keep the note.

    Args:
        merged: the module before it was renormalized.
        kept: layer -> (C,) True for the channels that kept gain one. They come to the host when somebody asks for them.
    """
    known = {name for name, _ in merged.named_parameters(remove_duplicate=False)}
    names = (name for name, _ in model.named_parameters(remove_duplicate=False))
    plan = replace(plan, added=tuple(name for name in names if name not in known))
    model.__dict__[_NOTE] = (plan, dict(kept))


def applied_plan(model: nn.Module) -> Plan | None:
    """Return what :func:`fastmatch.renormalize` did to a module, or None for a module that it did not make.

    Example:
        >>> merged = fm.merge([model_a, model_b])
        >>> plan = fm.applied_plan(fm.renormalize(merged, [model_a, model_b], loader))
        >>> reason, scores = plan.why, plan.scores

    Args:
        model: a module. Copies and pickles keep the plan; the state dict does not hold it.
    """
    if _NOTE not in model.__dict__:
        return None
    plan, kept = model.__dict__[_NOTE]
    channels = {name: tuple(mask.cpu().nonzero()[:, 0].tolist()) for name, mask in kept.items()}
    return replace(plan, kept={name: found for name, found in channels.items() if found})


def new_biases(names: Sequence[str]) -> str:
    """Return what a user is told of biases that a renormalization has added to layers without one."""
    return f"new: {', '.join(names)}; a network needs these biases to load the result (rescale and reset add none)"
