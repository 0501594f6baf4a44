"""Writes docs/architectures.md: ``PYTHONPATH=tests python -m helpers.architectures``."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from fastmatch.spec import PermutationSpec
from helpers.families import FAMILIES, GAPS, KINDS, UNMOVED, Family, kinds_of, missing, sites_of

PAGE = Path(__file__).parents[2] / "docs/architectures.md"
COLUMNS = {
    "hidden": "hidden units", "residual": "residual streams", "heads": "heads", "KV groups": "KV groups",
    "query heads": "query heads", "head channels": "channels of heads", "query-key channels": "channels of queries",
    "experts": "experts", "latent": "latents", "other": "other",
}  # fmt: skip

TEXT = """# Traced architectures

What tracing finds in the model families that people merge. Each row is a small model of
[transformers](https://github.com/huggingface/transformers) with random weights in float64; `tests/helpers/families.py` has
their sizes. `tests/spec/test_architectures.py` permutes every group of each model at random and compares the outputs on new
inputs (they differ by at most 1e-9 of the largest). `PYTHONPATH=tests python -m helpers.architectures` writes this page
from the same traces. [Another table](../bench/results/transformers_families.md) has every family of transformers that a small
config builds.

## Groups

The number of groups of each kind, in models with two layers per stack (or two stages of two blocks).

| entry | meaning |
| --- | --- |
| blank | the architecture has no such units |
| – | the architecture holds them in place |
| **gap** | they could move, but tracing does not find them |
| *part* | they are found in some layers only |

*Hidden units* are those of MLPs, experts, convolution blocks and state-space mixers. *Channels of heads* are those of values
and output projections inside a head. *Channels of queries* are those inside a head that only queries and keys share. *Latents*
are the ranks of low-rank projections and the states of Mamba. *Other* are first and last convolutions. A parameter counts as
moved if any of its axes moves. The last column says how many of the groups are also found with attention as
`scaled_dot_product_attention`, where the class has it.
"""

HELD = """
## Held by the architecture

"""

MISSED = """
## Gaps

Units that could move, and the operation that holds them.

"""

PINS = """
## Pinned axes

How many axes of parameters no group moves, by the operation that pins them. Vocabularies, classes and inputs are the
interface of a network. A *constant* is a table that the model computes, such as rotary frequencies or a mask. Positions
of convolution kernels are omitted.

"""


def traced(family: Family, attention: str) -> tuple[nn.Module, PermutationSpec]:
    model = family.build(0, attention)
    return model, PermutationSpec.trace(model, (), kwargs=family.inputs(torch.Generator().manual_seed(0)))


def share_moved(model: nn.Module, spec: PermutationSpec) -> float:
    """The share of a model's parameters in tensors of which some axis moves."""
    parameters = dict(model.named_parameters())
    moved = sum(p.numel() for name, p in parameters.items() if spec.axes_of(name))
    return moved / sum(p.numel() for p in parameters.values())


def cells(family: Family, spec: PermutationSpec) -> list[str]:
    """The number of groups of every kind, or why there is none."""
    counts = Counter(kinds_of(family, spec).values())
    sites, lacking = sites_of(family, spec), missing(family, spec)
    row = []
    for kind in [*KINDS, "other"]:
        text = str(counts[kind]) if counts[kind] else ""
        if (family.name, kind) in UNMOVED:
            text = "–"
        elif lacking.get(kind):
            text = f"{text} *part*" if len(lacking[kind]) < len(sites[kind]) else "**gap**"
        row.append(text)
    return row


def fused(family: Family, spec: PermutationSpec) -> str:
    """How many groups of ordinary attention are groups of the fused one as well."""
    if "sdpa" not in family.attentions:
        return ""
    same = {frozenset(g.axes) for g in traced(family, "sdpa")[1].groups.values()}
    found = sum(frozenset(g.axes) in same for g in spec.groups.values())
    return "all" if found == len(spec.groups) == len(same) else f"{found} of {len(spec.groups)}"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def reasons(listed: dict[tuple[str, str], str]) -> str:
    """A table of (family, kind) -> reason with the families of one reason and kind together."""
    together: dict[tuple[str, str], list[str]] = {}
    for (name, kind), reason in listed.items():
        together.setdefault((COLUMNS[kind], reason), []).append(name)
    return table(
        ["kind", "held by", "families"],
        [[kind, reason, ", ".join(names)] for (kind, reason), names in together.items()],
    )


def page() -> str:
    """The whole page."""
    groups, pins = [], []
    fewer = False
    for family in FAMILIES:
        model, spec = traced(family, "eager")
        other = fused(family, spec)
        fewer = fewer or " of " in other
        share = f"{100 * share_moved(model, spec):.1f} %"
        groups.append([family.name, *cells(family, spec), share, other])
        count = Counter(pin.reason for pin in spec.pins)
        pins.append([family.name, ", ".join(f"{reason} {n}" for reason, n in sorted(count.items()))])
    header = ["family", *(COLUMNS[kind] for kind in [*KINDS, "other"]), "parameters moved", "fused attention"]
    text = TEXT + "\n" + table(header, groups) + HELD + reasons(UNMOVED) + MISSED + reasons(GAPS)
    return text + PINS + table(["family", "axes pinned by"], pins)


def shares(text: str) -> dict[str, float]:
    """Return the share moved of each family on a page, in percent."""
    rows = re.findall(r"^\| ([^|]+?) \|.*\| ([0-9.]+) % \|[^|]*\|$", text, re.MULTILINE)
    return {name: float(share) for name, share in rows}


def fallen(old: str, new: str) -> list[str]:
    """Return the families of which a new page moves less than the old one, or nothing."""
    found = shares(new)
    return [
        f"{name}: {share} %, now {found.get(name, 0)} %"
        for name, share in shares(old).items()
        if found.get(name, 0) < share
    ]


if __name__ == "__main__":
    new = page()
    if less := fallen(PAGE.read_text(), new):
        raise SystemExit(f"less moves than before, so the page is not written: {'; '.join(less)}")
    PAGE.write_text(new)
