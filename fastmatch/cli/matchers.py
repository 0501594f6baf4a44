"""The matcher that the options of a command describe."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any, get_args

from fastmatch._internal.allowed import Init
from fastmatch._internal.batches import default_forward
from fastmatch._internal.callables import loader_from
from fastmatch.cli.loading import function_from
from fastmatch.cli.options import MATCHER_OPTIONS, PARTS, check_matcher
from fastmatch.matching.activations import ActivationMatching
from fastmatch.matching.fisher import FisherMatching
from fastmatch.matching.matcher import Matcher
from fastmatch.matching.mixture import Mixture
from fastmatch.matching.straight_through import StraightThrough
from fastmatch.matching.weights import WeightMatching
from fastmatch.permutations.alignment import Alignment

__all__ = ["matcher_from"]


def matcher_from(args: argparse.Namespace) -> Matcher:
    """Build the matcher that the options describe.

    Raises:
        ValueError: the matcher does not take an option that was given, or it needs data and none is given.
        TypeError: the data is not a loader.
    """
    check_matcher(args)
    word = args.matcher or "weights"
    values: dict[str, dict[str, Any]] = {part: {} for part in PARTS[word]}
    for option in MATCHER_OPTIONS:
        value = getattr(args, option.field)
        if value is not None:
            values[option.owner][option.field] = value
    init = values.get("WeightMatching", {}).get("init")
    if init is not None and init not in get_args(Init):
        values["WeightMatching"]["init"] = Alignment.load(init).permutations
    own = values.get("ActivationMatching", {})
    if "forward" in own:
        own["forward"] = function_from(own["forward"], "--forward", default_forward)
    data = [] if args.data is None else loader_from(args.data, "--data")
    return _build(word, values, data)


def _build(word: str, values: dict[str, dict[str, Any]], data: Iterable[Any]) -> Matcher:
    """Build a matcher from the values of its fields and of those of its parts."""
    by_weights = WeightMatching(**values.get("WeightMatching", {}))
    if word == "weights":
        return by_weights
    if word == "fisher":
        return FisherMatching(data, by_weights)
    if word == "straight-through":
        return StraightThrough(data, projection=by_weights, **values["StraightThrough"])
    by_activations = ActivationMatching(data, **values["ActivationMatching"])
    if word == "activations":
        return by_activations
    return Mixture(by_weights, by_activations, **values["Mixture"])
