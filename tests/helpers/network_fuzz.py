"""Random networks traced, permuted and compared in numbers: ``python -m helpers.network_fuzz --seed S --count N``.

Two judges work apart from each other. One is the library's own ``verify``. The other draws new weights, new inputs and new
permutations, and calls a change what rounding is far from. What they say is sorted:

- *changed*: the permuted network is another function.
- *false alarm*: ``verify`` raises, and new weights show no change.
- *missed*: ``verify`` passes, and new weights show a change (counted as changed, too).
- *undecided*: ``verify`` finds no proof, because rounding alone makes the outputs jump, and new weights show no change.
"""

from __future__ import annotations

import argparse
import random
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.modules import copy_module
from fastmatch.permutations.disturb import RoundedSums
from fastmatch.permutations.precise import largest_difference
from helpers.random_networks import RandomNetwork

__all__ = ["Findings", "fuzz", "random_network"]

CHANGE = 1e-6
"""The relative difference of outputs in float64 that is no rounding, of a network that does not magnify it."""

NOISE = 1e4
"""How many times the change that rounding causes is another function."""

DRAWS = 16
"""How often rounding is drawn at most: it chooses the signs of vectors, but not another sign in every draw."""


@dataclass
class Findings:
    """What a run has found; every list holds (seed of the network, what was said)."""

    networks: int = 0
    groups: int = 0
    changed: list[tuple[int, str]] = field(default_factory=list)
    alarms: list[tuple[int, str]] = field(default_factory=list)
    missed: list[tuple[int, str]] = field(default_factory=list)
    undecided: list[tuple[int, str]] = field(default_factory=list)
    failed: list[tuple[int, str]] = field(default_factory=list)
    rules: Counter[str] = field(default_factory=Counter)


def random_network(seed: int, batch: int) -> tuple[RandomNetwork, tuple[torch.Tensor, ...]]:
    """Return a network whose layers are made, and inputs: one tensor or two."""
    torch.manual_seed(seed)
    x = tuple(torch.randn(batch, 12 - 4 * k, dtype=torch.float64) for k in range(1 + seed % 2))
    net = RandomNetwork(seed).eval()
    with torch.no_grad():
        net(*x)  # makes its layers
    return net, x


def change(net: nn.Module, spec: fm.PermutationSpec, x: tuple[torch.Tensor, ...], seed: int) -> float:
    """Return how much random permutations change a network with new weights on new inputs, relative to its output."""
    generator = torch.Generator().manual_seed(seed)
    other = copy_module(net)
    with torch.no_grad():
        for p in other.parameters():
            p.copy_(
                torch.randn(p.shape, generator=generator, dtype=p.dtype) / max(p.shape[-1:] or (1,)) ** 0.5
            )
    moved = fm.Alignment(spec.random(generator), spec).apply(other)
    inputs = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in x]
    with torch.no_grad():
        expected = [other(*inputs)]
        found = largest_difference(expected, [moved(*inputs)])
        if found <= CHANGE:
            return found
        with RoundedSums(torch.finfo(torch.float64).eps, generator):
            noise = (largest_difference(expected, [other(*inputs)]) for _ in range(DRAWS))
            return 0.0 if any(found < NOISE * each for each in noise) else found


def judge(seed: int, found: Findings) -> None:
    """Trace one network and add what the judges say of it."""
    try:
        net, x = random_network(seed, batch=5)
        spec = fm.PermutationSpec.trace(net, tuple(t[:2] for t in x), unread="ignore")
    except Exception as error:
        found.failed.append((seed, f"{type(error).__name__}: {error}"))
        return
    found.networks += 1
    found.groups += len(spec.groups)
    found.rules.update({p.reason for p in spec.pins if "rule failed" in p.reason})
    said = ""
    try:
        fm.verify(net, spec, x, seed=seed)
    except ValueError as error:
        said = str(error)
    differences = [change(net, spec, x, seed + k) for k in range(4 if said else 1)]
    if sum(d > CHANGE for d in differences) > len(differences) // 4:
        found.changed.append((seed, said or f"{max(differences):.2g}"))
        if not said:
            found.missed.append((seed, f"{max(differences):.2g}"))
    elif said:
        (found.undecided if "cannot be shown" in said else found.alarms).append((seed, said))


def fuzz(seed: int, count: int) -> Iterator[Findings]:
    """Judge ``count`` networks; yield the findings so far after each."""
    seeds, found = random.Random(seed), Findings()
    for _ in range(count):
        judge(seeds.randrange(2**31), found)
        yield found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--only", type=int, nargs="*", help="networks by their own seeds")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    begin, found = time.process_time(), Findings()
    if args.only:
        for each in args.only:
            judge(each, found)
    else:
        print(f"seed {args.seed}, {args.count} networks", flush=True)
        for number, found in enumerate(fuzz(args.seed, args.count), 1):
            if number % 250 == 0 or number == args.count:
                print(
                    f"{number}: {found.groups} groups, changed {found.changed}, false alarms {found.alarms}, "
                    f"missed {found.missed}, undecided {found.undecided}, failed {found.failed}, {time.process_time() - begin:.0f} s",
                    flush=True,
                )
    print(found)


if __name__ == "__main__":
    main()
