"""Values of extreme or mixed size."""

from __future__ import annotations

import numpy as np

from bench.lib.families.family import Family, Generator, Maker


def scaled(factor: float) -> Maker:
    return lambda g, n, m: factor * g.standard_normal((n, m))


def mixed(decades: int) -> Maker:
    return lambda g, n, m: (
        g.standard_normal((n, m)) * 10.0 ** g.integers(-decades, decades, (n, m), endpoint=True)
    )


def one_outlier(g: Generator, n: int, m: int) -> np.ndarray:
    cost = g.random((n, m))
    cost[g.integers(n), g.integers(m)] = 1e10
    return cost


def outliers(g: Generator, n: int, m: int) -> np.ndarray:
    return np.where(g.random((n, m)) < 0.01, 1e6, 1.0) * g.random((n, m))


def offset(amount: float) -> Maker:
    return lambda g, n, m: amount + g.random((n, m))


def signed_zeros(g: Generator, n: int, m: int) -> np.ndarray:
    return np.where(g.random((n, m)) < 0.5, -0.0, 0.0) * g.integers(0, 2, (n, m))


FAMILIES = (
    Family("one outlier", "a broken measurement of 1e10", one_outlier, None),
    Family("outliers", "one broken measurement in a hundred", outliers),
    Family("large offset", "time stamps", offset(1e8), None, True),
    Family("large offset, negative", "time stamps before the epoch", offset(-1e8), None, True),
    Family("mixed scales", "units mixed up", mixed(6), None),
    Family("mixed scales, extreme", "units mixed up beyond float32", mixed(60), None, True),
    Family("tiny", "physical constants", scaled(1e-20), None),
    Family("huge", "physical constants, inverted", scaled(1e20), None),
    Family("below the smallest normal", "underflowed products",
           lambda g, n, m: g.integers(-40, 40, (n, m)) * 1.4e-45, None),
    Family("near the largest float", "overflowing sums", scaled(2e306), None, True),
    Family("signed zeros", "zeros after multiplication", signed_zeros, 1),
)  # fmt: skip
