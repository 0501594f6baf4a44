"""Recurrent networks: the gates of a layer share one order of hidden units, and each layer has its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastmatch as fm
from fastmatch.spec.running import plain_operations
from helpers.networks import fresh_seed


class Text(nn.Module):
    """Embedded tokens, a recurrent network, and a head on its outputs or its last state."""

    def __init__(self, kind, last: bool = False, **options):
        super().__init__()
        self.embed, self.body = nn.Embedding(20, 8), kind(8, 12, batch_first=True, **options)
        width = (self.body.proj_size or 12) * (2 if self.body.bidirectional else 1)
        self.head, self.last = nn.Linear(12 if last else width, 5), last

    def forward(self, ids):
        out, state = self.body(self.embed(ids))
        if self.last:
            return self.head((state[0] if isinstance(state, tuple) else state)[-1])
        return self.head(out)


IDS = torch.randint(20, (40, 7))
FORMS = {
    "one layer": ({}, [8, 12]),
    "two layers": ({"num_layers": 2}, [8, 12, 12]),
    "both directions": ({"bidirectional": True, "num_layers": 2}, [8, 12, 12, 12, 12]),
    "without biases": ({"bias": False, "num_layers": 2}, [8, 12, 12]),
    "last state": ({"last": True, "num_layers": 2}, [8, 12, 12]),
}


@pytest.mark.grid
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("form", FORMS)
def test_every_layer_and_direction_is_a_group_and_is_found_again(kind, form):
    options, sizes = FORMS[form]
    torch.manual_seed(1)
    model = Text(kind, **options).eval()
    spec = fm.PermutationSpec.trace(model, IDS[:2])
    assert [group.size for group in spec.groups.values()] == sizes
    hidden = fm.Alignment(spec.random(), spec)
    permuted = hidden.apply(model)
    with torch.no_grad():
        torch.testing.assert_close(permuted(IDS), model(IDS))
    for matcher in (None, fm.ActivationMatching([IDS])):
        found = fm.align(model, permuted, IDS[:2], matcher)
        for group, perm in hidden.invert().permutations.items():
            assert torch.equal(found.permutations[group], perm), (group, matcher)


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_a_projected_state_has_a_group_of_its_own():
    spec = fm.PermutationSpec.trace(Text(nn.LSTM, proj_size=4).eval(), IDS[:2])
    assert [group.size for group in spec.groups.values()] == [8, 12, 4]


def test_recurrent_networks_leave_cudnn_while_they_are_followed():
    before = torch.backends.cudnn.enabled
    with plain_operations(Text(nn.LSTM)):
        assert not torch.backends.cudnn.enabled
    with plain_operations(nn.Linear(2, 2)):
        assert torch.backends.cudnn.enabled == before
    assert torch.backends.cudnn.enabled == before


def test_the_features_of_packed_sequences_move():
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.cells, self.output = nn.Embedding(10, 6), nn.GRU(6, 8), nn.Linear(8, 3)

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(self.words(words), [5, 3, 2])
            return self.output(nn.utils.rnn.pad_packed_sequence(self.cells(packed)[0])[0])

    torch.manual_seed(fresh_seed())
    model, words = Packed().double(), torch.randint(0, 10, (5, 3))
    spec = fm.PermutationSpec.trace(model, words)
    assert set(spec.groups) == {"words", "cells"}
    assert fm.verify(model, spec, words).error < 1e-12
