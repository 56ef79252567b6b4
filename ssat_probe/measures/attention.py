"""How attention is spread over the keys: entropy, kurtosis, skewness of each row of the attention weights.

Rows are kept apart here: averages over queries, images and heads come after the measure, in this order.
"""

import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

# A row is degenerate if its standard deviation is below this many roundings of its mean, 1/n.
_DEGENERATE_ROUNDINGS = 8

# A score so far below the largest has no weight, in float64 either.
_NO_WEIGHT = -1e30


def entropy(
    weights: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> Float[Tensor, "batch head query"]:
    """Shannon entropy of each query's attention over the keys.

    Large when attention is spread, 0 when one key holds all of it. ``0 log 0 = 0``; nothing is added inside the log.

    Args:
        weights: Attention after softmax; sums to 1 over the valid keys.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        Nats, between 0 and log(number of valid keys), float64. NaN for rows without a valid key.

    Raises:
        ValueError: If the weights of a row do not sum to 1.

    Example:
        >>> entropy(torch.full((1, 1, 1, 8), 1 / 8)).exp().round()
        tensor([[[8.]]], dtype=torch.float64)

    References:
        Zhai et al. (2023), Sec. 2, https://arxiv.org/abs/2303.06296 (this form, per row)
    """
    weights = _only_valid(_at_least_float32(weights), is_valid)
    total = weights.sum(-1, dtype=torch.float64)
    if not ((total - 1).abs() <= torch.finfo(weights.dtype).eps ** 0.5).logical_or(total.isnan()).all():
        raise ValueError(
            f"Attention weights must sum to 1 over the valid keys, got sums from {total.min():.4g} to "
            f"{total.max():.4g}. Pass them in float32 or float64, after softmax."
        )
    return torch.special.entr(weights).sum(-1, dtype=torch.float64).clamp(min=0)


def entropy_from_scores(
    scores: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> Float[Tensor, "batch head query"]:
    """Shannon entropy of each query's attention over the keys, from the scores before softmax.

    H = log Σ exp(s) - Σ p s, exact also where weights underflow.

    Args:
        scores: Attention before softmax: scaled, with biases and masks added.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        Nats, between 0 and log(number of valid keys), float64. NaN for rows without a valid key.
    """
    scores = _at_least_float32(scores)
    if is_valid is not None:
        scores = scores.masked_fill(~is_valid, -torch.inf)
    scores = scores - scores.amax(-1, keepdim=True)
    powers = scores.exp()
    total = powers.sum(-1, dtype=torch.float64)
    # A key without weight contributes nothing: 0 * -inf must not make a NaN.
    expected = (powers * scores.masked_fill(scores.isneginf(), 0)).sum(-1, dtype=torch.float64) / total
    return (total.log() - expected).clamp(min=0)


def normalised_entropy(
    entropy: Float[Tensor, "batch head query"], num_keys: Shaped[Tensor, "#batch #head #query"]
) -> Float[Tensor, "batch head query"]:
    """Entropy relative to that of uniform attention over the same keys.

    Comparable between models with different numbers of tokens, which the entropy is not.

    Args:
        entropy: Nats.
        num_keys: Number of valid keys of each query.

    Returns:
        Between 0 (one key) and 1 (uniform). NaN for rows with fewer than two valid keys.
    """
    return entropy / torch.where(num_keys > 1, num_keys.double().log(), torch.nan)


def excess_kurtosis(
    weights: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch head query"]:
    """Excess kurtosis of each query's attention weights over the keys.

    Large when few keys differ much from the rest. Conventions differ: ours are population moments about the mean 1/n,
    E[(w - 1/n)⁴] / σ⁴ - 3, as scipy's ``kurtosis`` by default. Equally large for a spike and for a hole, which the sign
    of `skewness` tells apart, and dependent on n; entropy is the measure of sharpness.

    Args:
        weights: Attention after softmax; sums to 1 over the valid keys.
        is_valid: True for keys that the query may attend to; all of them if None.
        softmax_dtype: In which the softmax was computed; that of the weights if None.

    Returns:
        Dimensionless, within `kurtosis_bounds`, float64. NaN where the weights are equal up to rounding (standard
        deviation at most 8 roundings of 1/n), which is 0/0 and not any number.
    """
    return excess_kurtosis_and_skewness(weights, is_valid, softmax_dtype)[0]


def skewness(
    weights: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> Float[Tensor, "batch head query"]:
    """Skewness of each query's attention weights over the keys: positive for spikes, negative for holes.

    Args:
        weights: Attention after softmax; sums to 1 over the valid keys.
        is_valid: True for keys that the query may attend to; all of them if None.
        softmax_dtype: In which the softmax was computed; that of the weights if None.

    Returns:
        E[(w - 1/n)³] / σ³, dimensionless, float64. NaN where the weights are equal up to rounding.
    """
    return excess_kurtosis_and_skewness(weights, is_valid, softmax_dtype)[1]


def excess_kurtosis_and_skewness(
    weights: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> tuple[Float[Tensor, "batch head query"], Float[Tensor, "batch head query"]]:
    """Both of `excess_kurtosis` and `skewness` from one pass over the weights.

    Args:
        weights: Attention after softmax; sums to 1 over the valid keys.
        is_valid: True for keys that the query may attend to; all of them if None.
        softmax_dtype: In which the softmax was computed; that of the weights if None.

    Returns:
        Excess kurtosis and skewness, as these functions give them.
    """
    rounding = torch.finfo(softmax_dtype or weights.dtype).eps
    weights = _at_least_float32(weights)
    count = num_keys(weights, is_valid).double()
    deviations = _only_valid(weights - (1 / count).to(weights.dtype)[..., None], is_valid)
    # Scaled by n, so that fourth powers of small weights do not underflow; the scale cancels.
    deviations = deviations * count.to(weights.dtype)[..., None]
    squares = deviations.square()
    second, third, fourth = (
        power.sum(-1, dtype=torch.float64) / count for power in (squares, squares * deviations, squares.square())
    )
    second = torch.where(second.sqrt() > _DEGENERATE_ROUNDINGS * rounding, second, torch.nan)
    return fourth / second.square() - 3, third / second**1.5


def row_measures(
    scores: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> dict[str, Float[Tensor, "batch head _"]]:
    """`entropy_from_scores`, `excess_kurtosis` and `skewness` of rows of scores, from one pass over them.

    Args:
        scores: Attention before softmax.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        As `measures_of_sums`, and ``received``, (batch, head, key), the attention that each key receives.
    """
    scores = scores if is_valid is None else scores.masked_fill(~is_valid, -torch.inf)
    sums = row_sums(scores, is_valid)
    return {**measures_of_sums(sums, num_keys(scores, is_valid)), "received": sums["received"].double()}


def row_sums(
    scores: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> dict[str, Float[Tensor, "batch head _"]]:
    """Sums over the keys from which `measures_of_sums` has its measures: the part that takes time, for one chunk.

    In the precision of the scores, as there are some hundreds of terms; in place; and with powers of 2, which torch
    computes in a quarter of the time of those of e.

    Args:
        scores: Attention before softmax; -inf at keys that are not valid.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        Of weights p = 2ˢ, scores s in octaves below the row's largest: ``total`` Σp, ``expected`` Σps, ``second``,
        ``third`` Σ(p - mean)², ³ and ``fourth`` √Σ(p - mean)⁴, of each query; ``received``, (batch, head, key), the
        normalised weights of each key, over these queries; ``scores_second`` Σ(s - mean)², ``scores_fourth``
        √Σ(s - mean)⁴ and ``scores_largest``, the largest absolute score in octaves, NaN with ``is_valid``.
    """
    scores = _at_least_float32(scores)
    largest = scores.amax(-1, keepdim=True)
    shifted = (scores - largest).mul_(1 / math.log(2)).clamp_(min=_NO_WEIGHT)  # 0 log 0 = 0
    if is_valid is None:
        scores_largest = torch.maximum(largest, -scores.amin(-1, keepdim=True))[..., 0] / math.log(2)
        squares = (shifted - shifted.mean(-1, keepdim=True)).square_()
        of_scores = squares.sum(-1), torch.linalg.vector_norm(squares, dim=-1), scores_largest
        weights = torch.exp2(shifted, out=squares)
    else:
        of_scores = (torch.full_like(largest[..., 0], torch.nan),) * 3
        weights = shifted.exp2()
    total = weights.sum(-1, keepdim=True)
    sums = {"total": total[..., 0], "expected": shifted.mul_(weights).sum(-1)}
    sums |= dict(zip(("scores_second", "scores_fourth", "scores_largest"), of_scores, strict=True))
    # A sum over queries that leaves the weights as they are.
    sums["received"] = (total.reciprocal().mT @ weights)[..., 0, :]
    weights.sub_(total / num_keys(scores, is_valid).to(scores.dtype)[..., None])
    deviations = weights if is_valid is None else weights.masked_fill_(~is_valid, 0)
    squares = torch.mul(deviations, deviations, out=shifted)
    sums |= {"second": squares.sum(-1), "fourth": torch.linalg.vector_norm(squares, dim=-1)}
    return sums | {"third": deviations.mul_(squares).sum(-1)}


def measures_of_sums(
    sums: Mapping[str, Float[Tensor, "batch head query"]], num_keys: Shaped[Tensor, "#batch #head #query"]
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Entropy and moments of rows from their sums over the keys.

    Args:
        sums: From `row_sums`, perhaps of several chunks side by side.
        num_keys: Number of valid keys of each query.

    Returns:
        Float64: ``entropy`` in nats, ``kurtosis`` and ``skew``, undefined (NaN) where these functions are; ``second``
        and ``fourth``, the central moments of weight x number of keys; ``kurtosis_scores``, `kurtosis_of` the scores.
    """
    count, total = num_keys.double(), sums["total"].double()
    rounding = _DEGENERATE_ROUNDINGS * torch.finfo(sums["total"].dtype).eps
    unit = count / total  # deviations are wanted in units of 1/n
    second = sums["second"].double() * unit.square() / count
    third = sums["third"].double() * unit**3 / count
    fourth = (sums["fourth"].double() * unit.square()).square() / count
    defined = second.where(second.sqrt() > rounding, torch.nan)
    return {
        "entropy": (total.log2() - sums["expected"].double() / total).clamp(min=0) * math.log(2),
        "kurtosis": fourth / defined.square() - 3,
        "skew": third / defined**1.5,
        "second": second,
        "fourth": fourth,
        "kurtosis_scores": _kurtosis(sums["scores_second"], sums["scores_fourth"], sums["scores_largest"], count),
    }


def kurtosis_of(values: Float[Tensor, "*entry value"]) -> Float[Tensor, "*entry"]:
    """Excess kurtosis of any numbers over the last axis: of scores, or of the attention that each key receives.

    Args:
        values: Finite.

    Returns:
        E[(x - mean)⁴] / σ⁴ - 3, population moments, float64. NaN where the values are equal up to rounding.
    """
    wide = _at_least_float32(values)
    squares = (wide - wide.mean(-1, keepdim=True)).square_()
    largest = torch.maximum(wide.amax(-1), -wide.amin(-1))
    return _kurtosis(squares.sum(-1), torch.linalg.vector_norm(squares, dim=-1), largest, wide.shape[-1])


def kurtosis_bounds(num_keys: Shaped[Tensor, "*row"]) -> tuple[Float[Tensor, "*row"], Float[Tensor, "*row"]]:
    """Smallest and largest excess kurtosis that n numbers can have.

    Args:
        num_keys: Number of valid keys n, at least 2.

    Returns:
        -2 (half of the weights equal, the other half equal) and n - 5 + 1/(n - 1) (one key differs from the rest).
    """
    count = num_keys.double()
    return torch.full_like(count, -2), count - 5 + 1 / (count - 1)


def normalised_kurtosis(
    kurtosis: Float[Tensor, "batch head query"], num_keys: Shaped[Tensor, "#batch #head #query"]
) -> Float[Tensor, "batch head query"]:
    """Where the kurtosis lies between its bounds for that number of keys.

    Less dependent on the number of keys than the kurtosis, yet not independent of it.

    Args:
        kurtosis: Excess kurtosis.
        num_keys: Number of valid keys of each query.

    Returns:
        Between 0 and 1 (one-hot). NaN where the kurtosis is, and for fewer than three valid keys.
    """
    low, high = kurtosis_bounds(num_keys)
    return (kurtosis - low) / torch.where(num_keys > 2, high - low, torch.nan)


def num_keys(
    rows: Float[Tensor, "batch head query key"], is_valid: Bool[Tensor, "#batch #head #query key"] | None = None
) -> Shaped[Tensor, "#batch #head #query"]:
    """Number of keys that each query may attend to.

    Args:
        rows: Scores or weights; only the shape matters.
        is_valid: True for valid keys; all of them if None.

    Returns:
        Counts, in a shape that broadcasts against ``batch head query``.
    """
    if is_valid is None:
        return torch.full((1, 1, 1), rows.shape[-1], device=rows.device)
    return is_valid.sum(-1)


def weights_from_scores(
    scores: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Softmax over the valid keys, in float32 or better.

    Args:
        scores: Attention before softmax.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        Weights that sum to 1 over ``key``, 0 for invalid keys. NaN in rows without a valid key.
    """
    scores = _at_least_float32(scores)
    return (scores if is_valid is None else scores.masked_fill(~is_valid, -torch.inf)).softmax(-1)


def renormalised(
    weights: Float[Tensor, "batch head query key"],
    is_valid: Bool[Tensor, "#batch #head #query key"] | None = None,
) -> Float[Tensor, "batch head query key"]:
    """Weights divided by their sum over the valid keys: for weights over a part of the keys whose scores are unknown.

    With scores, take `weights_from_scores` of that part, which cannot underflow.

    Args:
        weights: Not negative.
        is_valid: True for keys that the query may attend to; all of them if None.

    Returns:
        Weights that sum to 1 over ``key``, 0 for invalid keys. NaN in rows that hold no weight.
    """
    weights = _only_valid(_at_least_float32(weights), is_valid)
    return weights / weights.sum(-1, keepdim=True, dtype=torch.float64).to(weights.dtype)


def _kurtosis(second: Tensor, fourth: Tensor, largest: Tensor, count: Tensor | int) -> Tensor:
    """From Σ(x - mean)², √Σ(x - mean)⁴ and the largest absolute number, before any shift, of so many numbers."""
    rounding = _DEGENERATE_ROUNDINGS * torch.finfo(second.dtype).eps
    variance = second.double() / count
    variance = variance.where(variance.sqrt() > rounding * largest, torch.nan)
    return fourth.double().square() / count / variance.square() - 3


def _at_least_float32(rows: Tensor) -> Tensor:
    return rows if rows.dtype == torch.float64 else rows.float()


def _only_valid(rows: Tensor, is_valid: Tensor | None) -> Tensor:
    return rows if is_valid is None else rows.masked_fill(~is_valid, 0)
