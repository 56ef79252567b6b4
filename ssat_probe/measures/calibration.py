"""Damping and scale with which LiSSA converges: found by Lanczos, or set by the user in the words of Koh & Liang."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssat_probe.measures.lanczos import lanczos, ritz
from ssat_probe.registry import known

Product = Callable[[Tensor], Tensor]

CONVENTIONS = ("absolute", "koh_liang")
MARGIN = 2.0  # damping in units of |λmin|: the smallest damped eigenvalue is |λmin|; ours, cost against distance
LEAST_SHARE = 0.05  # least damping in units of λmax: LiSSA then needs some 100 products for 1e-3; ours
SAFETY = 1.2  # scale in units of the smallest that converges; ours, for a λmax known to a per cent
PILOT_STEPS = 40  # of the Lanczos runs that calibrate; both ends of a network's Hessian are found by then
BATCH_STEPS = 15  # of those that find λmax of a mini-batch; the largest eigenvalue comes first
NUMBERS = ("damping", "scale", "recursion_depth", "num_samples")
MOST_DAMPING = 2.0  # of Koh & Liang: from there on h ← v + (1 - damping) h - H h / scale grows where H is zero


@dataclass(frozen=True)
class Calibration:
    """Damping and scale with which the recursion of LiSSA converges."""

    damping: float
    "Added to every eigenvalue, in their units."
    scale: float
    "Every product is divided by it; more than half the largest damped eigenvalue of any batch."
    convention: str = "absolute"
    "Of its user, in which a divergence is explained."

    def in_convention(self, convention: str) -> tuple[float, float]:
        """The two numbers as other code wants them.

        Args:
            convention: ``absolute``: damping is added to the Hessian, (H + damping) x = v. ``koh_liang``: the recursion
                h ← v + (1 - damping) h - H h / scale, where the Hessian gets damping times scale.

        Returns:
            Damping and scale in that convention.

        Raises:
            ValueError: If the convention is unknown.
        """
        if convention not in CONVENTIONS:
            raise ValueError(f"The convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}. Name one.")
        return (self.damping if convention == "absolute" else self.damping / self.scale), self.scale


def calibrate(smallest: float, largest: float, largest_of_a_batch: float | None = None) -> Calibration:
    """Damping above the negative edge, scale from the largest curvature of the batches that are used.

    Args:
        smallest: λmin of the Hessian over all images.
        largest: λmax of it.
        largest_of_a_batch: λmax of the Hessian of a mini-batch, if products of mini-batches are used; it is larger.

    Returns:
        Damping: twice |λmin|, at least a twentieth of λmax. Scale: half the largest damped eigenvalue, and a
            fifth more.
    """
    damping = max(MARGIN * max(-smallest, 0.0), LEAST_SHARE * abs(largest))
    return Calibration(damping, SAFETY * (max(largest, largest_of_a_batch or largest) + damping) / 2)


def calibrated(
    product: Product,
    size: int,
    batch_products: Sequence[Product] = (),
    *,
    seed: int = 0,
    precision: float = 2.0**-52,
    device: torch.device | str = "cpu",
) -> Calibration:
    """`calibrate` on what Lanczos runs find: λmin and λmax over all images, the greatest λmax of the mini-batches.

    Args:
        product: Hessian over all images times vector.
        size: Dimension.
        batch_products: Hessian of each mini-batch times vector, if the recursion is to use them.
        seed: Of the start vectors.
        precision: Machine epsilon of the products.
        device: Where vectors live.

    Returns:
        Damping and scale; ``PILOT_STEPS`` products were spent, and ``BATCH_STEPS`` of each mini-batch.
    """
    return calibrate(*ends(product, size, batch_products, seed=seed, precision=precision, device=device))


def ends(
    product: Product,
    size: int,
    batch_products: Sequence[Product] = (),
    *,
    seed: int = 0,
    precision: float = 2.0**-52,
    device: torch.device | str = "cpu",
) -> tuple[float, float, float | None]:
    """Both ends of the spectrum, by Lanczos.

    Args:
        product: As for `calibrated`.
        size: As for `calibrated`.
        batch_products: As for `calibrated`.
        seed: As for `calibrated`.
        precision: As for `calibrated`.
        device: As for `calibrated`.

    Returns:
        λmin and λmax over all images, and the greatest λmax of the mini-batches; None where there are none.
    """
    options: dict[str, Any] = {"seed": seed, "precision": precision, "device": device}
    pilot = ritz(lanczos(product, size, PILOT_STEPS, **options)).values
    tops = [float(ritz(lanczos(one, size, BATCH_STEPS, **options)).values[-1]) for one in batch_products]
    return float(pilot[0]), float(pilot[-1]), max(tops, default=None)


def from_koh_liang(damping: float, scale: float) -> Calibration:
    """Calibration that repeats settings of code in the convention of Koh & Liang.

    Args:
        damping: Their ``damping``, a share of the scale.
        scale: Their ``scale``.

    Returns:
        The same recursion in absolute terms.
    """
    return Calibration(damping * scale, scale, "koh_liang")


@dataclass(frozen=True)
class Recursion:
    """Settings of LiSSA; the defaults leave damping and scale to `calibrated`."""

    calibration: Calibration | None = None
    recursion_depth: int | None = None
    "Products of each recursion, as in Koh & Liang's code: it begins with the right-hand side."
    num_samples: int = 1
    "Recursions over mini-batches that are averaged."


CALIBRATED = Recursion()


def recursion(texts: Sequence[str]) -> Recursion:
    """Settings from words.

    Args:
        texts: Such as ``damping=0.01 scale=25 recursion_depth=5000 num_samples=4``, names and meanings of
            ``get_inverse_hvp_lissa`` in Koh & Liang's code; ``convention=absolute`` if damping is added to the Hessian.

    Returns:
        The settings.

    Raises:
        ValueError: If there is no such setting, one is given twice or out of range, or damping and scale are not given
            together.
    """
    given: dict[str, str] = {}
    for text in texts:
        name, _, value = text.partition("=")
        known(name, ("convention", *NUMBERS), "settings of LiSSA")
        if name in given:
            raise ValueError(f"Each setting of LiSSA must be given once, got {name} twice. Leave one out.")
        given[name] = value
    convention = known(given.get("convention", "koh_liang"), CONVENTIONS, "damping conventions")
    numbers = {name: _number(name, given[name], convention) for name in NUMBERS if name in given}
    together = {"damping", "scale"}
    if given.keys() & {"convention", *together} and not given.keys() >= together:
        raise ValueError(
            f"damping and scale of LiSSA must be given together, for one means nothing without the other, got "
            f"{' '.join(texts)}. Give both, or neither (and no convention) to have them calibrated."
        )
    make = from_koh_liang if convention == "koh_liang" else Calibration
    calibration = make(numbers["damping"], numbers["scale"]) if "damping" in numbers else None
    depth = int(numbers["recursion_depth"]) if "recursion_depth" in numbers else None
    return Recursion(calibration, depth, int(numbers.get("num_samples", 1)))


def _number(name: str, text: str, convention: str) -> float:
    """The value of a setting, in its range."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if name in ("recursion_depth", "num_samples"):
        is_right, range_ = value >= 1 and value.is_integer(), "a whole number from 1"
    elif name == "scale":
        is_right, range_ = 0 < value < math.inf, "above 0"
    elif convention == "absolute":
        is_right, range_ = 0 <= value < math.inf, "at least 0"
    else:
        is_right, range_ = 0 <= value < MOST_DAMPING, "at least 0 and below 2 in the convention koh_liang"
    if not is_right:
        raise ValueError(
            f"{name} of LiSSA must be {range_}, got {text!r}. Write it as in --lissa damping=0.01 scale=25."
        )
    return value
