"""The predicted cost of a run on several ranks: a schedule without tensors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastmatch.checkpoint.prediction import DEVICES, Device, Work, predict
from fastmatch.cli.main import main
from fastmatch.matching.gains import block_count

PAGE = Path(__file__).parents[2] / "docs/guides/several-processes.md"
RATES = Device(
    products=1e9, gather=1e8, assignment=1e6, survey=1e8, read=1e8, write=1e8, link=1e8, latency=1e-3
)


def chain(groups: int, *, coupled: bool = True) -> Work:
    """Groups in a row, each of which shares a tensor with the next."""
    names = [str(k) for k in range(groups)]
    near = {n: {m for m in names if abs(int(n) - int(m)) == 1} if coupled else set[str]() for n in names}
    return Work(dict.fromkeys(names, (100, 5e4, 2e5)), near, [1e6] * 8, [1e5] * 40)


def llama(hidden: int, inner: int, layers: int, keys: int, *, residual: bool) -> Work:
    """A checkpoint of Llama's shapes in bfloat16, in files of about 5 GB."""
    head, vocabulary = 128, 128_256
    attention = hidden * (2 * hidden + 2 * keys * head)
    groups, coupled, blocks = {}, {}, {}
    for k in range(layers):
        groups[f"mlp {k}"] = inner, 3.0 * hidden * inner, 6.0 * hidden * inner
        groups[f"heads {k}"] = hidden, float(attention), 2.0 * attention
    whole = 2.0 * hidden * vocabulary + layers * (attention + 3.0 * hidden * inner)
    coupled = {name: {"residual"} if residual else set[str]() for name in groups}
    if residual:
        coupled["residual"] = set(groups)
        groups["residual"] = hidden, whole, 2 * whole
        blocks["residual"] = block_count(hidden, whole)
    files = max(1, round(2 * whole / 5e9))
    tensors = [2 * whole / (9 * layers)] * (9 * layers)
    return Work(groups, coupled, [2 * whole / files] * files, tensors, blocks)


def wide() -> Work:
    """An MLP of four hidden layers of 65,536 units in bfloat16, one file a layer."""
    n = 65_536
    names = [str(k) for k in range(4)]
    near = {a: {b for b in names if abs(int(a) - int(b)) == 1} for a in names}
    return Work(
        dict.fromkeys(names, (n, 2.0 * n * n, 4.0 * n * n)), near, [2.0 * n * n] * 5, [2.0 * n * n] * 5
    )


SHAPES = {
    "7B": lambda: llama(4096, 11008, 32, 32, residual=True),
    "7B, residual held": lambda: llama(4096, 11008, 32, 32, residual=False),
    "70B": lambda: llama(8192, 28672, 80, 8, residual=True),
    "70B, residual held": lambda: llama(8192, 28672, 80, 8, residual=False),
    "405B": lambda: llama(16384, 53248, 126, 8, residual=True),
    "405B, residual held": lambda: llama(16384, 53248, 126, 8, residual=False),
    "MLP 65,536 wide": wide,
}
RANKS = (1, 8, 64, 1024)


def table() -> str:
    """The table of the page."""
    lines = [
        "| shapes | " + " | ".join(f"{r} ranks" if r > 1 else "1 rank" for r in RANKS) + " | memory a rank |"
    ]
    lines.append("|---" * (len(RANKS) + 2) + "|")
    for name, build in SHAPES.items():
        work = build()
        found = [predict(work, DEVICES["h100"], ranks) for ranks in RANKS]
        cells = [f"{p.total / 60:.3g} min ({p.bound})" for p in found]
        lines.append(f"| {name} | {' | '.join(cells)} | {found[0].memory / 1e9:.3g} GB |")
    return "\n".join(lines)


def test_the_table_of_the_page_is_what_the_model_says():
    assert table() in PAGE.read_text()


def test_one_rank_does_everything_and_more_ranks_share_what_is_not_coupled():
    free = chain(8, coupled=False)
    one, two, many = (predict(free, RATES, ranks) for ranks in (1, 2, 64))
    assert one.levels == two.levels == 1
    assert one.moved == 0
    for part in ("survey", "read", "gather", "products", "assignment", "write"):
        assert two.seconds[part] == pytest.approx(one.seconds[part] / 2)
    assert one.seconds["products"] == pytest.approx(8 * 2 * 2 * 100 * 5e4 / RATES.products)
    assert many.seconds["products"] == pytest.approx(one.seconds["products"] / 8)
    assert one.read == two.read == many.read
    assert one.memory == many.memory


def test_coupled_groups_wait_for_each_other():
    path = predict(chain(8), RATES, 8)
    assert path.levels == 8  # in the order of the chain each group follows its neighbour
    assert path.seconds["products"] == predict(chain(8), RATES, 1).seconds["products"]


def test_ranks_multiply_the_gain_of_a_group_that_is_alone_together():
    whole = llama(4096, 11008, 32, 32, residual=True)
    apart = replace(whole, blocks={})
    assert whole.blocks["residual"] == 8
    one, two = (predict(whole, RATES, ranks).seconds for ranks in (1, 2))
    assert one == predict(apart, RATES, 1).seconds
    spared = predict(apart, RATES, 2).seconds["products"] - two["products"]
    units, elements, _ = whole.groups["residual"]
    assert spared == pytest.approx(2 * units * elements * 2 / 2 / RATES.products)
    assert two["assignment"] == predict(apart, RATES, 2).seconds["assignment"]
    assert two["exchange"] > predict(apart, RATES, 2).seconds["exchange"]


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="ranks"):
        predict(chain(2), RATES, 0)
    with pytest.raises(ValueError, match="sweeps"):
        predict(chain(2), RATES, 1, sweeps=0)


def test_the_command_reads_no_tensor(tmp_path, capsys, monkeypatch):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "a", max_shard_size="8KB")
    monkeypatch.setattr("fastmatch.checkpoint.reader.read_entry", lambda *_: pytest.fail("a tensor was read"))
    command = ["plan", str(tmp_path / "a"), str(tmp_path / "a"), "--ranks", "64", "--device", "h100"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("predicted, not measured")
    assert "64 x h100" in printed
    assert "5 groups" in printed
    assert main([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["predicted"] == pytest.approx(sum(record["seconds"].values()))
    assert (record["ranks"], record["device"]) == (64, "h100")
    assert main([*command, "--no-residual"]) == 0
    assert "4 groups in 1 levels" in capsys.readouterr().out
    assert main([*command[:3], "--ranks", "0"]) == 2
    assert "ranks" in capsys.readouterr().err
