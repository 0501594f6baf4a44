"""The commands and their summaries. Their modules import much of the library, so only that of the command that runs is loaded."""

from __future__ import annotations

__all__ = ["COMMANDS", "SUMMARIES", "module_of"]

COMMANDS: dict[str, dict[str, str]] = {
    "align": {
        "align": "align checkpoint B to checkpoint A by their weights or on data",
        "align-many": "bring several checkpoints into the first one's order of units",
    },
    "plan": {
        "plan": "predict time, memory and traffic of an alignment of directories on several ranks",
    },
    "apply": {
        "apply": "permute a checkpoint, or a LoRA that was trained on it, as `align --permutations` has found",
    },
    "merge": {
        "merge": "average aligned checkpoints; no data is read",
        "partial": "merge checkpoints from a layer on, keep the layers before it apart, and write an exported program",
    },
    "renormalize": {
        "renormalize": "give a merged or pruned checkpoint the activation statistics of its endpoints",
    },
    "pipeline": {
        "pipeline": "align, merge, renormalize, evaluate and report as a recipe says; recipe, model card and page go beside the output",
    },
    "evaluate": {
        "score": "loss, top-1 and top-5 accuracy of checkpoints",
        "curve": "loss, top-1 and top-5 accuracy on the line between two checkpoints",
        "triangle": "loss and accuracy over the triangle of three checkpoints",
        "layers": "per layer: variances, dead inputs and vanishing features on data",
        "distances": "L2 distances between checkpoints",
    },
    "inspect": {
        "inspect": "print a network's permutation groups and its pinned axes",
        "verify": "check that two checkpoints are the same function: run both on random inputs and compare all outputs",
    },
    "studies": {
        "demo": "train, align, merge and renormalize small networks on digits",
        "study": "measure the paper's claims on small networks and write an HTML report",
    },
    "bench": {
        "bench": "run the benchmark suites of a checkout and write a page of the results",
    },
    "run": {
        "run": "run a Python script with the assignment solvers of other libraries replaced by fastmatch's",
        "libraries": "list the libraries whose solvers `fastmatch run` replaces, and whether they are installed",
    },
    "warm_up": {
        "warm-up": "compile the kernels of the CPU before they are needed, as in the image of a container",
    },
    "complete": {
        "completion": "print a script that completes commands and options in a shell",
    },
}
"""Module of this package -> command -> what it does, in one line; in the order of the help."""

SUMMARIES = {name: summary for commands in COMMANDS.values() for name, summary in commands.items()}


def module_of(arguments: list[str]) -> str | None:
    """Return the module of the command that is asked for; None if there is none, or it is about all commands."""
    name = next((word for word in arguments if not word.startswith("-")), None)
    return next((module for module, commands in COMMANDS.items() if name in commands), None)
