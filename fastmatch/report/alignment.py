"""The report of an alignment."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fastmatch._internal.batches import Forward, check_data, check_module
from fastmatch._internal.checks import check_integer
from fastmatch._internal.states import State, check_same_architecture, headers_of, state_of
from fastmatch._internal.stopwatch import Stopwatch
from fastmatch._internal.words import count_of, short
from fastmatch.evaluation.curve import Curve, interpolate
from fastmatch.permutations.alignment import Alignment
from fastmatch.report.content import LayerTable, Matrix, Tile
from fastmatch.report.data import has_targets
from fastmatch.report.measures import Pair, activation_pairs, layers_of, weight_pairs
from fastmatch.report.pictures import Chart, Line, chart, matrix_image
from fastmatch.report.report import Report
from fastmatch.report.structure import structure_of
from fastmatch.report.versions import versions
from fastmatch.spec.common import other_sizes

__all__ = ["alignment_report", "curve_charts", "curve_tiles"]

MOST_MATRICES = 6
"""Groups whose similarities are shown as images; of more, evenly spaced ones."""

BY_WEIGHTS = "Cosine of the weights of a unit of A and the unit of B beside it: 1 for equal directions, 0 for unrelated ones."
BY_ACTIVATIONS = (
    "Correlation of the activations, on the data, of a unit of A and the unit of B beside it: 1 for units that say the "
    "same, 0 for unrelated ones."
)


def alignment_report(
    alignment: Alignment,
    model_a: nn.Module | State,
    model_b: nn.Module | State,
    data: Iterable[Any] | None,
    *,
    names: Sequence[str],
    points: int,
    loss: Callable[[Any, Any], torch.Tensor] | None,
    forward: Forward,
) -> Report:
    """Return the report of an alignment; see :meth:`fastmatch.Alignment.report`, which has the defaults."""
    check_integer("points", points, least=3)
    if len(names) != 2:
        raise ValueError(f"names: expected two, of A and of B; got {len(names)}")
    a, b = _state(model_a, "model_a"), _state(model_b, "model_b")
    headers = headers_of(a), headers_of(b)
    unlike = other_sizes(alignment.spec, *headers)
    check_same_architecture(headers[0], {**headers[1], **{name: headers[0][name] for name in unlike}})
    own: dict[str, Any] = {} if loss is None else {"loss": loss}
    watch = Stopwatch()
    with watch("report: weights"):
        by_weights = weight_pairs(a, b, alignment)
    by_activations: dict[str, Pair] = {}
    curves: dict[str, Curve] = {}
    if data is not None:
        check_data(data, reads=2)
        check_module(model_a, "model_a")
        check_module(model_b, "model_b")
        assert isinstance(model_a, nn.Module)
        assert isinstance(model_b, nn.Module)
        with watch("report: activations"):
            by_activations = activation_pairs((model_a, model_b), alignment, data, forward, None)
        if has_targets(data) and not unlike:
            with watch("report: curves"):
                for word, other in (("before", model_b), ("after", alignment.apply(model_b))):
                    curves[word] = interpolate(model_a, other, data, points, forward=forward, **own)
    tables = []
    for title, caption, pairs in (
        ("How alike matched units respond", BY_ACTIVATIONS, by_activations),
        ("How alike the weights of matched units are", BY_WEIGHTS, by_weights),
    ):
        if pairs:
            rows = tuple(layers_of(alignment, pairs))
            lowest = min((v for r in rows for v in (r.before, r.low) if v is not None), default=0.0)
            tables.append(LayerTable(title, caption, rows, math.floor(10 * min(0.0, lowest)) / 10, 1.0))
    shown = by_activations or by_weights
    return Report(
        title="Alignment of two networks",
        subtitle=f"{names[1]} brought into the order of {names[0]}",
        sentences=tuple(_sentences(alignment, tables, curves, unlike)),
        tiles=(*curve_tiles(curves), *_tiles(alignment, tables)),
        charts=tuple(curve_charts(curves, names)),
        tables=tuple(tables),
        matrices=tuple(_matrices(shown)),
        matrices_caption=("Correlations of activations." if by_activations else "Cosines of weights.")
        + " Rows are units of A, columns units of B, in the order of A. A good match is a diagonal.",
        structure=structure_of(alignment.spec),
        seconds={**alignment.seconds, **watch.seconds},
        recipe=_recipe(alignment, names),
    )


def _state(model: nn.Module | State, argument: str) -> State:
    """The named tensors of a model; a mapping that is not a dict may read them from disk, so none is asked for yet."""
    return model if isinstance(model, Mapping) and not isinstance(model, dict) else state_of(model, argument)


def _mean(table: LayerTable, which: str) -> float:
    """The mean over all units of the table's groups; a table has at least one that was measured."""
    found = [(getattr(row, which), row.units) for row in table.rows if getattr(row, which) is not None]
    return sum(v * n for v, n in found) / sum(n for _, n in found)


def _counts(alignment: Alignment) -> tuple[int, int]:
    return alignment.moved, sum(map(len, alignment.permutations.values()))


def _sentences(
    alignment: Alignment, tables: list[LayerTable], curves: dict[str, Curve], unlike: list[str]
) -> list[str]:
    texts = []
    if curves:
        before, after = curves["before"].barrier, curves["after"].barrier
        line = "The loss barrier on the line between the networks"
        if math.isfinite(before) and math.isfinite(after):
            change = (
                f"falls from {before:.3g} to {after:.3g}"
                if after < before
                else f"rises from {before:.3g} to {after:.3g}"
            )
            texts.append(f"{line} {change if after != before else f'stays at {after:.3g}'}.")
        else:
            texts.append(f"{line} is not finite: {before:.3g} before, {after:.3g} after.")
    elif tables:
        before, after = _mean(tables[0], "before"), _mean(tables[0], "after")
        texts.append(f"The mean similarity of matched units goes from {short(before)} to {short(after)}.")
        if not unlike:
            texts.append("Labelled data would show what that does to the loss between the networks.")
    if unlike:
        texts.append(
            f"Of another size in B, so not compared, and there is no line between the networks: {', '.join(unlike)}."
        )
    moved, total = _counts(alignment)
    groups = count_of(len(alignment.permutations), "group")
    texts.append(f"{moved:,} of {count_of(total, 'unit')} in {groups} change their place.")
    if alignment.proof is not None:
        texts.append("The function of the reordered network is the same: runs on examples agreed.")
    else:
        texts.append("That its function stays the same was not proved.")
    matching = alignment.matching
    if matching is not None and not matching.converged:
        texts.append("The matcher stopped before it converged: more sweeps can find a better match.")
    return texts


def curve_tiles(curves: Mapping[str, Curve]) -> list[Tile]:
    """Return what the curves say first: the barrier and the accuracy at the middle, before and after."""
    if not curves:
        return []
    before, after = curves["before"], curves["after"]
    better = "good" if after.barrier < before.barrier else ""
    tiles = [
        Tile(
            "Loss barrier",
            f"{after.barrier:.3g}",
            f"{before.barrier:.3g}",
            "half the difference of the ends: no merge on the line has a higher loss than both"
            if after.has_no_rise
            else "lower is better",
            better,
        )
    ]
    if after.accuracy:
        ends = (after.accuracy[0] + after.accuracy[-1]) / 2
        value, was = (f"{100 * curve.midpoint[1]:.1f}%" for curve in (after, before))
        tiles.append(
            Tile("Accuracy of the average", value, was, f"the networks themselves: {100 * ends:.1f}%")
        )
    return tiles


def _tiles(alignment: Alignment, tables: list[LayerTable]) -> list[Tile]:
    moved, total = _counts(alignment)
    tiles = []
    if tables:
        before, after = _mean(tables[0], "before"), _mean(tables[0], "after")
        what = "correlation of activations" if len(tables) > 1 else "cosine of weights"
        tiles.append(Tile("Similarity of matched units", short(after), short(before), what))
    share = f"{100 * moved / total:.0f}%" if total else "none"
    tiles.append(
        Tile(
            "Units moved",
            share,
            note=f"{moved:,} of {total:,}, in {count_of(len(alignment.permutations), 'group')}",
        )
    )
    proof = alignment.proof
    if proof is None:
        tiles.append(Tile("Function of B", "not proved", note="the networks were not run"))
    else:
        kind = str(proof.dtype).removeprefix("torch.")
        note = f"largest difference {proof.error:.1g} of the largest output, in {kind}"
        tiles.append(Tile("Function of B", "unchanged", note=note, mood="good"))
    gaps = {} if alignment.matching is None else alignment.matching.gaps
    if gaps:
        proved = sum(gap <= bound for gap, bound in gaps.values())
        mood = "good" if proved == len(gaps) else "bad"
        note = "each group's assignment, the others held"
        tiles.append(
            Tile("Proved optimal", f"{proved} of {count_of(len(gaps), 'group')}", note=note, mood=mood)
        )
    return tiles


def curve_charts(curves: Mapping[str, Curve], names: Sequence[str]) -> list[Chart]:
    """Return the charts of loss and accuracy along the line, before and after."""
    if not curves:
        return []
    ends = f"0 is {names[0]}, 1 is {names[1]}"
    charts = []
    losses = [
        Line(f"{word}: barrier {c.barrier:.3g}", word, tuple(zip(c.positions, c.loss, strict=True)))  # type: ignore[arg-type]
        for word, c in curves.items()
    ]
    charts.append(chart("Loss", ends, losses, include=(0.0,)))
    if all(c.accuracy for c in curves.values()):
        accuracies = [
            Line(
                f"{word}: largest drop {100 * c.accuracy_barrier:.1f} points", word,  # type: ignore[arg-type]
                tuple((p, 100 * v) for p, v in zip(c.positions, c.accuracy, strict=True)),
            )
            for word, c in curves.items()
        ]  # fmt: skip
        charts.append(chart("Accuracy, %", ends, accuracies))
    return charts


def _matrices(pairs: dict[str, Pair]) -> list[Matrix]:
    """Return images of the similarities of some groups, evenly spaced over the depth of the network."""
    found = [(name, pair) for name, pair in pairs.items() if pair.blocks is not None and len(pair.after) > 1]
    count = min(len(found), MOST_MATRICES)
    chosen = [found[k * len(found) // count] for k in range(count)]
    images = []
    for name, pair in chosen:
        assert pair.blocks is not None
        shown, size = len(pair.blocks[0]), len(pair.after)
        note = f"{size:,} units" if shown == size else f"{shown} of {size:,} units"
        images.append(Matrix(name, note, *map(matrix_image, pair.blocks)))
    return images


def _recipe(alignment: Alignment, names: Sequence[str]) -> dict[str, str]:
    recipe = {"A": names[0], "B": names[1]}
    if alignment.method:
        recipe["matcher"] = alignment.method
    matching = alignment.matching
    if matching is not None:
        first, last = matching.objective[0], matching.objective[-1]
        recipe["objective"] = f"{first:.6g} → {last:.6g} ({matching.matcher}, {matching.outcome})"
        recipe["work"] = f"{count_of(matching.sweeps, 'sweep')}, {count_of(matching.solves, 'assignment')}"
    return {**recipe, **versions()}
