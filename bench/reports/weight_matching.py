"""Weight matching against the published algorithm on the demo's trained MLPs: objective and time, same start and order.

Writes bench/results/weight_matching.json. Usage: python -m bench.reports.weight_matching [WIDTH]
"""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

import fastmatch as fm
from bench.lib.published import objective, weight_matching
from fastmatch.matching.weights import match_weights
from fastmatch.studies.demo import mlp
from fastmatch.studies.digits import digits, train

RESULTS = Path(__file__).parents[1] / "results"


def main(width: int = 1024, seed: int = 0, repeats: int = 3) -> None:
    data, _ = digits()
    models = []
    for k in range(2):
        torch.manual_seed(k)
        models.append(train(mlp(width), data, epochs=20, seed=k, lr=2e-3))
    spec = fm.PermutationSpec.trace(models[0], data.inputs[:2])
    a, b = (m.state_dict() for m in models)
    double = [{k: v.double().numpy() for k, v in s.items()} for s in (a, b)]

    begin = time.perf_counter()
    _, value = weight_matching(a, b, spec, seed)
    published_seconds = time.perf_counter() - begin
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        found = match_weights(a, b, spec, start=spec.identity(), seed=seed, progress=False)
        seconds.append(time.perf_counter() - begin)
    ours = objective(*double, spec, {k: np.asarray(v) for k, v in found.permutations.items()})
    record = {
        "network": f"MLP 64-{width}-{width}-{width}-10 trained on digits",
        "seed": seed,
        "published": {"objective": value, "seconds": round(published_seconds, 2)},
        "fastmatch": {
            "objective": ours,
            "seconds": round(statistics.median(seconds), 2),
            "sweeps": found.sweeps,
            "solves": found.solves,
            "skipped": found.skipped,
        },
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
    }
    assert ours >= value * (1 - 1e-9), (ours, value)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps(record, indent=1)
    (RESULTS / "weight_matching.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
