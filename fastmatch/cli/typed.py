"""Errors and warnings of the library in the words of the command line: options in the place of arguments of Python."""

from __future__ import annotations

import argparse
import re

__all__ = ["as_typed"]

NAMED = {
    "example_inputs": ("input_shape", "model"),
    "method": ("method", "renormalize"),
    "model_a": ("a",),
    "model_b": ("b",),
    "models": ("models", "checkpoints"),
    "path_a": ("a",),
    "path_b": ("b",),
    "paths": ("checkpoints",),
    "start_at": ("start_at", "keep"),
}
"""An argument of the library -> the options and arguments of commands that set it, where they are called otherwise."""

OF_FILES = ("pipeline",)
"""Commands whose errors name keys of a file, but for options that were typed."""

IN_PYTHON = ("forward", "labels", "mode", "only", "unread", "verify")
"""Arguments that advice is about. Where a command has no option for one, the advice is left out."""

CALL = re.compile(r"[\w.]+\((?:\.\.\., ([^()]*)|([^()]*), \.\.\.)\)")
"""A call that shows one argument: ``trace(..., unread='hold')``."""

KEYED = re.compile(r"""\bmodels\[(['"])(.*?)\1\]""")
"""A model that the library knows by a name: the path that was typed."""

VALUE = r"""(True|False|"[\w-]+"|'[\w-]+'|\[[\d., ]+\]|\d[\d.]*\b|(?=[\s);,.]|$))"""


def as_typed(text: str, args: argparse.Namespace) -> str:
    """Return a message of the library with the options and paths of a command line in the place of its arguments.

    ``max_sweeps: expected ...`` becomes ``--max-sweeps: expected ...``, ``endpoints[1]: ...`` begins with the path of the second
    endpoint, and ``pass force=True`` becomes ``pass --force``. What the command line says itself is left as it is.
    """
    if text.startswith("--"):
        return text
    (commands,) = (a.choices for a in args.grammar._actions if isinstance(a, argparse._SubParsersAction))
    words = _Words(args, {action.dest: action for action in commands[args.command]._actions})
    begin = re.match(r"(\w+)(?:\[(\d+)\])?(?=: )", text)
    if begin and begin[1] not in args.arguments:  # a path may be called like an argument
        text = words.named(begin[1], begin[2], begin[0]) + text[begin.end() :]
    text = KEYED.sub(r"\2", text)
    text = CALL.sub(lambda match: match[1] or match[2], text)
    for name in IN_PYTHON:
        if words.flag(name) is None and words.flag(f"no_{name}") is None:
            text = re.sub(rf"[;,.] (?:or )?(?:pass |give |use )?{name}=[^;.()]*", "", text)
    text = re.sub(rf"\b([a-z_]+)={VALUE}", lambda match: words.given(match[1], match[2]) or match[0], text)
    for name in (*words.actions, *NAMED):
        flag = words.flag(name)
        if "_" in name and flag is not None:
            text = re.sub(rf"""(?<![\w./'"-]){name}(?![\w./'"(\[])""", flag, text)
    return re.sub(r"(--[\w-]+) \(\1\)", r"\1", text)


class _Words:
    """What a command calls the arguments of the library."""

    def __init__(self, args: argparse.Namespace, actions: dict[str, argparse.Action]) -> None:
        self.args, self.actions = args, actions

    def _action(self, name: str) -> tuple[argparse.Action | None, bool]:
        """Return the option or argument that sets an argument of the library, and whether it was typed."""
        known = [self.actions[dest] for dest in NAMED.get(name, (name,)) if dest in self.actions]
        typed = [action for action in known if getattr(self.args, action.dest, None) != action.default]
        return (typed or known or [None])[0], bool(typed)

    def flag(self, name: str) -> str | None:
        """Return the option that sets an argument; None if there is none."""
        action, _ = self._action(name)
        return action.option_strings[-1] if action is not None and action.option_strings else None

    def named(self, name: str, index: str | None, text: str) -> str:
        """Return what begins an error about an argument, or about one of its elements; ``text`` if nothing was typed for it."""
        action, is_typed = self._action(name)
        if action is None or (self.args.command in OF_FILES and not is_typed):
            return text
        value = getattr(self.args, action.dest, None)
        if index is not None and isinstance(value, list) and int(index) < len(value):
            return str(value[int(index)])
        if action.option_strings:
            whose = " (its example inputs)" if name == "example_inputs" and action.dest == "model" else ""
            return action.option_strings[-1] + whose
        return value if isinstance(value, str) else action.dest

    def given(self, name: str, value: str) -> str | None:
        """Return an argument with a value as it is typed; None if there is no option for it."""
        if value == "False":
            return self.flag(f"no_{name}")
        action, _ = self._action(name)
        if action is not None and action.type is None and re.fullmatch(r"[\d.]+", value):
            return None  # it is of another function, such as the groups=1 of a convolution
        flag = self.flag(name)
        word = "" if value == "True" else re.sub(r"""["'\[\],]""", "", value)
        return flag and f"{flag} {word}".rstrip()
