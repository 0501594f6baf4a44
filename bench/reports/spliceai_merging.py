"""Merges of five residual networks that others trained: every pair and all five, correlated with the ensemble.

    pip install --no-deps spliceai h5py
    python -m bench.reports.spliceai_merging

The weights are read from the installed package; see bench/lib/splice_networks.py.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import combinations
from statistics import fmean

import torch
from torch import nn

import fastmatch as fm
from bench.lib import record
from bench.lib.splice_networks import CONTEXT, SpliceNetwork, pretrained, sequences
from fastmatch.studies.digits import Batches

NAME = "spliceai_merging"
OUTPUTS = 4000
"""Bases with an output in each sequence."""
CALIBRATION, TEST = 4, 4
"""Sequences; they are drawn with different seeds, so none is in both."""
RENORMALIZATIONS = {
    "none": None,
    "reset": fm.Renormalization("reset"),
    "repair": fm.Renormalization("repair"),
    "least squares": fm.Renormalization("least-squares", mode="sequential"),
}
MATCHERS = ("naive", "weights", "activations")
TRACED_CONTEXT = 20


def specification() -> fm.PermutationSpec:
    """Trace the network, and prove the groups in float64, on a short sequence: the axes are those of any length."""
    net = SpliceNetwork(TRACED_CONTEXT).eval()
    x = sequences(1, 2 * TRACED_CONTEXT + 60, seed=0)
    return fm.align(net, net, x, progress=False).spec


def answers(models: Sequence[nn.Module], test: torch.Tensor) -> torch.Tensor:
    """Return the mean probabilities of the models, (B, 2, L): acceptor and donor."""
    with torch.no_grad():
        parts = [torch.stack([model(x[None]).softmax(1)[0, 1:] for x in test]) for model in models]
    return torch.stack(parts).mean(0)


def correlations(found: torch.Tensor, whole: torch.Tensor) -> dict[str, float]:
    """Return Pearson's correlation of probabilities, which few sites dominate, and of their logarithms, over all bases."""

    def pearson(a: torch.Tensor, b: torch.Tensor) -> float:
        return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]).double())[0, 1])

    tiny = torch.finfo(found.dtype).tiny
    return {
        "correlation": pearson(found, whole),
        "of logarithms": pearson(found.clamp_min(tiny).log(), whole.clamp_min(tiny).log()),
    }


def aligned(
    models: Sequence[nn.Module], matched: str, spec: fm.PermutationSpec, calibration: Batches
) -> list[nn.Module]:
    """Return the models in the order of the first."""
    if matched == "naive":
        return list(models)
    by_activations = fm.ToReference(fm.ActivationMatching(calibration, reduce="sum"))
    strategy = fm.MergeMany() if matched == "weights" else by_activations
    found = fm.align_many(models, spec=spec, strategy=strategy, verify=False, progress=False)
    return [alignment.apply(model) for alignment, model in zip(found, models, strict=True)]


def rows(
    pairs: int,
    outputs: int,
    sequences_of: tuple[int, int],
    matchers: Sequence[str],
    renormalized: Sequence[str] = tuple(RENORMALIZATIONS),
) -> Iterator[record.Row]:
    """One row for every network and ensemble, then for every merge and renormalization."""
    networks = pretrained()
    length = 2 * CONTEXT + outputs
    drawn, test = (sequences(n, length, seed=seed) for seed, n in enumerate(sequences_of, start=1))
    calibration = Batches(drawn, torch.zeros(len(drawn)), 2)
    spec = specification()
    whole = answers(networks, test)
    for k, network in enumerate(networks, start=1):
        yield row("one network", str(k), "-", "-", correlations(answers([network], test), whole))
    groups = [tuple(range(5)), *list(combinations(range(5), 2))[:pairs]]
    for group in groups:
        chosen = [networks[k] for k in group]
        what, names = ("pair" if len(group) == 2 else "all five"), "+".join(str(k + 1) for k in group)
        if len(group) == 2:
            yield row("ensemble of a pair", names, "-", "-", correlations(answers(chosen, test), whole))
        for matched in matchers:
            began = time.perf_counter()
            models = aligned(chosen, matched, spec, calibration)
            merged = fm.merge(models)
            seconds = time.perf_counter() - began
            for name in renormalized:
                model, method = merged, RENORMALIZATIONS[name]
                if method is not None:
                    ends = None if method.method == "reset" else models
                    model = fm.renormalize(merged, ends, calibration, method, progress=False)
                yield {
                    **row(what, names, matched, name, correlations(answers([model], test), whole)),
                    "match seconds": seconds,
                }


def row(what: str, networks: str, matched: str, method: str, found: dict[str, float]) -> record.Row:
    return {"what": what, "networks": networks, "matched": matched, "renormalized": method, **found}


def table(found: record.Record) -> str:
    """Return the means, and the range over pairs, as a Markdown table."""
    lines = [
        "| what | matched | renormalized | correlation | lowest to highest | of logarithms |",
        "|---|---|---|---|---|---|",
    ]
    keys = ("what", "matched", "renormalized")
    for key in dict.fromkeys(tuple(r[k] for k in keys) for r in found["rows"]):
        own = [r for r in found["rows"] if tuple(r[k] for k in keys) == key]
        values = [r["correlation"] for r in own]
        span = f"{min(values):.3f} to {max(values):.3f}" if len(own) > 1 else ""
        what = f"{key[0]}, mean of {len(own)}" if len(own) > 1 else key[0]
        lines.append(
            f"| {what} | {key[1]} | {key[2]} | {fmean(values):.3f} | {span} | "
            f"{fmean(r['of logarithms'] for r in own):.3f} |"
        )
    return "\n".join(lines)


def page(found: record.Record) -> str:
    settings = found["settings"]
    intro = (
        "Five residual networks with batch norm (32 convolutions of 32 channels) that others trained independently: SpliceAI, "
        "Jaganathan et al. 2019. Each predicts splice sites; the ensemble of the five is what its users run. A merge is judged by the "
        "correlation of its probabilities with the ensemble's over all bases, so 1.000 is the ensemble. One network is part of the "
        "ensemble, which raises its own figure.\n\n"
        f"**The sequences are made up**: {settings['calibration']} to calibrate and {settings['test']} others to test, "
        f"{settings['outputs']:,} bases with an output each, drawn with base, length and signal statistics of human genes. No genome was "
        f"read. {settings['pairs']} of the 10 pairs. `weights` is `MergeMany()`, which for two networks is weight matching; "
        '`activations` is `ToReference(ActivationMatching(data, reduce="sum"))`.'
    )
    if any(r["renormalized"] == "least squares" for r in found["rows"]):
        intro += " `least squares` is sequential."
    return record.page(
        "Five networks that others trained", NAME, found, intro, table(found), every_pair(found)
    )


def every_pair(found: record.Record) -> str:
    """Return a table of every pair's best merges."""
    pairs = [r for r in found["rows"] if r["what"] == "pair" and r["matched"] == "activations"]
    methods = list(dict.fromkeys(r["renormalized"] for r in pairs))
    lines = [
        "## Every pair, matched by activations",
        "",
        f"| networks | {' | '.join(methods)} |",
        "|---" * (1 + len(methods)) + "|",
    ]
    for names in dict.fromkeys(r["networks"] for r in pairs):
        own = {r["renormalized"]: r["correlation"] for r in pairs if r["networks"] == names}
        lines.append(f"| {names} | " + " | ".join(f"{own[m]:.3f}" for m in methods) + " |")
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> record.Record:
    pairs, outputs, counts, matchers = options.pairs, OUTPUTS, (CALIBRATION, TEST), MATCHERS
    if options.tiny:
        pairs, outputs, counts, matchers = 1, 100, (1, 1), ("weights",)
    return record.record(
        rows(pairs, outputs, counts, matchers), packages=("spliceai", "h5py"), pairs=pairs, outputs=outputs,
        calibration=counts[0], test=counts[1],
    )  # fmt: skip


main = record.script(NAME, __doc__, measure, page, pairs=(10, "pairs of networks, of ten"))

if __name__ == "__main__":
    sys.exit(main())
