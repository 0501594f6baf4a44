"""Activation sites are found by modules and parameters, whatever else a pass runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm
from fastmatch.spec import SiteReader
from fastmatch.studies.digits import Batches


class Branching(nn.Module):
    """Runs more or fewer operations before and between its layers, depending on the data; one layer may be left out."""

    def __init__(self):
        super().__init__()
        self.first, self.extra = nn.Linear(6, 16), nn.Linear(16, 16)
        self.second, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        if x.dtype != torch.float32:
            x = x.to(torch.float32) / 4
        if bool((x > 1).any()):
            x = torch.relu(x - 1) + x.clamp(max=1)
        is_large = float(x.mean()) > 1
        x = F.gelu(self.first(x))
        if is_large:
            x = x + F.gelu(self.extra(x))
        x = F.gelu(self.second(x))
        return self.last(F.gelu(self.norm(x)))


def loader():
    return [
        torch.randn(40, 6),
        torch.randn(40, 6).round(),
        (4 * torch.randn(40, 6)).to(torch.int32),
        3 + torch.randn(40, 6).abs(),
    ]


def planted(model, example, **options):
    spec = fm.PermutationSpec.trace(model, example, **options)
    hidden = fm.Alignment(spec.random(), spec)
    return spec, hidden, hidden.apply(model)


@pytest.mark.parametrize("site", ["post", "pre"])
@pytest.mark.parametrize("reduce", ["last", "first", "sum"])
def test_other_operations_elsewhere_do_not_disturb_matching(site, reduce):
    model = Branching().eval()
    example = fm.Examples(torch.full((2, 6), -0.5), 3 + torch.rand(2, 6))
    spec, hidden, permuted = planted(model, example)
    assert len(spec.groups) == 2
    found = fm.ActivationMatching(loader(), site=site, reduce=reduce).match(model, permuted, spec)
    for group, perm in hidden.invert().permutations.items():
        assert torch.equal(found.permutations[group], perm), group


def test_what_is_read_is_what_the_layers_compute_on_every_path():
    model = Branching().eval()
    spec = fm.PermutationSpec.trace(model, fm.Examples(torch.full((2, 6), -0.5), 3 + torch.rand(2, 6)))
    sites = [s for s in spec.sites if s.weight == "second.weight"]
    assert {s.role for s in sites} == {"consumed", "produced", "activation"}
    for x in loader():
        seen: dict[str, torch.Tensor] = {}
        hooked: list[torch.Tensor] = []
        handle = model.second.register_forward_hook(
            lambda m, i, o, h=hooked: h.extend([i[0].clone(), o.clone()])
        )
        with (
            torch.no_grad(),
            SiteReader(sites, lambda s, t, f=seen: f.setdefault(s.role, t.clone()), model) as reader,
        ):
            model(x)
        handle.remove()
        assert reader.reached == set(sites)
        assert torch.equal(seen["consumed"], hooked[0])
        assert torch.equal(seen["produced"], hooked[1])
        assert torch.equal(seen["activation"], F.gelu(hooked[1]))


class Early(nn.Module):
    """Ends early on small inputs."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, x):
        is_small = float(x.mean()) < 1
        x = F.gelu(self.first(x))
        if is_small:
            return self.last(x)
        return self.last(F.gelu(self.second(x)) + x)


def test_a_place_that_no_batch_reaches_is_named_and_one_that_some_reach_is_read():
    model = Early().eval()
    large, small = 20 * torch.rand(50, 6), 0.1 * torch.rand(50, 6)
    spec, hidden, permuted = planted(model, large[:2])
    found = fm.ActivationMatching([small, large], site="pre", reduce="sum").match(model, permuted, spec)
    for group, perm in hidden.invert().permutations.items():
        assert torch.equal(found.permutations[group], perm), group
    with pytest.raises(
        ValueError, match=r"data: no batch reaches aten\.\w+ after second.weight of model A, where group"
    ):
        fm.ActivationMatching([small], reduce="sum").match(model, permuted, spec)


@pytest.mark.parametrize("mixed", [False, True])
def test_padded_text_reads_the_units_that_whole_text_does(mixed):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).eval()
    ids = torch.randint(1, 40, (24, 9))
    mask = torch.ones_like(ids)
    whole = {"input_ids": ids, "attention_mask": mask.clone(), "labels": torch.zeros(24, dtype=torch.long)}
    for row in range(24):
        mask[row, 3 + row % 6 :] = 0
    data = [{"input_ids": ids, "attention_mask": mask}, *([whole] if mixed else [])]
    spec, _, permuted = planted(model, {"input_ids": ids[:2]})
    found = fm.ActivationMatching(data).match(model, permuted, spec)
    aligned = fm.Alignment(found.permutations, spec).apply(permuted)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(aligned.state_dict()[name], tensor)


def test_a_batch_of_other_strides_and_of_one_sample_is_read():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.head = nn.Linear(6, 12, bias=False), nn.Linear(12, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(F.gelu(self.down(F.gelu(self.up(x.transpose(1, 2))))))

    model = Mixer().eval()
    spec, hidden, permuted = planted(model, torch.randn(2, 6, 5))
    data = [
        torch.randn(20, 6, 5),
        torch.randn(1, 6, 5),
        torch.randn(6, 20, 5).transpose(0, 1),
        torch.randn(20, 6, 1),
    ]
    found = fm.ActivationMatching(data).match(model, permuted, spec)
    for group, perm in hidden.invert().permutations.items():
        assert torch.equal(found.permutations[group], perm), group


def test_autocast_weights_are_known_by_their_parameters():
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3)).eval()

    def forward(model, batch):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch[0])

    spec, hidden, permuted = planted(model, torch.randn(2, 6))
    for site in ("post", "pre"):
        matcher = fm.ActivationMatching(
            Batches(torch.randn(200, 6), torch.zeros(200), 50), site=site, forward=forward
        )
        found = matcher.match(model, permuted, spec)
        for group, perm in hidden.invert().permutations.items():
            assert torch.equal(found.permutations[group], perm), group
