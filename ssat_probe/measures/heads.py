"""Where heads look: sinks, distance, collapse over queries, and how heads differ."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def log_weights(
    scores: Float[Tensor, "batch head query key"], *, are_scores: bool = True
) -> Float[Tensor, "batch head query key"]:
    """Logarithm of attention over a part of the keys, renormalised over it, exactly also where weights underflow.

    Args:
        scores: Attention before softmax over that part, -inf for masked keys; or weights.
        are_scores: False for weights.

    Returns:
        Rows whose exponentials sum to 1, in float32 or better; -inf for keys without weight.
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    return (wide if are_scores else wide.log()).log_softmax(-1)


def entropy_parts(
    log_all: Float[Tensor, "batch head query key"], num_prefix: int
) -> dict[str, Float[Tensor, "batch head query"]]:
    """Entropy over all keys, split exactly into the sink of the prefix tokens and the spatial spread.

    H = H(m) + m_prefix H(prefix) + m_patch H(patch), m being the mass on each of the two groups.

    Args:
        log_all: From `log_weights`, over all keys.
        num_prefix: Number of keys before the patches, 0 or more.

    Returns:
        ``mass`` on the prefix tokens, and in nats ``all`` and its parts ``groups``, ``prefix`` and ``patch``; float64.
    """
    mass, parts = {}, {}
    for name, place in (("prefix", slice(0, num_prefix)), ("patch", slice(num_prefix, None))):
        logs = log_all[..., place].double()
        mass[name] = logs.exp().sum(-1)
        # m H(A | group) = -Σ a ln(a / m)
        share = logs - mass[name].log()[..., None]
        parts[name] = -_times(logs.exp(), share).sum(-1)
    groups = sum(torch.special.entr(one) for one in mass.values())
    everything = torch.special.entr(log_all.double().exp()).sum(-1)
    return {"mass": mass["prefix"], "all": everything, "groups": groups, **parts}


def mean_distance(
    log_patch: Float[Tensor, "batch head query key"], distances: Float[Tensor, "query key"]
) -> Float[Tensor, "batch head query"]:
    """Mean attention distance: distance of the keys from the query, weighted by attention; a key to itself has 0.

    Args:
        log_patch: From `log_weights`, over the patches alone. Renormalised, so that a sink does not shrink distances.
        distances: From `ssat_probe.geometry.distances`.

    Returns:
        Pixels, float64.

    References:
        Dosovitskiy et al. (2021), Fig. 7, https://arxiv.org/abs/2010.11929
    """
    return (log_patch.double().exp() * distances.to(log_patch.device)).sum(-1)


def uniform_distance(
    log_patch: Float[Tensor, "batch head query key"], distances: Float[Tensor, "query key"]
) -> Float[Tensor, "batch head query"]:
    """Mean attention distance if attention were uniform over the same keys.

    Args:
        log_patch: From `log_weights`; only which keys are masked matters.
        distances: From `ssat_probe.geometry.distances`.

    Returns:
        Pixels, float64: 116.49 for 14 x 14 patches of 16 pixels.
    """
    is_valid = (~log_patch.isneginf()).double()
    return (is_valid * distances.to(log_patch.device)).sum(-1) / is_valid.sum(-1)


def mutual_information(
    log_patch: Float[Tensor, "batch head query key"],
) -> dict[str, Float[Tensor, "batch head"]]:
    """How much the query says about the key: 0 if every query attends alike, which is attention collapse.

    I = H(mean row) - mean H(row), NMI = I / sqrt(ln Q · H(mean row)), queries taken as equally likely.

    Args:
        log_patch: From `log_weights`, over the patches, of the patch queries.

    Returns:
        ``information`` and ``key_entropy`` H(mean row) in nats, ``nmi`` between 0 and 1; 0 also where all rows lie on
        one key. NaN for a single query. Float64.

    References:
        Park et al. (2023), "What do self-supervised vision transformers learn?", https://arxiv.org/abs/2305.00729
    """
    weights = log_patch.double().exp()
    return information_from_means(weights.mean(-2), torch.special.entr(weights).sum(-1).mean(-1), weights.shape[-2])


def information_from_means(
    mean_row: Float[Tensor, "batch head key"], mean_entropy: Float[Tensor, "batch head"], num_queries: int
) -> dict[str, Float[Tensor, "batch head"]]:
    """As `mutual_information`, from what can be summed up over chunks of queries.

    Args:
        mean_row: Mean of the rows of attention over the queries.
        mean_entropy: Mean of their entropies, in nats.
        num_queries: How many there are.

    Returns:
        As `mutual_information`.
    """
    key_entropy = torch.special.entr(mean_row).sum(-1)
    information = (key_entropy - mean_entropy).clamp(min=0)
    bound = (math.log(num_queries) * key_entropy).sqrt() if num_queries > 1 else torch.full_like(key_entropy, torch.nan)
    nmi = torch.where(key_entropy > 1e-12, information / bound, bound * 0)
    return {"information": information, "key_entropy": key_entropy, "nmi": nmi}


def information_of_regions(
    row_sums: Float[Tensor, "batch head region key"],
    entropy_sums: Float[Tensor, "batch head region"],
    num_queries: Float[Tensor, " region"],
) -> dict[str, Float[Tensor, "batch head"]]:
    """As `mutual_information` in each region whose queries share their keys, such as a window; then the mean.

    Args:
        row_sums: Sum of the rows of attention over the queries of a region.
        entropy_sums: Sum of their entropies, in nats.
        num_queries: How many there are; regions without any are left out.

    Returns:
        As `mutual_information`, means over the regions weighted by their queries; of ``nmi`` over those with at least
        two queries.
    """
    sums: dict[str, Tensor] = {}
    total: dict[str, float] = {}
    for region, count in enumerate(num_queries.long().tolist()):
        if not count:
            continue
        mean_entropy = entropy_sums[:, :, region] / count
        found = information_from_means(row_sums[:, :, region] / count, mean_entropy, count)
        for name, value in found.items():
            if name != "nmi" or count > 1:
                sums[name] = sums.get(name, torch.zeros_like(value)) + count * value
                total[name] = total.get(name, 0) + count
    nothing = torch.full_like(entropy_sums.sum(-1), torch.nan)
    names = ("information", "key_entropy", "nmi")
    return {name: sums[name] / total[name] if name in sums else nothing for name in names}


def floored(weights: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query key"]:
    """Rows with 1e-8 added to every weight, renormalised: what the code of Park et al. takes its NMI of.

    Args:
        weights: Attention over the patches, not renormalised.

    Returns:
        Rows that sum to 1, without zeros.
    """
    more = weights + 1e-8  # in their self_attention_analysis notebook
    return more / more.sum(-1, keepdim=True)


def divergence(log_patch: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    """Divergence of each head from the mean of all: its mean over heads is their Jensen-Shannon divergence.

    Args:
        log_patch: From `log_weights`.

    Returns:
        Σ a ln(a / mean a), nats, between 0 and ln(number of heads), float64. NaN for a single head.
    """
    logs = log_patch.double()
    heads = logs.shape[1]
    if heads == 1:
        return logs.new_full(logs.shape[:3], torch.nan)
    return _times(logs.exp(), logs - (logs.logsumexp(1, keepdim=True) - math.log(heads))).sum(-1)


def divergence_bound(num_heads: int, num_keys: int) -> float:
    """Largest Jensen-Shannon divergence that heads can have.

    Args:
        num_heads: Heads of the block.
        num_keys: Keys of a row.

    Returns:
        Nats, min(ln heads, ln keys).
    """
    return math.log(min(num_heads, num_keys))


def mean_kl(log_patch: Float[Tensor, "batch head query key"]) -> Float[Tensor, "batch head query"]:
    """Kullback-Leibler divergence of each head from the others, mean over these.

    Unbounded and dominated by keys that one of the heads hardly attends to; `divergence` is the measure for tables.

    Args:
        log_patch: From `log_weights`.

    Returns:
        Nats, float64. NaN for a single head, and where a head has no weight at all on a key that another attends to.
    """
    logs = log_patch.double()
    heads = logs.shape[1]
    if heads == 1:
        return logs.new_full(logs.shape[:3], torch.nan)
    own = -torch.special.entr(logs.exp()).sum(-1)
    # Σ over the other heads of ln a', of which the head's own term is left out again.
    others = (logs.sum(1, keepdim=True) - logs) / (heads - 1)
    found = own - _times(logs.exp(), others).sum(-1)
    return torch.where(found.isfinite(), found, torch.nan)


def _times(weights: Tensor, logs: Tensor) -> Tensor:
    """Product that is 0 where the weight is, whatever the logarithm."""
    return torch.where(weights > 0, weights * logs, 0.0)
