"""Weight matching against the published algorithm on the demo's trained MLPs: same start, same order, objective and time.

python -m bench.reports.weight_matching
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator

import numpy as np
import torch

import fastmatch as fm
from bench.lib import record
from bench.lib.published import objective, weight_matching
from fastmatch.matching.weights import WeightMatching
from fastmatch.studies.digits import digits, train
from fastmatch.studies.networks import mlp

NAME = "weight_matching"


def rows(width: int, seed: int, repeats: int) -> Iterator[record.Row]:
    data, _ = digits()
    models = []
    for k in range(2):
        torch.manual_seed(k)
        models.append(train(mlp(width), data, epochs=20, seed=k, lr=2e-3))
    spec = fm.PermutationSpec.trace(models[0], data.inputs[:2])
    a, b = (m.state_dict() for m in models)
    double = [{k: v.double().numpy() for k, v in s.items()} for s in (a, b)]

    begin = time.perf_counter()
    _, published = weight_matching(a, b, spec, seed)
    yield {
        "algorithm": "published",
        "objective": published,
        "seconds": round(time.perf_counter() - begin, 2),
    }
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = WeightMatching("identity", seed=seed).match(a, b, spec, progress=False)
        seconds.append(time.perf_counter() - begin)
    ours = objective(*double, spec, {k: np.asarray(v) for k, v in found.permutations.items()})
    assert ours >= published * (1 - 1e-9), (ours, published)
    yield {
        "algorithm": "fastmatch",
        "objective": ours,
        "seconds": round(statistics.median(seconds), 2),
        "sweeps": found.sweeps,
        "solves": found.solves,
        "skipped": found.skipped,
    }


def measure(options: argparse.Namespace) -> record.Record:
    width, seed = 64 if options.tiny else options.width, 0
    network = f"MLP 64-{width}-{width}-{width}-10 trained on digits"
    return record.record(rows(width, seed, repeats=3), network=network, seed=seed)


def page(found: record.Record) -> str:
    return record.page(
        "Weight matching against the published algorithm", NAME, found,
        f"{found['settings']['network']}, seed {found['settings']['seed']}. Both start at the identity and visit the groups in the "
        "same order.",
        record.table(found["rows"], ("algorithm", "objective", "seconds"), form=".4f"),
    )  # fmt: skip


main = record.script(NAME, __doc__, measure, page, width=(1024, "units of each hidden layer"))

if __name__ == "__main__":
    sys.exit(main())
