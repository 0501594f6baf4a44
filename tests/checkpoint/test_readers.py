"""Every reader takes a file as it was written, or refuses it with one kind of error that names it."""

from __future__ import annotations

import pytest
import torch

from fastmatch._internal.files import save_state
from helpers.networks import fresh_seed
from helpers.readers import READERS, judged

NEEDS = {"config": "transformers", "yaml_recipe": "yaml"}


def name_of(reader):
    return reader.__name__.removeprefix("read_")


@pytest.mark.parametrize("count", [120, pytest.param(5000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("reader", READERS, ids=name_of)
def test_a_changed_file_is_read_or_refused_by_name(tmp_path, reader, count):
    pytest.importorskip(NEEDS.get(name_of(reader), "torch"))
    assert judged(reader, tmp_path, count, fresh_seed()) > count / 10


CUT = """
import sys, torch
from fastmatch.checkpoint import Checkpoint
checkpoint = Checkpoint(sys.argv[1])
tensor = checkpoint["a"]
open(sys.argv[1], "r+b").truncate(100)
print(float(tensor.sum()))
try:
    checkpoint["a"]
except ValueError as error:
    print(error)
"""


def test_a_torch_file_that_is_cut_while_it_is_mapped_does_not_end_the_process(programs, tmp_path):
    path = tmp_path / "m.pt"
    save_state({"a": torch.ones(300, 300)}, path)
    done = programs.run(CUT, str(path))
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert float(first) == 90000
    assert second == f"{path}: tensor 'a': the file has changed since it was opened"
