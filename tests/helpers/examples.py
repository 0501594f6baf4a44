"""What the examples of docstrings and pages run with: two small trained networks, data, and checkpoints on disk."""

from __future__ import annotations

import ast
import copy
import doctest
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import fastmatch as fm

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "fastmatch", ROOT / "kernels/fastmatch_kernels")


def network() -> nn.Sequential:
    """A convolutional network with batch norm for 8 x 8 images of ten classes."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10),
    )  # fmt: skip


def batches(count: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 32 images: the prototype of a class, and noise."""
    prototypes = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(10, (32 * count,), generator=generator)
    inputs = prototypes[targets] + 0.7 * torch.randn(32 * count, 1, 8, 8, generator=generator)
    return list(zip(inputs.split(32), targets.split(32), strict=True))


@functools.cache
def trained(seed: int) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
    descent = torch.optim.Adam(model.parameters(), 5e-3)
    for inputs, targets in batches(8, seed=1) * 3:
        descent.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        descent.step()
    return model.eval()


def namespace() -> dict[str, Any]:
    """Return the names that an example may use without defining them.

    ``fm``, ``torch``, ``np``; ``model_a``, ``model_b``, ``model_c``: trained alike from different seeds; ``x``: two
    inputs; ``loader`` and ``test_loader``: lists of (inputs, targets).
    """
    models = {f"model_{letter}": copy.deepcopy(trained(seed)) for seed, letter in enumerate("abc")}
    data = {
        "loader": batches(4, seed=1),
        "test_loader": batches(2, seed=2),
        "x": batches(1, seed=3)[0][0][:2],
    }
    return {"__name__": "__main__", "fm": fm, "torch": torch, "np": np, **models, **data}


def prepare(folder: Path, text: str) -> None:
    """Write what the code in ``text`` reads: the folders ``model-a`` and ``model-b``, tiny Llamas of transformers."""
    if "model-a" not in text:
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        for seed, name in enumerate(("model-a", "model-b", "model-c")):
            if name in text:
                torch.manual_seed(seed)
                LlamaForCausalLM(config).save_pretrained(folder / name)


class AnyOutput(doctest.OutputChecker):
    """An example that shows no output may print any."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


STATEMENTS = ("body", "orelse", "handlers", "finalbody")
"""The parts of a statement that hold others: no docstring is inside an expression, of which there are far more."""


def docstrings() -> Iterator[doctest.DocTest]:
    """Yield every docstring of the packages that has an example, named ``module.object``."""
    parser = doctest.DocTestParser()

    def visit(node: ast.AST, name: str, path: Path) -> Iterator[doctest.DocTest]:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text and ">>>" in text:
                line = node.body[0].lineno - 1
                yield parser.get_doctest(text, {}, name, str(path.relative_to(ROOT)), line)
        for child in (x for part in STATEMENTS for x in getattr(node, part, ())):
            inner = getattr(child, "name", None)
            yield from visit(child, f"{name}.{inner}" if isinstance(inner, str) else name, path)

    for source in SOURCES:
        for path in sorted(source.rglob("*.py")):
            if ">>>" not in (text := path.read_text()):
                continue
            module = ".".join(path.relative_to(source.parent).with_suffix("").parts).removesuffix(".__init__")
            yield from visit(ast.parse(text), module, path)


def run_docstring(test: doctest.DocTest, folder: Path) -> str:
    """Run the examples of a docstring. Return what failed: file, line, example and error; empty if nothing did."""
    prepare(folder, test.docstring or "")
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE | doctest.REPORT_ONLY_FIRST_FAILURE
    runner, report = doctest.DocTestRunner(AnyOutput(), verbose=False, optionflags=flags), []
    test.globs = namespace()
    # TestResults.failed is 0 if every example ran and printed what it shows.
    failed = runner.run(test, out=report.append).failed
    return "".join(report) if failed else ""


def python_blocks(page: Path) -> list[tuple[int, str]]:
    """Return (line, code) of the Python blocks of a page, except after a comment ``<!-- not run: reason -->``."""
    text = page.read_text()
    pattern = r"(<!-- not run:[^>]*-->\n+)?^```python\n(.*?)^```"
    found = re.finditer(pattern, text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start(2)].count("\n") + 1, m[2]) for m in found if not m[1]]


def run_page(page: Path, folder: Path) -> None:
    """Run the Python blocks of a page one after the other. A traceback names the page and its line."""
    blocks = python_blocks(page)
    prepare(folder, "".join(code for _, code in blocks))
    names = namespace()
    for line, code in blocks:
        exec(compile("\n" * (line - 1) + code, str(page), "exec"), names)
