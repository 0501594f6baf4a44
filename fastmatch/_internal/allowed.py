"""What options may be: words, suffixes of files, least numbers. The command line knows them before torch is loaded."""

from __future__ import annotations

from typing import Literal, TypeAlias

__all__ = [
    "DEMO_WIDTHS",
    "LEAST_ON_A_LINE",
    "LEAST_ON_A_SIDE",
    "PAGES",
    "PICTURES",
    "STATE_SUFFIXES",
    "TORCH_SUFFIXES",
    "Biases",
    "DeviceName",
    "Include",
    "Init",
    "Method",
    "Mode",
    "Reduce",
    "Similarity",
    "Site",
    "TargetMix",
    "Unread",
]

Biases: TypeAlias = Literal["average", "normalize", "remove"]
"""What a merge does with biases: average them; scale them down like the activations of a merge; or set them to zero."""

DeviceName: TypeAlias = Literal["cpu", "h100"]
"""The devices whose rates are known."""

Include: TypeAlias = Literal["weights", "affine", "statistics"]
"""The tensors that enter the objective. Each word adds to the one before: ``"weights"`` takes matrices and kernels;
``"affine"`` adds biases, norm scales and shifts (as Git Re-Basin does); ``"statistics"`` adds the running statistics
of batch norm (as some published ports do)."""

Init: TypeAlias = Literal["greedy", "identity"]
"""Where weight matching begins: ``"greedy"`` first matches the groups one after the other, each by the weights that
are known by then; ``"identity"`` begins with the units as they are, as published."""

Method: TypeAlias = Literal["auto", "repair", "rescale", "reshift", "reset", "least-squares"]
"""How a network is renormalized; see :class:`fastmatch.renorm.options.Renormalization`."""

Mode: TypeAlias = Literal["joint", "sequential"]
"""How the statistics of layers are measured: all in one read, or each after the layers before it are corrected."""

TargetMix: TypeAlias = Literal["weighted", "equal", "average"]
"""How the statistics of endpoints are mixed into the target."""

Reduce: TypeAlias = Literal["last", "first", "sum"]
"""What is done with several sites of one group (a residual stream): one is taken, or their similarities are added."""

Similarity: TypeAlias = Literal["correlation", "covariance", "inner", "batch-correlation", "cca"]
"""How similar two units are: ``"correlation"``, ``"covariance"`` and ``"inner"`` product are pooled over all samples;
``"batch-correlation"`` averages over batches (:class:`BatchPearson`); ``"cca"`` is the covariance after whitening
(:class:`WhitenedCovariance`)."""

Site: TypeAlias = Literal["post", "pre"]
"""Where activations are read at a nonlinearity: its output ("post") or its input ("pre")."""

Unread: TypeAlias = Literal["refuse", "hold", "ignore"]
"""What to do about parameters that were not read: raise, keep the groups they could share in place, or move on."""

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt"})
STATE_SUFFIXES = TORCH_SUFFIXES | {".safetensors"}
"""The suffixes of the files that :func:`fastmatch._internal.files.save_state` writes."""

PAGES = frozenset({".html", ".htm"})
"""The suffixes of reports."""

PICTURES = frozenset({".pdf", ".png", ".svg"})
"""The suffixes of pictures."""

LEAST_ON_A_LINE = 3
"""Points of a curve: its ends and one between them."""

LEAST_ON_A_SIDE = 2
"""Points on a side of a triangle: its corners."""

DEMO_WIDTHS = (128, 8192)
"""The least and the most units of the hidden layers of the demo's MLPs."""
