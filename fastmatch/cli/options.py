"""Options that several commands share, each defined once, and what can be told of them before torch is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_args

from fastmatch._internal.allowed import Include, Init, Method, Mode, Reduce, Similarity, Site
from fastmatch._internal.checks import check_integer, check_number
from fastmatch.cli.commands import SUMMARIES

if TYPE_CHECKING:
    import torch

__all__ = [
    "Commands",
    "add",
    "add_command",
    "add_matcher_options",
    "check_matcher",
    "device_from",
    "dtype_from",
]

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""The sub-commands of a parser, to which each module of this package adds its own."""

SHARED: dict[str, dict[str, Any]] = {
    "--model": {
        "metavar": "MODULE:CALLABLE",
        "help": "callable that returns the network, or (network, example inputs)",
    },
    "--input-shape": {
        "metavar": "SHAPE",
        "help": "shape of a random example input, such as 2,3,32,32; by default the inputs that --model returns",
    },
    "--data": {
        "metavar": "MODULE:CALLABLE",
        "help": "callable that returns a loader or a list of batches",
    },
    "--forward": {
        "metavar": "MODULE:CALLABLE",
        "help": "function of (model, batch) that runs the network on a batch; by default tensors, lists of inputs and "
        "mappings are passed as they are, without targets",
    },
    "--out": {
        "required": True,
        "metavar": "FILE",
        "help": "file to write: .safetensors, .ckpt, .pt, .pth or .bin",
    },
    "--force": {"action": "store_true", "help": "replace output files that exist"},
    "--weights": {
        "nargs": "+",
        "type": float,
        "metavar": "W",
        "help": "merge coefficients, one per checkpoint; equal ones by default",
    },
    "--plot": {"metavar": "FILE", "help": "also draw the result: .png, .svg or .pdf"},
    "--report": {
        "metavar": "FILE",
        "help": "also write a page of what was done, .html, and print its summary",
    },
    "--report-data": {
        "metavar": "MODULE:CALLABLE",
        "help": "of --report: callable that returns a loader of (inputs, targets), on which the result is measured",
    },
    "--points": {"type": int, "help": "number of points"},
    "--seed": {"type": int, "help": "seed of all random numbers"},
    "--renormalize": {"choices": get_args(Method), "help": "renormalize the merge by this method"},
    "--mode": {
        "choices": get_args(Mode),
        "help": "measure all layers in one read of the data, or each layer after correcting the earlier ones "
        "(default: joint)",
    },
    "--samples": {
        "type": int,
        "metavar": "N",
        "help": "calibrate on the first N samples; on all of them by default",
    },
}
"""Options of several commands. A command may change the help, the default and ``required``."""

PARTS: dict[str, tuple[str, ...]] = {
    "weights": ("WeightMatching",),
    "activations": ("ActivationMatching",),
    "fisher": ("FisherMatching", "WeightMatching"),
    "straight-through": ("StraightThrough", "WeightMatching"),
    "mixture": ("Mixture", "WeightMatching", "ActivationMatching"),
}
"""The words of ``--matcher`` -> the classes of the matchers whose options apply, the matcher itself first."""


@dataclass(frozen=True)
class MatcherOption:
    """An option that sets one field of a matcher.

    Attributes:
        owner: the class of the matcher.
        field: the field.
        default: of the field; the help shows it unless it is None.
        settings: what argparse needs: the help, and the type or the choices.
        check: raises ValueError for a name and a value that the field does not take; the matcher checks the same.
        is_inherited: whether matchers that use the owner for a part take the option too.
    """

    owner: str
    field: str
    default: object
    settings: dict[str, Any]
    check: Callable[[str, object], None] | None = None
    is_inherited: bool = True

    @property
    def flag(self) -> str:
        """The option's name on the command line."""
        return "--" + self.field.replace("_", "-")

    @property
    def words(self) -> list[str]:
        """The words of ``--matcher`` that take this option."""
        return [
            word for word, parts in PARTS.items()
            if self.owner in parts and (self.is_inherited or len(parts) == 1)
        ]  # fmt: skip


# parameters: a field of a matcher, its default and check, and how argparse adds it
def _option(
    owner: str,
    field: str,
    default: object,
    text: str,
    *,
    check: Callable[[str, object], None] | None = None,
    is_inherited: bool = True,
    **settings: Any,
) -> MatcherOption:
    """Return an option whose help names the default and the matchers that take it."""
    option = MatcherOption(owner, field, default, settings, check, is_inherited)
    words = ", ".join(option.words)
    shown = "" if default is None else f" (default: {default})"
    settings["help"] = f"{text}; of {words}{shown}"
    return option


def _check_share(name: str, value: object) -> None:
    """Raise ValueError unless the value is a number from 0 to below 1."""
    check_number(name, value)
    if value >= 1:  # type: ignore[operator]
        raise ValueError(
            f"{name}: expected a number from 0 to below 1 (--matcher activations matches by activations alone); got {value!r}"
        )


MATCHER_OPTIONS = (
    _option(
        "WeightMatching", "init", "greedy",
        "where weight matching starts: greedy, identity, or a .safetensors file of --permutations",
        metavar="WORD|FILE",
    ),
    _option(
        "WeightMatching", "max_sweeps", 100, "maximum number of passes over the groups", type=int, metavar="N",
        check=partial(check_integer, least=1),
    ),
    _option(
        "WeightMatching", "tolerance", 1e-12,
        "smallest rise of the objective that counts as progress, relative to the product of both networks' norms",
        type=float, metavar="X", check=check_number,
    ),
    _option(
        "WeightMatching", "include", "affine",
        "tensors in the objective: matrices and kernels only (weights), biases and norms too (affine), running "
        "statistics too (statistics)",
        choices=get_args(Include),
    ),
    _option(
        "WeightMatching", "balance", False, "compare networks whose units have incoming and outgoing weights of equal norms",
        is_inherited=False, action="store_const", const=True,
    ),
    _option(
        "WeightMatching", "seed", 0, "seed of the order in which groups are visited", type=int, metavar="N",
        check=check_integer,
    ),
    _option(
        "ActivationMatching", "similarity", "correlation", "how two units are compared", choices=get_args(Similarity)
    ),
    _option(
        "ActivationMatching", "site", "post", "read activations after (post) or before (pre) the nonlinearity",
        choices=get_args(Site),
    ),
    _option(
        "ActivationMatching", "reduce", "last",
        "which site of a group with several counts, or the sum of their similarities",
        choices=get_args(Reduce),
    ),
    _option(
        "ActivationMatching", "forward", None, "function of (model, batch) that runs the network on a batch",
        metavar="MODULE:CALLABLE",
    ),
    _option(
        "StraightThrough", "epochs", 5, "passes over the data", type=int, metavar="N", check=partial(check_integer, least=1)
    ),
    _option(
        "StraightThrough", "learning_rate", 1e-2, "step size of Adam", type=float, metavar="X",
        check=partial(check_number, exclusive=True),
    ),
    _option(
        "Mixture", "activation_weight", 0.5, "weight of the activations' term, from 0 to below 1", type=float,
        metavar="X", check=_check_share,
    ),
)  # fmt: skip


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of an option, unless it means that nothing was given; keeps the lines of examples."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        default = action.default
        if default is None or isinstance(default, bool) or default == [] or "(default:" in text:
            return text
        return super()._get_help_string(action)


# parameters: a command's name, what it does and says, and how argparse adds it
def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], Any],
    *,
    examples: Sequence[str] = (),
    outcome: bool = True,
    **settings: Any,
) -> argparse.ArgumentParser:
    """Add a command that calls ``run`` with the parsed arguments, and return its parser.

    Args:
        commands: the sub-commands of the root parser.
        name: of the command, whose summary is in :mod:`fastmatch.cli.commands`.
        run: called with the parsed arguments.
        examples: command lines after ``fastmatch``, shown under the help.
        outcome: whether the command has an outcome to say: it then takes ``--json``, ``--quiet`` and ``--verbose``.
        settings: of the parser.
    """
    summary = SUMMARIES[name]
    description = summary[0].upper() + summary[1:] + "."
    shown = "".join(f"\n  fastmatch {example}" for example in examples)
    command = commands.add_parser(
        name, help=summary, description=description, formatter_class=HelpFormatter,
        epilog=f"examples:{shown}" if shown else None, **settings,
    )  # fmt: skip
    command.set_defaults(run=run)
    if outcome:
        said = command.add_argument_group("what is said")
        said.add_argument("--json", action="store_true", help="print the outcome as one JSON object")
        how = said.add_mutually_exclusive_group()
        how.add_argument(
            "-q", "--quiet", action="store_true", help="print errors only: no summary, no progress bars"
        )
        how.add_argument(
            "-v",
            "--verbose",
            action="store_true",
            help="also print what the library logs, and tracebacks of errors",
        )
    return command


def add(command: argparse._ActionsContainer, *flags: str, **changes: Any) -> None:
    """Add shared options to a command, with changes to their settings."""
    for flag in flags:
        command.add_argument(flag, **{**SHARED[flag], **changes})


def add_matcher_options(command: argparse.ArgumentParser) -> None:
    """Add ``--matcher``, ``--data`` and the options of all matchers to a command."""
    group = command.add_argument_group("matcher", "how units are matched")
    group.add_argument("--matcher", choices=tuple(PARTS), help="how units are matched (default: weights)")
    data = dict(SHARED["--data"])
    data["help"] += "; needed by, and only taken by, the matchers that read data: all but weights"
    group.add_argument("--data", **data)
    for option in MATCHER_OPTIONS:
        group.add_argument(option.flag, **option.settings)


def check_matcher(args: argparse.Namespace) -> None:
    """Check the options of the matcher, as far as that needs no torch.

    Raises:
        ValueError: the matcher does not take an option that was given, or its value; or it needs data and none is given.
        FileNotFoundError: there is no file of ``--init``.
    """
    word = args.matcher or "weights"
    for option in MATCHER_OPTIONS:
        value = getattr(args, option.field)
        if value is not None and word not in option.words:
            raise ValueError(f"{option.flag}: is an option of --matcher {' or '.join(option.words)}")
        if value is not None and option.check is not None:
            option.check(option.field, value)
    if word == "weights" and args.data is not None:
        words = [name for name in PARTS if name != "weights"]
        raise ValueError(f"--data: is an option of --matcher {' or '.join(words)}")
    if word != "weights" and args.data is None:
        raise ValueError(f"--data: --matcher {word} needs a loader, as module:callable")
    if args.init is None or args.init in get_args(Init):
        return
    if not args.init.endswith(".safetensors"):
        raise ValueError(
            f"--init: expected greedy, identity or a .safetensors FILE of --permutations; got {args.init!r}"
        )
    if not Path(args.init).is_file():
        raise FileNotFoundError(f"{args.init}: no such file")


def dtype_from(name: str | None) -> torch.dtype | None:
    """Return torch's floating point type of that name; None for None.

    Raises:
        ValueError: there is no such type.
    """
    if name is None:
        return None
    import torch

    dtype = getattr(torch, name, None)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"--dtype: expected a floating point type such as bfloat16, got {name!r}")
    return dtype


def device_from(name: str | None) -> str:
    """Return the name of a device that tensors can be put on; the CPU for None.

    Raises:
        ValueError: torch has no such device here.
    """
    if name is None:
        return "cpu"
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: cannot be used here, got {name!r} ({reason})") from error
    return name
