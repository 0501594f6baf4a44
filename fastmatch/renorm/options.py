"""The options of a renormalization, checked together when they are written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fastmatch._internal.allowed import Method, Mode, TargetMix
from fastmatch._internal.checks import check_choice, check_integer, check_number, check_type
from fastmatch.renorm.published import Published

__all__ = ["RIDGE", "Method", "Mode", "Renormalization", "TargetMix", "renormalization_of"]

RIDGE = 1e-3
"""Of the mean variance of a layer's inputs."""


@dataclass(frozen=True)
class Renormalization:
    """How to renormalize: the method, how its statistics are measured, and what they are brought to.

    Example:
        >>> options = fm.Renormalization("repair", mode="sequential", samples=512)
        >>> merged = fm.merge([model_a, model_b])
        >>> repaired = fm.renormalize(merged, [model_a, model_b], loader, options)

    Attributes:
        method: ``"repair"``, ``"rescale"`` or ``"reshift"``, which scale and shift channels; ``"reset"``, which
            measures the running statistics of batch norms again; ``"least-squares"``, which fits each layer's weights to
            the mean of the endpoints' outputs (:mod:`fastmatch.renorm.least_squares`); or ``"auto"``, which chooses among
            them, except ``"reshift"``, by what they do on the data (see :func:`fastmatch.plan_renormalization`).
        mode: ``"joint"`` treats one batch at a time and lets its own statistics stand for the data's, so batches
            should be large; it needs the memory of one batch. ``"sequential"`` measures each layer over all
            batches, after the layers before it are corrected. It is exact for any batch size, and needs the
            memory of all batches' activations at one layer. ``"least-squares"`` takes the endpoints' mean inputs in joint
            mode, which needs the memory of one batch, and then measures batch norms in another read. In sequential mode it takes the inputs that the merge itself gives
            after the layers before are fitted, and measures batch norms on the way.
        samples: calibrate on this many samples from the front of the data; None reads all of it.
        layers: names of the linear and convolution layers to renormalize; None takes all that can be. ``"published"``
            takes those of the paper's code: convolutions, without the stem and the shortcuts of a residual network.
        target: how the endpoints' statistics are mixed into the target: ``"weighted"`` by the weights of the
            merge, or ``"equal"``, which counts every endpoint equally at any weights. ``"average"`` also makes the
            channels of a layer alike, as the paper's code does: ``sigma*`` becomes the layer's mean, and ``mu*`` the mean
            of ``|mu*|`` with the channel's sign.
        std_factor: multiplies the target standard deviation. Above 1, activations of the merge spread more than
            those of the endpoints. (The factor of the paper's code multiplies the mean too.)
        ridge: of ``"least-squares"``: how much weights that stay near the merge's count, as a fraction of the mean variance of a
            layer's inputs. Take more if there are few samples.
        restore_variance: of ``"least-squares"``: scale each output of a layer until its variance is that of its target. A fit alone
            has less, since it loses what the layer's inputs do not tell.

    Raises:
        ValueError: a value is out of range, or the method does not use the option: ``"reset"`` has no
            layers, target or factor, ``"reshift"`` has no factor, ``"least-squares"`` has no target or factor, and
            ``ridge`` and ``restore_variance`` are its own.
    """

    method: Method = "auto"
    mode: Mode = "joint"
    samples: int | None = None
    layers: Sequence[str] | Published | None = None
    target: TargetMix = "weighted"
    std_factor: float = 1.0
    ridge: float = RIDGE
    restore_variance: bool = True

    def __post_init__(self) -> None:
        check_choice("method", self.method, Method)
        check_choice("mode", self.mode, Mode)
        if self.samples is not None:
            check_integer("samples", self.samples, least=1)
        check_choice("target", self.target, TargetMix)
        check_number("std_factor", self.std_factor, exclusive=True)
        if self.layers is not None and self.layers != "published":
            is_sequence = isinstance(self.layers, Iterable) and not isinstance(self.layers, str)
            names = tuple(self.layers) if is_sequence else ()
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(
                    f"layers: expected a sequence of layer names, or None; got {self.layers!r}; the only word is 'published'"
                )
            object.__setattr__(self, "layers", names)
        if self.method == "reset" and self.layers is not None:
            raise ValueError(
                f'layers: method "reset" measures every batch norm, so it takes no layers; got {self.layers!r}'
            )
        if self.method in ("reset", "least-squares") and self.target != "weighted":
            raise ValueError(f'target: method "{self.method}" has no target statistics; got {self.target!r}')
        check_number("ridge", self.ridge, exclusive=True)
        if self.method != "least-squares" and self.ridge != RIDGE:
            raise ValueError(f'ridge: is for method "least-squares"; got {self.ridge!r} for "{self.method}"')
        check_type("restore_variance", self.restore_variance, bool)
        if self.method != "least-squares" and not self.restore_variance:
            raise ValueError(
                f'restore_variance: is for method "least-squares"; got False for "{self.method}"'
            )
        if self.method in ("reset", "reshift", "least-squares") and self.std_factor != 1.0:
            raise ValueError(
                f'std_factor: method "{self.method}" has no target standard deviation; got {self.std_factor!r}'
            )


def renormalization_of(method: Method | Renormalization) -> Renormalization:
    """Return the options of a method that is named by its word, or the options themselves."""
    if isinstance(method, Renormalization):
        return method
    if not isinstance(method, str):
        raise TypeError(f"method: expected a word or a Renormalization; got {type(method).__name__}")
    return Renormalization(method)
