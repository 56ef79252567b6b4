import math

import pytest
import torch
import torch.nn.functional as F

from ssat_probe.watch import Attention, AttentionWatch


def test_only_what_a_known_module_calls_is_attention():
    query, key, value = (torch.randn(2, 3, length, 7) for length in (5, 11, 11))
    seen: list[Attention] = []
    errors: dict[int, float] = {}
    with AttentionWatch(seen.append, {"a": 4}, errors, is_checked=True) as watch:
        F.scaled_dot_product_attention(query, key, value)
        watch.callers.extend(["a", "a.b"])
        F.scaled_dot_product_attention(query, key, value)
        watch.callers[:] = ["c"]
        F.scaled_dot_product_attention(query, key, value)
    assert [(one.block, one.name) for one in seen] == [(4, "a.b")]
    torch.testing.assert_close(seen[0].rows, query @ key.mT / math.sqrt(7))
    assert watch.counts == {4: 1}
    assert errors[4] < 1e-5


def test_scores_that_are_not_finite_are_named():
    query = torch.full((1, 1, 2, 3), torch.nan)
    with AttentionWatch(lambda _: None, {"a": 0}, {}, is_checked=False) as watch:
        watch.callers.append("a")
        with pytest.raises(ValueError, match="a: scores of attention must be finite"):
            F.scaled_dot_product_attention(query, query, query)
