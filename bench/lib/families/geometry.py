"""Distances between points, codes and boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
from scipy.spatial.distance import cdist

from bench.lib.families.family import Family, Generator, Maker, repeated

Points = Callable[[Generator, int], np.ndarray]
Metric = Literal["euclidean", "sqeuclidean", "cityblock", "chebyshev"]


def cube(dimensions: int) -> Points:
    return lambda g, k: g.random((k, dimensions))


def cloud(dimensions: int) -> Points:
    return lambda g, k: g.standard_normal((k, dimensions))


def distances(points: Points, metric: Metric) -> Maker:
    """Distances between two independent sets."""
    return lambda g, n, m: cdist(points(g, n), points(g, m), metric)


def lattice(g: Generator, k: int) -> np.ndarray:
    """The first k points of a square grid."""
    side = int(np.ceil(np.sqrt(k)))
    return np.stack(np.divmod(np.arange(k), max(side, 1)), 1).astype(np.float64)


def lattices(shifted: bool) -> Maker:
    """L1 distances of a grid to a grid twice as wide (every other point), or to random points of the grid."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        rows = lattice(g, n)
        columns = 2 * lattice(g, m) if shifted else g.integers(0, int(np.sqrt(m)) + 1, (m, 2)).astype(float)
        return cdist(rows, columns, "cityblock")

    return make


def grid(g: Generator, n: int, m: int) -> np.ndarray:
    """Euclidean distances of random points of the plane to a grid."""
    side = np.sqrt(m)
    return cdist(side * g.random((n, 2)), lattice(g, m))


def clusters(rows: bool, columns: bool) -> Maker:
    """Squared distances of 16 dimensions; repeated sides have ten different points."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        centres = g.standard_normal((10, 16))
        a = g.standard_normal((10, 16))[repeated(g, 10, n)] if rows else g.standard_normal((n, 16))
        b = centres[repeated(g, 10, m)] if columns else g.standard_normal((m, 16))
        return cdist(a, b, "sqeuclidean")

    return make


def blobs(g: Generator, n: int, m: int) -> np.ndarray:
    """Points around twenty centres, more of one set than of the other around each."""
    centres = g.random((20, 2))
    sides = [centres[g.choice(20, k, p=g.dirichlet(np.ones(20)))] for k in (n, m)]
    a, b = (x + 0.01 * g.standard_normal(x.shape) for x in sides)
    return cdist(a, b)


def moved(dimensions: int, noise: float) -> Maker:
    """A set and its noisy, shuffled copy."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        points = g.random((max(n, m), dimensions))
        copy = points + noise * g.standard_normal(points.shape)
        return cdist(points[:n], copy[g.permutation(len(copy))[:m]])

    return make


def circle(g: Generator, n: int, m: int) -> np.ndarray:
    turn = np.abs(g.random((n, 1)) - g.random(m))
    return np.minimum(turn, 1 - turn)


def codes(bits: int) -> Maker:
    """Hamming distances of random codes."""

    def make(g: Generator, n: int, m: int) -> np.ndarray:
        a, b = (g.choice([-1.0, 1.0], (k, bits)) for k in (n, m))
        return (bits - a @ b.T) / 2

    return make


def overlaps(g: Generator, n: int, m: int) -> np.ndarray:
    """One minus intersection over union of boxes: nearly all pairs do not meet and cost 1."""
    k = max(n, m)
    corner, size = g.random((k, 2)), 0.02 + 0.05 * g.random((k, 2))
    order = g.permutation(k)[:m]
    a, sa = corner[:n], size[:n]
    b = corner[order] + 0.005 * g.standard_normal((m, 2))
    sb = size[order]
    shared = np.ones((n, m))
    for axis in range(2):
        low = np.maximum(a[:, None, axis], b[None, :, axis])
        high = np.minimum((a + sa)[:, None, axis], (b + sb)[None, :, axis])
        shared *= np.maximum(high - low, 0)
    return 1 - shared / (sa.prod(1)[:, None] + sb.prod(1) - shared)


FAMILIES = (
    Family("plane", "taxis and passengers", distances(cube(2), "euclidean")),
    Family("plane, squared", "point clouds of the plane", distances(cube(2), "sqeuclidean"), 1e6),
    Family("plane, L1", "a town of straight streets", distances(cube(2), "cityblock")),
    Family("plane, largest coordinate", "a plotter's pen", distances(cube(2), "chebyshev")),
    Family("space", "particles of two frames", distances(cube(3), "euclidean")),
    Family("space, squared", "transport between point clouds", distances(cube(3), "sqeuclidean"), 1e6),
    Family("16 dimensions", "descriptors", distances(cloud(16), "euclidean")),
    Family("64 dimensions, squared", "minibatch optimal transport", distances(cloud(64), "sqeuclidean")),
    Family("plane, moved a little", "the same particles in the next frame", moved(2, 0.001), 1e6),
    Family("plane, moved a lot", "fast particles in the next frame", moved(2, 0.03), 1e6),
    Family("space, moved", "registration of a scan", moved(3, 0.01), 1e6),
    Family("lattice to lattice", "icons laid out anew", lattices(True), 1),
    Family("lattice to points on it", "pixels of two pictures", lattices(False), 1),
    Family("points to lattice", "a cloud laid out on a grid", grid),
    Family("clusters, columns repeated", "k-means with clusters of one size", clusters(False, True)),
    Family("clusters, rows repeated", "the same, transposed", clusters(True, False)),
    Family("clusters, both repeated", "k-means of quantized points", clusters(True, True)),
    Family("uneven blobs", "demand and supply in towns", blobs),
    Family("circle", "angles", circle, 1e6),
    Family("Hamming, 8 bits", "short codes", codes(8), 1),
    Family("Hamming, 64 bits", "perceptual hashes", codes(64), 1),
    Family("Hamming, 1024 bits", "molecular fingerprints", codes(1024), 1),
    Family("overlaps of boxes", "tracking by boxes", overlaps),
)
