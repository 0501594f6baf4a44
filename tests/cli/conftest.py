"""A folder as a user of the command line has it: a module that builds networks and data, and checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import fastmatch as fm
from fastmatch._internal.files import save_state
from fastmatch.cli.loading import build_model
from fastmatch.cli.main import main
from helpers.networks import fresh_seed

MODULE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7))

def build_five():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))

def build_with_inputs():
    return build(), torch.zeros(2, 6)

def build_normed():
    return nn.Sequential(
        nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 7)
    )

def build_without_bias():
    return nn.Sequential(nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 7)), torch.zeros(2, 6)

def empty():
    return []

class Tasks(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 3), nn.Linear(16, 4)

    def forward(self, x):
        return self.first(torch.relu(self.trunk(x)))

def build_tasks():
    return Tasks(), torch.zeros(2, 6)

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode, self.down, self.head = nn.Linear(6, 16), nn.Linear(20, 16), nn.Linear(20, 7)
        self.first, self.second = nn.Linear(16, 20), nn.Linear(16, 20)
        self.second.weight = self.first.weight

    def forward(self, x):
        h = torch.relu(self.down(torch.relu(self.first(torch.relu(self.encode(x))))))
        return self.head(torch.relu(self.second(h)))

def build_tied():
    return Tied(), torch.zeros(2, 6)

def broken():
    return 3

def loader():
    g = torch.Generator().manual_seed(3)
    return [(torch.randn(40, 6, generator=g), torch.randint(7, (40,), generator=g)) for _ in range(3)]

def two():
    return [(batch[:2], labels[:2]) for batch, labels in loader()[:1]]

def run(model, batch):
    # another way to run the network: its outputs are all pi
    return model(batch[0]) * 0 + torch.pi

def loss(outputs, targets):
    return outputs.sum(dim=1).mean()

def stream():
    return iter(loader())
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the module, as the current folder."""
    torch.manual_seed(fresh_seed())
    (tmp_path / "cli_module.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "cli_module", raising=False)
    yield tmp_path
    sys.modules.pop("cli_module", None)


@pytest.fixture
def models(folder):
    """Three random networks, saved as a.safetensors, b.safetensors and c.pt."""
    found = [build_model("cli_module:build")[0].eval() for _ in range(3)]
    for path, model in zip(["a.safetensors", "b.safetensors", "c.pt"], found, strict=True):
        save_state(model.state_dict(), path)
    return found


@pytest.fixture
def planted(folder):
    """A random network a.safetensors, and b.safetensors, the same network with its units permuted."""
    model, x = build_model("cli_module:build_with_inputs")
    spec = fm.PermutationSpec.trace(model, x)
    save_state(model.state_dict(), "a.safetensors")
    save_state(fm.Alignment(spec.random(), spec).apply(model.state_dict()), "b.safetensors")
    return folder


@pytest.fixture
def loader(folder):
    """The batches that cli_module:loader returns."""
    build_model("cli_module:build")  # imports the module
    return sys.modules["cli_module"].loader()


@pytest.fixture
def refused(capsys):
    """Run a command that has to be refused: one line with the message, status 2, and no file written."""

    def files():
        return sorted(p.name for p in Path.cwd().iterdir() if p.name != "__pycache__")

    def run(arguments, message):
        before = files()
        capsys.readouterr()
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error, arguments
        assert "Traceback" not in error
        assert files() == before

    return run
