"""Prove that permuting a network by a spec does not change its function."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmatch._internal.callers import warn_user
from fastmatch._internal.modules import copy_module, to_eval_mode, with_state
from fastmatch._internal.states import check_module, state_of
from fastmatch._internal.words import error_line
from fastmatch.permutations.apply import apply_permutations
from fastmatch.permutations.disturb import (
    RoundedSums,
    disturb_weights,
    disturbed,
    other_batches,
    round_weights,
    with_rows,
)
from fastmatch.permutations.precise import (
    absolute_difference,
    double_copy,
    in_double,
    largest,
    outputs_of,
)
from fastmatch.spec import Permutations, PermutationSpec
from fastmatch.spec.checks import check_spec
from fastmatch.spec.running import examples_of

__all__ = ["Verification", "joined", "verify"]

ROUNDS = 3
"""Comparisons for each example: with the model's weights, and with disturbed weights and inputs."""

ROUNDING = 4096
"""Rounding errors of the largest output that are always allowed: what sums in another order differ by."""

CANCELLING = 64
"""Rounding errors of the largest value inside that an output of zero may differ by."""

NOISE_DRAWS = 3
MATRIX_DRAWS = 16
"""How often rounding is drawn: more often where a matrix function may choose a sign by it, which it does not in every draw."""

NOISE_FACTOR = 1000
"""How many times the change that rounding errors of weights and sums cause may be the error."""

MOST = {torch.float64: 1e-4, torch.float32: 1e-2}
"""The largest error that rounding is accepted as the cause of, relative to the largest output. Beyond, it is a jump."""

MORE_ROUNDS = 6
"""Comparisons with other disturbed weights at most, in the place of those in which rounding alone makes the outputs jump."""


@dataclass(frozen=True)
class Verification:
    """The outcome of :func:`verify`.

    Attributes:
        error: the largest difference of the outputs, relative to the largest output.
        groups: the groups that moved.
        dtype: the type that the model was run in: float64, or float32 for a model that runs in nothing else.
        compared: comparisons that agree.
        jumps: comparisons that show nothing, because the outputs differ and rounding alone makes them jump as far.
    """

    error: float
    groups: tuple[str, ...]
    dtype: torch.dtype = torch.float64
    compared: int = 0
    jumps: int = 0


def verify(
    model: nn.Module,
    spec: PermutationSpec,
    example_inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    outputs: Sequence[str] | None = None,
    seed: int = 0,
    tolerance: float | None = None,
) -> Verification:
    """Permute every group of a model at random and compare the outputs, in float64.

    For each example the model runs with its own weights, and twice with disturbed weights and inputs, so that no axis
    is missed because its entries are all alike. On the CPU these two have as many rows as the next multiple of
    six, and one, if the model runs on them, because it may choose a path by the size of a batch. Random numbers that the model draws are the same in every pass. Where the
    outputs differ, but rounding alone makes them jump as far, a comparison shows nothing: up to six with other disturbed
    weights take the place of such ones, and a warning tells if no more agree than jump.

    Example:
        >>> spec = fm.PermutationSpec.trace(model_a, x)
        >>> fm.verify(model_a, spec, x).error < 1e-10
        True

    Args:
        model: the model, which is not changed; a float64 copy is run six times per example in eval mode.
        spec: which axes move together.
        example_inputs: a tensor, a tuple of positional inputs, or several of these as :class:`Examples`.
        kwargs: keyword inputs.
        outputs: which outputs to compare, as for :meth:`PermutationSpec.trace`; all of them for None.
        seed: of the permutations, the disturbed weights, and the random numbers that the model draws.
        tolerance: the largest difference allowed, relative to the largest output. None: what rounding can explain,
            by the size of the outputs and by how much rounding errors of the weights change them.

    Returns:
        A :class:`Verification`.

    Raises:
        ValueError: the outputs differ (the groups that change them by themselves are named); rounding alone makes them jump
            in all comparisons, so there is no proof; the model runs in neither float64 nor float32, or it returns nothing that
            can be compared.
        TypeError: ``model`` is not a torch module, or it is a TorchScript module.
    """
    check_module(model, "model")
    check_spec(spec, state_of(model, "model"), "model")
    examples = examples_of(example_inputs, kwargs)
    proof, first = _proof(model, spec, examples[0], outputs, seed, tolerance)
    generator = torch.Generator("cpu").manual_seed(seed)
    errors: list[float] = []
    jumps, jump = 0, None
    for number in range(ROUNDS + MORE_ROUNDS):
        enough = not jumps or len(errors) >= max(ROUNDS * len(examples), jumps + 1)
        if number >= ROUNDS and enough:
            break
        for k, example in enumerate(examples):
            try:
                if number:
                    batches = other_batches(example)
                    rows = batches[number - 1] if number <= len(batches) else None
                    error = proof.compare_disturbed(example, generator, rows)
                else:
                    expected = first if k == 0 else proof.run(proof.model, example)
                    error = proof.compare(proof.model, example, expected, tell=True)
                errors += [] if error is None else [error]
            except _JumpsError as found:
                jumps += 1
                jump = jump or found.with_traceback(None)  # a traceback holds the models of its frames
    if jump is not None and not errors:
        raise ValueError(
            f"spec: whether permuting changes the network's function cannot be shown: in all comparisons ({jumps}) {jump.clause()}. "
            "Give other example inputs, or pass verify=False to go on without the proof"
        )
    if len(errors) <= jumps:
        warn_user(
            f"model: in {jumps} of {len(errors) + jumps} comparisons rounding alone makes its outputs jump, so "
            f"these do not show whether permuting changes its function; the proof rests on {len(errors)} others"
        )
    return Verification(max(errors), tuple(spec.groups), proof.dtype, len(errors), jumps)


def joined(proofs: Sequence[Verification], groups: Iterable[str]) -> Verification:
    """Return one :class:`Verification` of several networks that make up a checkpoint."""
    return Verification(
        max(proof.error for proof in proofs),
        tuple(groups),
        compared=sum(proof.compared for proof in proofs),
        jumps=sum(proof.jumps for proof in proofs),
    )


class _JumpsError(Exception):
    """The outputs differ, and so they do by rounding alone."""

    def __init__(self, judge: _Judge, permutations: Permutations) -> None:
        super().__init__()
        self._judge, self._permutations = judge, permutations

    def clause(self) -> str:
        """Return what happened as a clause. To find the groups takes some passes for each of them."""
        guilty = self._judge.guilty(self._permutations, list(self._permutations))
        moved = _listed(guilty) or "several groups together"
        return f"permuting {moved} changes the outputs, and rounding alone makes them jump"


def _listed(guilty: Mapping[str, float]) -> str:
    return ", ".join(f"{name!r} (relative error {error:.2g})" for name, error in guilty.items())


def _proof(
    model: nn.Module, spec: PermutationSpec, example: Any, outputs: Any, seed: int, tolerance: float | None
) -> tuple[_Proof, list[torch.Tensor]]:
    """Return a proof in float64, or in float32 if the model runs in nothing else, and the outputs on the example."""
    try:
        double = double_copy(model)
        proof = _Proof(double, spec, torch.float64, outputs, seed, tolerance)
        return proof, proof.run(proof.model, example)
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"model: no memory for a run of its float64 copy ({error}); verify a copy on the CPU, or pass verify=False "
            "to go on without the proof"
        ) from error
    except Exception as error:
        narrow = _Proof(
            to_eval_mode(copy_module(model)).float(), spec, torch.float32, outputs, seed, tolerance
        )
        try:
            return narrow, narrow.run(narrow.model, example)
        except Exception as other:
            if isinstance(other, ValueError) and str(other) == str(error):
                raise
            raise ValueError(
                f"model: runs in neither float64 nor float32 on the example inputs ({error_line(error)}); "
                "pass verify=False to go on without the proof"
            ) from error


@dataclass(frozen=True)
class _Proof:
    """A model in the type it is compared in, and how it is run and judged."""

    model: nn.Module
    spec: PermutationSpec
    dtype: torch.dtype
    outputs: Sequence[str] | None
    seed: int
    tolerance: float | None

    def run(self, model: nn.Module, example: tuple[Any, Any]) -> list[torch.Tensor]:
        """Return the outputs of a model on an example, every time with the same random numbers."""
        wide = self.dtype == torch.float64
        args, kwargs = in_double(example) if wide else example
        return outputs_of(model, args, kwargs, self.outputs, wide=wide, seed=self.seed)

    def moved(self, model: nn.Module, permutations: Permutations) -> nn.Module:
        return with_state(model, apply_permutations(state_of(model, "model"), self.spec, permutations))

    def compare(
        self,
        model: nn.Module,
        example: tuple[Any, Any],
        expected: list[torch.Tensor],
        *,
        tell: bool,
        told: str = "",
    ) -> float | None:
        """Return the error of random permutations of every group; ``expected`` are the model's own outputs.

        None if they hold no finite number, so that there is nothing to compare; an error if ``tell``.

        Raises:
            ValueError: rounding cannot explain it, or there is nothing to compare. ``told`` is added to what it says.
            _JumpsError: the outputs jump by rounding alone, so the comparison shows nothing.
        """
        if not _shows(expected):
            if not tell:
                return None
            raise ValueError(
                "example_inputs: the model returns no finite number on them, so there is nothing to compare; "
                "give other inputs, or pass verify=False to go on without the proof"
            )
        permutations = self.spec.random(torch.Generator("cpu").manual_seed(self.seed))
        judge = _Judge(self, model, example, expected)
        error = judge.error(permutations)
        if not error <= judge.limit:
            if judge.jumps:
                raise _JumpsError(judge, permutations)
            named = _listed(judge.guilty(permutations, list(permutations)))
            raise ValueError(
                f"spec: permuting changes the network's function{told}; group {named or 'several of them together'}. "
                f"The outputs differ by {error:.2g} relative to the largest or to what rounding explains; "
                f"at most {judge.limit:.2g} is allowed. The trace did not see that the order of units matters, as it does for "
                "a branch on one unit's value or an index that is computed in Python; spec.select([...]) matches the other groups"
            )
        return error

    def compare_disturbed(
        self, example: tuple[Any, Any], generator: torch.Generator, rows: int | None
    ) -> float | None:
        """Compare with disturbed weights and inputs, of ``rows`` rows; with simpler ones where those show nothing.

        None if none shows anything: the model refuses them, or returns no finite number.
        """
        model = copy_module(self.model)
        disturb_weights(model, generator)
        other = disturbed(example, generator)
        if rows is not None:
            batch = disturbed(with_rows(example, rows), generator)
            expected = self._shown(model, batch)
            if expected is not None:
                try:
                    return self.compare(model, batch, expected, tell=False)
                except ValueError:
                    with suppress(_JumpsError):  # what differs there as well is told without the batch
                        self._compare_first(model, (other, example))
                    told = f" on a batch of {rows} (the example's rows, disturbed; fm.Examples(x, y) traces it on several sizes)"
                    return self.compare(model, batch, expected, tell=False, told=told)
        return self._compare_first(model, (other, example))

    def _compare_first(self, model: nn.Module, several: Iterable[tuple[Any, Any]]) -> float | None:
        """Compare on the first inputs that show something; None if none do."""
        for inputs in several:
            expected = self._shown(model, inputs)
            if expected is not None:
                return self.compare(model, inputs, expected, tell=False)
        return None

    def _shown(self, model: nn.Module, inputs: tuple[Any, Any]) -> list[torch.Tensor] | None:
        """Return the outputs; None if the model refuses the inputs, or returns no finite number."""
        try:
            outputs = self.run(model, inputs)
        except Exception:
            return None
        return outputs if _shows(outputs) else None


def _shows(outputs: list[torch.Tensor]) -> bool:
    return any(bool(torch.isfinite(t).any()) for t in outputs)


class _Judge:
    """Says whether the outputs of a permuted model differ by more than rounding explains."""

    def __init__(
        self, proof: _Proof, model: nn.Module, example: tuple[Any, Any], expected: list[torch.Tensor]
    ) -> None:
        self._proof, self._model, self._example, self._expected = proof, model, example, expected
        self._epsilon = torch.finfo(proof.dtype).eps
        self._noise: list[float] | None = None
        self.limit = ROUNDING * self._epsilon if proof.tolerance is None else proof.tolerance
        self.jumps = False

    def error(self, permutations: Permutations) -> float:
        """Return the largest error, relative to the largest output or to what rounding makes of it."""
        moved = self._proof.moved(self._model, permutations)
        outputs = self._proof.run(moved, self._example)
        differences = [absolute_difference(x, y) for x, y in zip(self._expected, outputs, strict=True)]
        scales = [largest(t) for t in self._expected]
        errors = [d / s for d, s in zip(differences, scales, strict=True)]
        if self._proof.tolerance is None and not max(errors, default=0.0) <= self.limit:
            scales = [max(s, n / self.limit) for s, n in zip(scales, self._explained(), strict=True)]
            errors = [d / s for d, s in zip(differences, scales, strict=True)]
        return max(errors, default=0.0)

    def _explained(self) -> list[float]:
        """Return, for every output, the difference that rounding can explain: measured, and at most so much."""
        if self._noise is None:
            worst = [0.0] * len(self._expected)
            most = [MOST[self._proof.dtype] * largest(t) for t in self._expected]
            for draw in range(MATRIX_DRAWS):
                found, decided = self._rounded(self._proof.seed + draw)
                worst = [max(a, b) for a, b in zip(worst, found, strict=True)]
                self.jumps = any(n > m for n, m in zip(worst, most, strict=True))
                if draw + 1 >= NOISE_DRAWS and (self.jumps or not decided):
                    break
            inside = _largest_inside(self._proof, self._model, self._example)
            self._noise = [
                max(min(NOISE_FACTOR * n, m), self._cancelled(n, inside))
                for n, m in zip(worst, most, strict=True)
            ]
        return self._noise

    def _rounded(self, seed: int) -> tuple[list[float], bool]:
        """Return the differences that other rounding makes, and whether a matrix function had a part in them.

        They are infinite if the model refuses what it is rounded to, such as a matrix that is no longer positive definite.
        """
        model = copy_module(self._model)
        generator = torch.Generator("cpu").manual_seed(seed)
        round_weights(model, self._epsilon, generator)
        with RoundedSums(self._epsilon, generator) as sums:
            try:
                outputs = self._proof.run(model, self._example)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                return [float("inf")] * len(self._expected), sums.decided
        found = [absolute_difference(x, y) for x, y in zip(self._expected, outputs, strict=True)]
        return found, sums.decided

    def _cancelled(self, noise: float, inside: float) -> float:
        """Return the difference to expect where terms as large as ``inside`` cancel: an output of zero up to rounding."""
        if noise == 0:
            return CANCELLING * self._epsilon * inside
        return min(ROUNDING * self._epsilon * inside, NOISE_FACTOR * noise)

    def guilty(self, permutations: Permutations, names: list[str]) -> dict[str, float]:
        """Return the groups that change the function by themselves, found by halves, with their errors."""
        identity = self._proof.spec.identity()
        error = self.error({**identity, **{name: permutations[name] for name in names}})
        if error <= self.limit:
            return {}
        if len(names) == 1:
            return {names[0]: error}
        middle = len(names) // 2
        return {
            **self.guilty(permutations, names[:middle]),
            **self.guilty(permutations, names[middle:]),
        }


def _largest_inside(proof: _Proof, model: nn.Module, example: tuple[Any, Any]) -> float:
    """Return the largest value that a module inside the model computes: terms of that size may cancel in the output."""
    found = [0.0]

    def note(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.numel() and not output.is_complex():
            found.append(largest(output.double()))

    handles = [module.register_forward_hook(note) for module in model.modules()]
    try:
        proof.run(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return max(found)
