"""Merge coefficients by block: patterns of names, or the numbers that people write for the blocks of a UNet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from fastmatch.checkpoint.diffusion.single_file import running_means

__all__ = ["Blocks", "coefficients_by_name", "unet_blocks"]

Blocks = Mapping[str, float | Sequence[float]]
"""Pattern of names -> the weights of all checkpoints but the first; one number if there are two checkpoints."""

BLOCK = re.compile(r"(?:^|\.)(input_blocks|middle_block|output_blocks)\.(\d+)\.")


def unet_blocks(numbers: Sequence[float], names: Iterable[str]) -> dict[str, float]:
    """Return the customary numbers for the blocks of a UNet as patterns of names.

    They are the input blocks in order, the middle block, and the output blocks: 25 for Stable Diffusion 1 and 2, 19 for XL.
    The embedding of the time and what is added to it follow the first input block, the output layer the last output block.

    Args:
        numbers: one weight per block.
        names: of the tensors in a file with the names of CompVis or Stability.

    Raises:
        ValueError: there is no such UNet, or it has another number of blocks.
    """
    names = list(names)
    found: dict[str, set[int]] = {"input_blocks": set(), "middle_block": set(), "output_blocks": set()}
    for name in names:
        match = BLOCK.search(name)
        if match:
            found[match[1]].add(int(match[2]))
    inputs, outputs = len(found["input_blocks"]), len(found["output_blocks"])
    if not inputs or not outputs:
        raise ValueError("blocks: numbers are for a UNet with input_blocks and output_blocks; write patterns")
    if len(numbers) != inputs + 1 + outputs:
        raise ValueError(
            f"blocks: expected {inputs + 1 + outputs} numbers ({inputs} input blocks, the middle block, {outputs} output "
            f"blocks), got {len(numbers)}"
        )
    first, last = numbers[0], numbers[-1]
    # Files of a UNet alone have no prefix, and not every UNet has a label_emb.
    patterns = {f"*input_blocks.{i}.*": numbers[i] for i in range(inputs)}
    patterns |= {"*middle_block.*": numbers[inputs]}
    patterns |= {f"*output_blocks.{i}.*": numbers[inputs + 1 + i] for i in range(outputs)}
    ends = {"time_embed.*": first, "label_emb.*": first, "out.*": last}
    patterns |= {f"{start}{k}": v for start in ("*diffusion_model.", "") for k, v in ends.items()}
    return {p: v for p, v in patterns.items() if any(fnmatchcase(name, p) for name in names)}


def _numbers(pattern: str, value: object) -> tuple[float, ...]:
    values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    try:
        return tuple(float(x) for x in values)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"blocks[{pattern!r}]: expected a number, or one for each checkpoint but the first; got {value!r}"
        ) from error


def coefficients_by_name(
    names: Iterable[str], weights: Sequence[float], blocks: Blocks | None
) -> dict[str, tuple[float, ...]]:
    """Return the weights of all checkpoints but the first, for the names that a pattern decides; ``weights`` are for the others.

    The first pattern that fits a name counts. A running mean has no dots in its name: a pattern that fits the weight that it follows fits it
    as well.

    Raises:
        TypeError, ValueError: a pattern fits no name, or has another number of weights.
    """
    names = list(names)
    followed = {mean: name for name, mean in running_means(names, dict.fromkeys(names, ())).items()}
    found: dict[str, tuple[float, ...]] = {}
    for pattern, value in (blocks or {}).items():
        own = _numbers(pattern, value)
        if len(own) != len(weights):
            raise ValueError(
                f"blocks[{pattern!r}]: expected {len(weights)} numbers, one for each checkpoint but the first, got {len(own)}"
            )
        if not all(abs(x) < float("inf") for x in own):
            raise ValueError(f"blocks[{pattern!r}]: expected finite numbers, got {own}")
        fits = [n for n in names if fnmatchcase(n, pattern) or fnmatchcase(followed.get(n, n), pattern)]
        if not fits:
            raise ValueError(f"blocks[{pattern!r}]: fits no tensor")
        for name in fits:
            found.setdefault(name, own)
    return found
