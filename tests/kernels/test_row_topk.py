import pytest
import torch

from fastmatch_kernels.gain.reference import gathered
from fastmatch_kernels.ops import row_min, row_topk
from fastmatch_kernels.row_topk import triton as cost_rows
from helpers.kernel_cases import BACKENDS, DEVICE, fresh_generator, normal, strided

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")
ALL = pytest.mark.parametrize("backend", [*BACKENDS, "reference"])


def values_of(factors, v, b_index=None, contractions=None):
    """True ``c - v`` in float64."""
    contractions = contractions or [None] * len(factors)
    total = 0
    for (a, b), contraction in zip(factors, contractions, strict=True):
        total = total - a.double() @ gathered(b.double(), b_index, contraction).T
    return total - v.double()


def check(result, factors, v, k, precision="ieee", **indices):
    index, costs, bound = result
    contractions = indices.get("contraction_index")
    true = values_of(factors, v, indices.get("b_index"), contractions)
    n, m = true.shape
    assert index.shape == costs.shape == (n, k)
    assert index.dtype == torch.int64
    assert bound.shape == (n,)
    error = cost_rows.product_error(factors, v, precision, contractions)[:, None]
    listed = torch.zeros(n, m + 1, dtype=torch.bool, device=DEVICE)
    listed.scatter_(1, torch.where(index < 0, m, index), True)
    assert torch.all(listed[:, :m].sum(1) == (index >= 0).sum(1)), "a column is listed twice"
    assert torch.all((index >= 0).sum(1) == min(k, m))
    outside = torch.where(listed[:, :m], INF, true)
    least = outside.amin(1) if m else torch.full((n,), INF, device=DEVICE)
    assert torch.all(bound.double() <= least), "the bound is above a value outside the list"
    if m > k > 0:
        assert torch.all(bound.double() >= least - 3 * error[:, 0] - 1e-6 * least.abs())
    safe = index.clamp(min=0)
    if m and k:
        got = torch.where(index < 0, INF, costs.double() - v.double()[safe])
        wanted = torch.where(index < 0, INF, true.gather(1, safe))
        real = index >= 0
        assert torch.all((got - wanted).abs()[real] <= (2 * error).expand_as(got)[real])
        # Sorted, and whatever is clearly below the bound is listed in its true place.
        assert torch.all(got.diff(dim=1)[real[:, 1:]] >= -2 * error.expand(n, k - 1)[real[:, 1:]])
        best = true.sort(dim=1).values[:, :k]
        certain = wanted[:, : best.shape[1]] < (bound.double()[:, None] - 2 * error)
        assert torch.all(
            (wanted[:, : best.shape[1]] - best)[certain].abs() <= 2 * error.expand_as(best)[certain]
        )


@ALL
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "m", "depths", "k"),
    [
        (70, 45, (33,), 4),
        (33, 101, (7, 20), 8),
        (1, 1, (1,), 1),
        (3, 5, (4,), 9),
        (40, 33, (3,), 33),
        (2, 40, (0,), 2),
    ],
)
def test_shortlists_against_float64(backend, dtype, n, m, depths, k):
    generator = fresh_generator()
    factors = [(normal(generator, n, d, dtype=dtype), normal(generator, m, d, dtype=dtype)) for d in depths]
    v = normal(generator, m)
    check(row_topk(factors, v, k, backend=backend), factors, v, k)
    value, column = row_min(factors, v, backend=backend)
    true = values_of(factors, v)
    error = cost_rows.product_error(factors, v, "ieee")
    assert torch.all((value.double() - true.amin(1)).abs() <= error)
    assert torch.all((true.gather(1, column[:, None])[:, 0] - true.amin(1)).abs() <= 2 * error)


@ALL
def test_reordered_rows_and_contraction_axes(backend):
    generator = fresh_generator()
    factors = [(normal(generator, 40, d), normal(generator, 50, d)) for d in (33, 6)]
    v = normal(generator, 70)
    rows = torch.randint(50, (70,), generator=generator).to(DEVICE)
    inner = [torch.randperm(33, generator=generator).to(DEVICE), None]
    indices = {"b_index": rows, "contraction_index": inner}
    check(row_topk(factors, v, 5, **indices, backend=backend), factors, v, 5, **indices)
    repeated = [torch.randint(33, (33,), generator=generator).to(DEVICE), None]
    indices = {"b_index": rows, "contraction_index": repeated}
    check(row_topk(factors, v, 5, **indices, backend=backend), factors, v, 5, **indices)


@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_named_precisions_hold_their_bound(precision):
    generator = fresh_generator()
    factors = [(normal(generator, 40, 30), normal(generator, 80, 30))]
    v = normal(generator, 80)
    check(row_topk(factors, v, 6, precision=precision, backend="triton"), factors, v, 6, precision)


def rounded(x, precision):
    """(high, low) as the matrix units take a float32 factor near 1, where scaling changes nothing."""
    high = x.half().float()
    return high, (x - high).half().float() if precision == "fp16x3" else torch.zeros_like(x)


@pytest.mark.parametrize("precision", ["fp16", "fp16x3"])
def test_the_error_bound_covers_what_the_hardware_formats_drop(precision):
    generator = fresh_generator()
    a, b = normal(generator, 50, 64).exp(), normal(generator, 60, 64).exp()  # one sign: no cancellation
    (a_hi, a_lo), (b_hi, b_lo) = rounded(a, precision), rounded(b, precision)
    got = (a_hi @ b_hi.T + a_hi @ b_lo.T + a_lo @ b_hi.T).double()
    error = (got - a.double() @ b.double().T).abs().amax(1)
    bound = cost_rows.product_error([(a, b)], torch.zeros(60, device=DEVICE), precision)
    assert torch.all(error <= bound)
    assert torch.all(error > bound / 1e4), "a bound that is far from what happens says nothing"


@ALL
def test_strides(backend):
    generator = fresh_generator()
    a, b, v = normal(generator, 33, 8), normal(generator, 40, 8), normal(generator, 40)
    check(row_topk([(strided(a), b.T.contiguous().T)], strided(v), 3, backend=backend), [(a, b)], v, 3)


def test_ties_go_to_the_lower_column():
    a, b = torch.ones(3, 4, device=DEVICE), torch.ones(70, 4, device=DEVICE)
    index, costs, bound = row_topk([(a, b)], torch.zeros(70, device=DEVICE), 5, backend="triton")
    expected = torch.tensor([0, 1, 2, 3, 32], device=DEVICE)  # tiles of 32 columns hand out 4 each
    few = cost_rows.few_of(5, 3)
    expected = torch.tensor([*range(few), *range(32, 64)], device=DEVICE)[:5]
    assert torch.equal(index, expected.expand(3, 5))
    assert torch.all(costs == -4)
    assert torch.all(bound < -4)
    assert torch.all(bound > -4.001)


@ALL
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy inside the interpreter
def test_what_is_not_finite_is_not_listed_but_minus_infinity_is(backend):
    generator = fresh_generator()
    a, b, v = normal(generator, 5, 4).abs(), normal(generator, 40, 4), torch.zeros(40, device=DEVICE)
    b[3, 0], b[7, 1], b[9, 1] = float("nan"), INF, -INF
    v[11] = -INF
    index, costs, _ = row_topk([(a, b)], v, 40, backend=backend)
    assert torch.all(index[:, 0] == 7)
    assert torch.all(costs[:, 0] == -INF)
    for column in (3, 9, 11):
        assert not (index == column).any()
    assert torch.all((index >= 0).sum(1) == 37)
    assert torch.all(costs[:, 37:] == INF)


@ALL
def test_no_columns_no_rows_and_an_empty_list(backend):
    a, b = torch.ones(3, 4, device=DEVICE), torch.ones(6, 4, device=DEVICE)
    v = torch.zeros(6, device=DEVICE)
    index, costs, bound = row_topk([(a, b[:0])], v[:0], 2, backend=backend)
    assert torch.all(index == -1)
    assert torch.all(costs == INF)
    assert torch.all(bound == INF)
    assert row_topk([(a[:0], b)], v, 2, backend=backend)[0].shape == (0, 2)
    index, _, bound = row_topk([(a, b)], v, 0, backend=backend)
    assert index.shape == (3, 0)
    assert torch.all(bound == -INF)


def test_rows_in_pieces_give_the_same(monkeypatch):
    generator = fresh_generator()
    factors = [(normal(generator, 100, 6), normal(generator, 90, 6))]
    v = normal(generator, 90)
    whole = row_topk(factors, v, 4, backend="triton")
    monkeypatch.setattr(cost_rows, "WORKSPACE", 1)
    for one, other in zip(whole, row_topk(factors, v, 4, backend="triton"), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("gathered", [False, True])
@pytest.mark.parametrize("k", [4, 40])
def test_more_columns_than_the_selection_holds(monkeypatch, k, gathered):
    generator = fresh_generator()
    a, b, v = normal(generator, 20, 6), normal(generator, 500, 6), normal(generator, 500)
    v[17] = -INF
    rows = torch.randperm(500, generator=generator).to(DEVICE) if gathered else None
    monkeypatch.setattr(cost_rows, "MAX_CANDIDATES", 64)
    found = row_topk([(a, b)], v, k, b_index=rows, backend="triton")
    check(found, [(a, b if rows is None else b[rows])], v, k)


def test_more_entries_than_the_selection_holds_is_an_error(monkeypatch):
    monkeypatch.setattr(cost_rows, "MAX_CANDIDATES", 4)
    a, b, v = (torch.ones(shape, device=DEVICE) for shape in ((2, 2), (99, 2), (99,)))
    with pytest.raises(ValueError, match="k: expected at most 4 entries"):
        row_topk([(a, b)], v, 5, backend="triton")


@ALL
def test_compiles_without_a_graph_break(backend):
    generator = fresh_generator()
    a, b, v = normal(generator, 9, 7), normal(generator, 8, 7), normal(generator, 8)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def lists(a, b, v):
        index, costs, bound = row_topk([(a * 1, b)], v, 3, backend=backend)
        value, column = row_min([(a * 1, b)], v, backend=backend)
        return index, costs + 0, bound, value, column

    got = lists(a, b, v)
    check(got[:3], [(a, b)], v, 3)
    assert torch.equal(got[4], got[0][:, 0])


@pytest.mark.parametrize(
    ("v", "k", "match"),
    [
        (torch.zeros(3), 1, "v: expected 4"),
        (torch.zeros(4), -1, "k: expected at least 0"),
        (torch.zeros(4, dtype=torch.int64), 1, "v: expected 4 floating"),
    ],
)
def test_bad_input_is_named(v, k, match):
    with pytest.raises(ValueError, match=match):
        row_topk([(torch.ones(3, 2), torch.ones(4, 2))], v, k, backend="triton")
