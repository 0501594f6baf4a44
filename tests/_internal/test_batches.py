"""How batches of every form become arguments of a model, and what is read of its output."""

from __future__ import annotations

from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch._internal.batches import default_forward, prediction_of, samples_in, split_batch


class Tokens(nn.Module):
    """A small classifier of padded sequences that returns an object, as language models do."""

    def __init__(self, pad: int = 3, classes: int = 4, causal: bool = False):
        super().__init__()
        self.config = SimpleNamespace(pad_token_id=pad)
        self.embed, self.hidden, self.head = nn.Embedding(11, 8), nn.Linear(8, 12), nn.Linear(12, classes)
        self.causal = causal
        self.seen: dict[str, torch.Tensor] = {}

    def forward(self, input_ids, attention_mask=None, labels=None):
        self.seen = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        found = torch.relu(self.hidden(self.embed(input_ids)))
        if not self.causal:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            found = (found * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(found)
        loss = None
        if labels is not None:
            target = labels[:, 1:] if self.causal else labels
            scores = logits[:, :-1] if self.causal else logits
            loss = nn.functional.cross_entropy(scores.flatten(0, -2), target.flatten())
        return SimpleNamespace(loss=loss, logits=logits)


IDS = [[1, 2, 5, 6], [4, 5], [7, 8, 9]]
LABELS = [0, 3, 1]
PADDED = torch.tensor([[1, 2, 5, 6], [4, 5, 3, 3], [7, 8, 9, 3]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.filterwarnings("ignore:renormalize leaves these alone")
@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "labels": LABELS},
        UserDict({"input_ids": [np.array(row) for row in IDS], "label": torch.tensor(LABELS)}),
        {"input_ids": [torch.tensor(row) for row in IDS], "labels": LABELS, "text": ["a", "b", "c"]},
        [{"input_ids": row, "labels": label} for row, label in zip(IDS, LABELS, strict=True)],
        ({"input_ids": IDS}, torch.tensor(LABELS)),
        {"input_ids": PADDED, "attention_mask": MASK, "labels": torch.tensor(LABELS)},
    ],
    ids=["lists", "encoding", "tensors and texts", "samples", "pair", "padded"],
)
def test_sequences_of_any_form_are_padded_and_masked(batch):
    model = Tokens()
    default_forward(model, batch)
    assert torch.equal(model.seen["input_ids"], PADDED)
    assert torch.equal(model.seen["attention_mask"], MASK)
    assert model.seen["labels"] is None
    assert samples_in(batch) == 3
    found, expected = (
        fm.score(model, [batch]),
        fm.score(model, [({"input_ids": PADDED, "attention_mask": MASK}, torch.tensor(LABELS))]),
    )
    assert found[:3] == expected[:3]
    matcher = fm.ActivationMatching([batch])
    assert fm.align(model, model, PADDED, matcher).moved == 0
    assert fm.renormalize(model, [model], [batch] * 3, "rescale") is not model


def test_a_list_of_inputs_is_several_arguments():
    model = nn.Bilinear(3, 4, 2)
    pair = [torch.randn(5, 3), torch.randn(5, 4)]
    assert default_forward(model, (pair, torch.zeros(5))).shape == (5, 2)


def test_the_loss_of_a_causal_model_is_its_own_and_padding_does_not_count():
    model = Tokens(classes=11, causal=True)
    labels = torch.where(MASK.bool(), PADDED, -100)
    batch = {"input_ids": PADDED, "attention_mask": MASK, "labels": labels}
    found = fm.score(model, [batch])
    assert found.loss == pytest.approx(model(**batch).loss.item())
    assert np.isnan(found.accuracy)
    assert np.isnan(found.top5)
    assert fm.score(model, [(PADDED, labels)]).loss == pytest.approx(found.loss)
    curve = fm.interpolate(model, model, [batch], points=3)
    assert curve.accuracy == ()
    assert np.isnan(curve.accuracy_barrier)


def test_the_first_samples_of_a_mapping_of_lists_are_cut():
    model = Tokens()
    batch = {"input_ids": IDS, "text": ["a", "b", "c"], "labels": LABELS}
    fm.endpoint_statistics([model], [batch], samples=2)
    assert torch.equal(model.seen["input_ids"], PADDED[:2])


@pytest.mark.parametrize("matcher", [fm.FisherMatching, fm.StraightThrough])
def test_matchers_that_need_targets_read_mappings(matcher):
    model = Tokens()
    batch = {"input_ids": PADDED, "attention_mask": MASK, "labels": torch.tensor(LABELS)}
    with pytest.raises(ValueError, match=r"expected .*mappings with labels"):
        fm.align(model, model, PADDED, matcher([{"input_ids": PADDED}]))
    assert fm.align(model, model, PADDED, matcher([batch])).moved == 0


def test_mappings_with_labels_are_the_pairs_they_hold():
    models = [Tokens(), Tokens()]
    pairs = [(PADDED, torch.tensor(LABELS)), (PADDED[:1], torch.tensor(LABELS[:1]))]
    mappings = [{"input_ids": x, "labels": y} for x, y in pairs]
    assert fm.interpolate(*models, mappings, points=3) == fm.interpolate(*models, pairs, points=3)
    with pytest.raises(ValueError, match="targets"):
        fm.interpolate(*models, [{"input_ids": x} for x, _ in pairs], points=3)


def test_logits_are_found_in_output_objects():
    logits = torch.zeros(2, 3)
    for output in (
        logits,
        {"logits": logits},
        {"out": logits, "aux": 3},
        SimpleNamespace(last_hidden_state=logits),
    ):
        assert prediction_of(output) is logits
    assert prediction_of((logits, logits)) == (logits, logits)
    assert split_batch({"x": 1, "label": 2}) == ({"x": 1}, 2)
