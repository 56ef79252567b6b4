"""What a masked convolution is given, and which keys may be looked at."""

import pytest
import torch
import torch.nn.functional as F

from ssat_probe.masked_convolution import at_stage, keys_seen, shown


def test_a_convolution_is_given_zeros_at_hidden_places_whatever_they_hold() -> None:
    maps = torch.arange(2 * 3 * 2 * 5.0).view(2, 3, 2, 5)
    visible = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 1, 0, 1]], dtype=torch.bool).expand(2, 1, 2, 5)
    maps_with_holes = torch.where(visible, maps, float("nan"))
    assert torch.equal(shown(maps_with_holes, visible), maps * visible)
    assert shown(maps, None) is maps


@pytest.mark.parametrize("num_prefix", [0, 1])
def test_a_key_may_be_looked_at_if_its_convolution_saw_anything(num_prefix: int) -> None:
    visible = torch.zeros(1, 1, 7, 9, dtype=torch.bool)
    visible[0, 0, 2, 3] = visible[0, 0, 6, 8] = True
    reach = F.conv2d(visible.double(), torch.ones(1, 1, 3, 3, dtype=torch.float64), stride=2, padding=1)
    got = keys_seen(visible, num_prefix)
    assert got is not None
    assert got.shape == (1, 1, 1, num_prefix + 4 * 5)
    assert got[0, 0, 0, :num_prefix].all()
    assert torch.equal(got[0, 0, 0, num_prefix:], reach.flatten() > 0)
    assert 0 < got[..., num_prefix:].sum() < 20


def test_where_nothing_is_hidden_there_is_no_mask() -> None:
    assert keys_seen(None, 1) is None


def test_a_unit_has_its_places_in_every_finer_map() -> None:
    unit = torch.tensor([[[[True, False], [False, True]]]])
    fine = at_stage(unit, 3)
    assert fine.shape == (1, 1, 6, 6)
    assert all(fine[0, 0, r, c] == unit[0, 0, r // 3, c // 3] for r in range(6) for c in range(6))
