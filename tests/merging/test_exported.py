"""Partial merges of models that torch.fx cannot follow: their graph is torch.export's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fastmatch as fm


class Unsymbolic(nn.Module):
    """Asks for shapes, takes keywords, and returns a mapping."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("scale", torch.tensor([2.0]))

    def forward(self, x, **options):
        x = F.relu(self.first(x))
        if len(x.shape) == 2 and x.shape[-1] == 16:
            x = F.relu(self.second(x)) * self.scale + torch.tensor([0.5])
        return {"logits": self.last(x), "hidden": x.sum(dim=-1)}


def pair():
    return [Unsymbolic().eval() for _ in range(2)]


@pytest.mark.parametrize("start_at", [0, 1, 2])
@pytest.mark.parametrize("rule", ["identity", "permute", "zip"])
def test_it_merges_what_the_plain_model_would(start_at, rule):
    models, x = pair(), torch.randn(4, 6)
    with pytest.raises(RuntimeError, match="len"):
        fx.symbolic_trace(models[0])
    made = {
        "identity": fm.Identity(),
        "permute": fm.Permute([torch.randn(50, 6)]),
        "zip": fm.Zip([torch.randn(50, 6)]),
    }
    found = fm.merge_partial(models, x, made[rule], start_at=start_at)
    y = torch.randn(9, 6)  # another number of samples
    with torch.no_grad():
        out = found.model(y)
        both = [model(y)["logits"] for model in models]
    assert out.keys() == {"logits", "hidden"}
    if start_at == 2:  # everything apart: the average of the outputs
        torch.testing.assert_close(out["logits"], sum(both) / 2)
    if start_at == 0 and rule == "identity":
        with torch.no_grad():
            torch.testing.assert_close(out["logits"], fm.merge(models)(y)["logits"])
    if start_at == 0 and rule == "permute":
        alignment = fm.align(*models, x, fm.ActivationMatching(made[rule].data))
        with torch.no_grad():
            expected = fm.merge([models[0], alignment.apply(models[1])])(y)["logits"]
        torch.testing.assert_close(out["logits"], expected, rtol=1e-4, atol=1e-5)


def test_a_model_that_neither_can_follow_is_refused_with_both_reasons():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 3)

        def forward(self, x):
            x = F.relu(self.first(x))
            return self.last(x if float(x.sum()) > 0 else x + 1)

    models = [Branching().eval() for _ in range(2)]
    with pytest.raises(
        ValueError, match=r"models: neither torch\.fx \(.*\) nor torch\.export \(.*\) can follow"
    ):
        fm.merge_partial(models, torch.randn(4, 6), fm.Identity())


def test_a_language_model_is_merged_by_its_export():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32,
    )  # fmt: skip
    models = [transformers.BertForSequenceClassification(config).eval() for _ in range(2)]
    example = {"input_ids": torch.randint(1, 40, (4, 9))}
    found = fm.merge_partial(models, example, fm.Identity(), start_at=0)
    with torch.no_grad():
        expected = fm.merge(models)(**example).logits
        torch.testing.assert_close(found.model(**example)["logits"], expected)
