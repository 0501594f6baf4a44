"""The parts of the GPU report beyond single kernels: public calls against the CPU, solves, and where their time goes."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastmatch as fm
from bench.lib.findings import Findings
from bench.lib.nets import vgg16
from bench.lib.published import activation_matching, activation_matching_by_layer, weight_matching_torch
from fastmatch.permutations.apply import permute_tensor

__all__ = ["calls", "peers", "profile", "solves"]

Row = dict[str, Any]

SWEEPS = 5
"""Of the published loop at most: its solves on the host take seconds each."""


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float, float]:
    """(result, seconds of the first call, of the second)."""
    seconds = []
    found = None
    for _ in range(2):
        begin = time.perf_counter()
        found = function()
        _synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return found, *seconds


def networks(kind: str, width: int, count: int) -> tuple[list[nn.Module], tuple[int, ...]]:
    """Networks of one kind, and the shape of a sample."""
    if kind == "mlp":
        build: Callable[[], nn.Module] = lambda: nn.Sequential(  # noqa: E731
            nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width),
            nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip
        return [build().eval() for _ in range(count)], (64,)
    build = lambda: nn.Sequential(  # noqa: E731
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10),
    )  # fmt: skip
    return [build().eval() for _ in range(count)], (3, 16, 16)


def calls(findings: Findings, device: torch.device, *, tiny: bool) -> None:
    """Every public call on the device: its results against the CPU's, its first and its second time."""
    for kind, width in (("mlp", 32 if tiny else 512), ("cnn", 8 if tiny else 64)):
        _calls_of(findings, device, kind, width, tiny=tiny)
    for metric in ("dot", "l2", "l1"):
        n = 64 if tiny else 700
        findings.attempt(f"solve FactorCost {metric}", lambda m=metric, n=n: _factor_cost(device, m, n), n=n)


def _factor_cost(device: torch.device, metric: Any, n: int) -> Row:
    p, q = torch.randn(n, 16), torch.randn(n, 16)
    cost = fm.assignment.FactorCost([(p.to(device), q.to(device))], metric)
    solver, maximize = fm.assignment.CandidateLists(), metric == "dot"
    found, first, again = _timed(device, lambda: fm.solve(cost, maximize=maximize, solver=solver))
    best = fm.solve(fm.assignment.FactorCost([(p, q)], metric).dense(), maximize=maximize)
    same = abs(found.objective - best.objective) <= 1e-9 * abs(best.objective)
    return {"first_s": first, "s": again, "certified": found.is_certified, "same": same}


def _calls_of(findings: Findings, device: torch.device, kind: str, width: int, *, tiny: bool) -> None:
    torch.manual_seed(0)
    models, shape = networks(kind, width, 3)
    a, b, _ = models
    ga, gb, _ = placed = [copy.deepcopy(m).to(device) for m in models]
    x = torch.randn(2, *shape)
    batches = [(torch.randn(32, *shape), torch.randint(10, (32,))) for _ in range(3)]
    spec = fm.PermutationSpec.trace(a, x)
    gx = x.to(device)

    def both(
        name: str, ours: Callable[[], Any], theirs: Callable[[], Any], compare: Callable[..., Row]
    ) -> Any:
        kept = []

        def run() -> Row:
            found, first, again = _timed(device, ours)
            kept.append(found)
            return {"first_s": first, "s": again, **compare(found, theirs())}

        findings.attempt(name, run, kind=kind, width=width)
        return kept[0] if kept else None

    matchers: dict[str, Any] = {
        "weights": fm.WeightMatching(),
        "activations": fm.ActivationMatching(batches),
        "batch-correlation": fm.ActivationMatching(batches, "batch-correlation"),
        "cca": fm.ActivationMatching(batches, "cca"),
        "mixture": fm.Mixture(fm.WeightMatching(), fm.ActivationMatching(batches)),
        "fisher": fm.FisherMatching(batches),
    }
    for name, matcher in matchers.items():
        both(
            f"align by {name}",
            lambda m=matcher: fm.align(ga, gb, gx, m),
            lambda m=matcher: fm.align(a, b, x, m),
            _same_alignment,
        )
    found = fm.align(a, b, spec=spec)
    both("apply", lambda: found.apply(gb), lambda: found.apply(b), _largest_difference)
    merged = both("merge", lambda: fm.merge([ga, gb]), lambda: fm.merge([a, b]), _largest_difference)
    for method in ("repair", "rescale", "reshift", "reset"):
        for mode in ("joint", "sequential"):
            if merged is None or (method == "reset" and kind == "mlp"):
                continue
            options = fm.Renormalization(method, mode=mode)
            both(
                f"renormalize {method} {mode}",
                lambda o=options: fm.renormalize(merged, [ga, gb], batches, o),
                lambda o=options: fm.renormalize(fm.merge([a, b]), [a, b], batches, o),
                _largest_difference,
            )
    strategies = (fm.ToReference(), fm.Chain(), fm.MergeMany(), fm.FrankWolfe(max_steps=2))
    for strategy in strategies if tiny or kind == "cnn" else strategies[:1]:
        both(
            f"align_many {type(strategy).__name__}",
            lambda s=strategy: fm.align_many(placed, gx, s)[1],
            lambda s=strategy: fm.align_many(models, x, s)[1],
            _same_alignment,
        )
    for rule in (fm.Permute, fm.Zip, fm.CCA):
        both(
            f"merge_partial {rule.__name__}",
            lambda r=rule: fm.merge_partial([ga, gb], gx, r(batches), start_at=1).model,
            lambda r=rule: fm.merge_partial([a, b], x, r(batches), start_at=1).model,
            _largest_difference,
        )


def _same_alignment(found: fm.Alignment, expected: fm.Alignment) -> Row:
    same = all(torch.equal(p, expected.permutations[g]) for g, p in found.permutations.items())
    if found.matching is None or expected.matching is None:
        return {"same": same}
    ours, theirs = found.matching.objective[-1], expected.matching.objective[-1]
    return {"same": same, "objective_over_cpu": ours / theirs if theirs else float("nan")}


def _largest_difference(found: nn.Module, expected: nn.Module) -> Row:
    pairs = zip(found.state_dict().values(), expected.state_dict().values(), strict=True)
    return {
        "difference": max(float((x.cpu().double() - y.double()).abs().max()) for x, y in pairs if x.numel())
    }


def solves(findings: Findings, device: torch.device, *, tiny: bool) -> None:
    """Factor costs and stored matrices, by lists on the device and by a copy to the host; weight matching end to end."""
    sizes = ((64, 8),) if tiny else ((65536, 256), (16384, 1024), (4096, 1024), (2048, 512))
    for n, d in sizes:
        for kind in ("sibling", "gaussian"):
            _solves_of(findings, device, n, d, kind)
    width = 48 if tiny else 4096
    models, shape = networks("mlp", width, 2)
    ga, gb = (m.to(device) for m in models)
    spec = fm.PermutationSpec.trace(ga, torch.randn(2, *shape, device=device))

    def weights() -> Row:
        found, first, again = _timed(device, lambda: fm.align(ga, gb, spec=spec))
        matching = found.matching
        return {"first_s": first, "s": again, "solves": matching.solves, "objective": matching.objective[-1]}

    findings.attempt("weight matching of an MLP to convergence", weights, width=width)
    batches = [torch.randn(64 if tiny else 8192, *shape, device=device) for _ in range(4)]

    def activations() -> Row:
        matcher = fm.ActivationMatching(batches)
        found, first, again = _timed(device, lambda: fm.align(ga, gb, spec=spec, matcher=matcher))
        return {"first_s": first, "s": again, "objective": found.matching.objective[-1]}

    findings.attempt("activation matching of an MLP", activations, width=width)


def _solves_of(findings: Findings, device: torch.device, n: int, d: int, kind: str) -> None:
    a, b = torch.randn(n, d, device=device), torch.randn(n, d, device=device)
    if kind == "sibling":
        b += a[torch.randperm(n, device=device)]
    lists, dense = fm.assignment.CandidateLists(), fm.assignment.DenseShortlists()

    def run(solver: Any, cost: Callable[[], Any]) -> Row:
        found, first, again = _timed(device, lambda: fm.solve(cost(), maximize=True, solver=solver))
        return {"first_s": first, "s": again, "certified": found.is_certified, **found.stats}

    more = {"n": n, "d": d, "kind": kind}
    findings.attempt("solve factors", lambda: run(lists, lambda: fm.assignment.FactorCost([(a, b)])), **more)
    if n <= 16384:
        findings.attempt("solve a matrix by lists", lambda: run(lists, lambda: a @ b.T), **more)
        findings.attempt("solve a matrix copied to the host", lambda: run(dense, lambda: a @ b.T), **more)


def peers(findings: Findings, device: torch.device, *, tiny: bool) -> None:
    """Weight and activation matching against the published forms: torch on the same device, scipy on its host."""
    mlp, shape = networks("mlp", 48 if tiny else 4096, 2)
    findings.attempt(
        "weight matching, MLP", lambda: _against_loop(device, mlp, shape), width=48 if tiny else 4096
    )
    width = 0.1 if tiny else 1.0
    images = torch.randn(64 if tiny else 50_000, 3, 32, 32, device=device)
    findings.attempt(
        "activation matching, VGG16",
        lambda: _against_hooks(device, width, images),
        width=width,
        images=len(images),
    )
    width = 0.1 if tiny else 4.0
    found = [vgg16(width).eval() for _ in range(2)]
    findings.attempt("weight matching, VGG16", lambda: _against_loop(device, found, (3, 32, 32)), width=width)


def _against_loop(device: torch.device, models: list[nn.Module], shape: tuple[int, ...]) -> Row:
    """Ours to convergence, after a first time, against SWEEPS sweeps of the published loop at most."""
    a, b = (m.to(device) for m in models)
    spec = fm.PermutationSpec.trace(a, torch.randn(2, *shape, device=device))
    found, first, again = _timed(device, lambda: fm.align(a, b, spec=spec, verify=False))
    states = [{k: v.detach() for k, v in m.state_dict().items()} for m in (a, b)]
    begin = time.perf_counter()
    perms = weight_matching_torch(*states, spec, seed=0, max_sweeps=SWEEPS)
    _synchronize(device)
    published = time.perf_counter() - begin
    ours, theirs = (_objective(spec, *states, p) for p in (found.permutations, perms))
    return {"first_s": first, "s": again, "solves": found.matching.solves, "published s": published,
            "published / ours": published / again, "objective / theirs": ours / theirs}  # fmt: skip


def _objective(spec: fm.PermutationSpec, a: Row, b: Row, perms: Any) -> float:
    """The inner product of A's weights with B's permuted ones, in float64."""
    return sum(
        float((a[name].double() * permute_tensor(b[name], name, spec, perms).double()).sum())
        for name in {axis.parameter for group in spec.groups.values() for axis in group.axes}
    )


def _against_hooks(device: torch.device, width: float, images: torch.Tensor) -> Row:
    """Ours against float64 correlations by hooks, in one pass over the images too."""
    models = [vgg16(width).eval().to(device) for _ in range(2)]
    spec = fm.PermutationSpec.trace(models[0], images[:2])
    batches = images.split(500)
    matcher = fm.ActivationMatching(batches)
    found, first, again = _timed(device, lambda: fm.align(*models, spec=spec, matcher=matcher, verify=False))
    layers = {g: str(int(name.split(".")[0]) + 1) for g, name in _layer_of(spec).items()}
    begin = time.perf_counter()
    columns, correlations = activation_matching(*models, layers, batches)
    _synchronize(device)
    theirs = time.perf_counter() - begin
    begin = time.perf_counter()
    activation_matching_by_layer(*models, layers, lambda: batches)
    by_layer = time.perf_counter() - begin
    with torch.no_grad():
        begin = time.perf_counter()
        for x in batches:
            _ = [m(x) for m in models]
        _synchronize(device)
        forward = time.perf_counter() - begin
    gap = max(
        float(
            c[torch.arange(len(p)), torch.from_numpy(columns[g])].sum()
            - c[torch.arange(len(p)), found.permutations[g].cpu()].sum()
        ) / float(c.abs().sum(1).sum())
        for g, p in found.permutations.items() for c in (correlations[g].cpu(),)
    )  # fmt: skip
    return {"first_s": first, "s": again, "published, one pass s": theirs, "published, a pass a layer s": by_layer,
            "one pass / ours": theirs / again, "a pass a layer / ours": by_layer / again, "both forward passes s": forward, "correlation lost": gap}  # fmt: skip


def _layer_of(spec: fm.PermutationSpec) -> dict[str, str]:
    """The layer that makes each group's units."""
    return {g: next(x.parameter for x in group.axes if x.dim == 0) for g, group in spec.groups.items()}


def profile(findings: Findings, device: torch.device, out: Path | None, *, tiny: bool) -> None:
    """Where the time of public calls goes: the device's busy time, the host's waits, and the longest operations."""
    from torch.profiler import ProfilerActivity

    width = 48 if tiny else 4096
    models, shape = networks("mlp", width, 2)
    a, b = (m.to(device) for m in models)
    spec = fm.PermutationSpec.trace(a, torch.randn(2, *shape, device=device))
    data = [torch.randn(64 if tiny else 4096, *shape, device=device) for _ in range(3)]
    merged = fm.merge([a, b])
    named: dict[str, Callable[[], Any]] = {
        "align by weights": lambda: fm.align(a, b, spec=spec),
        "align by activations": lambda: fm.align(a, b, spec=spec, matcher=fm.ActivationMatching(data)),
        "merge": lambda: fm.merge([a, b]),
        "renormalize": lambda: fm.renormalize(merged, [a, b], data, "repair"),
    }
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    for name, function in named.items():

        def run(name: str = name, function: Callable[[], Any] = function) -> Row:
            function()
            _synchronize(device)
            begin = time.perf_counter()
            with torch.profiler.profile(activities=activities) as prof:
                function()
                _synchronize(device)
            seconds = time.perf_counter() - begin
            events = prof.key_averages()
            busy = sum(getattr(e, "self_device_time_total", 0) for e in events) / 1e6
            if out is not None:
                sort = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
                table = events.table(sort_by=sort, row_limit=14, max_name_column_width=60)
                with (out / "profile.txt").open("a") as file:
                    file.write(f"== {name}, width {width}: {seconds:.3f} s, GPU busy {busy:.3f} s\n{table}\n")
            waits = sum(e.count for e in events if e.key == "aten::_local_scalar_dense")
            return {"s": seconds, "gpu_busy_s": busy, "waits": waits}

        findings.attempt(name, run, width=width)
