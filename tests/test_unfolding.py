"""Sizes from opcodes against a walk over the values themselves."""

import io
import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssat_probe.unfolding import MOST_NESTED, Unfolding, unfold

LEAF = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
VALUE = st.recursive(
    LEAF,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.tuples(inner, inner, inner, inner)
    | st.dictionaries(st.text(), inner) | st.dictionaries(st.tuples(st.integers(), st.text()), inner),
)  # fmt: skip


def counted(content: bytes) -> Unfolding:
    return unfold(io.BytesIO(content), 10**9)


def walked(value: Any) -> int:
    """Containers and their values, each as often as it is met."""
    if isinstance(value, dict):
        return 1 + sum(walked(key) + walked(inner) for key, inner in value.items())
    return 1 + sum(walked(inner) for inner in value) if isinstance(value, list | tuple) else 1


@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
@given(value=VALUE)
def test_whatever_is_pickled_is_no_smaller_than_a_walk_over_it_and_no_deeper_than_it_is(
    protocol: int, value: Any
) -> None:
    found = counted(pickle.dumps(value, protocol=protocol))
    assert found.size >= walked(value)
    assert found.size <= 60 * len(pickle.dumps(value, protocol=protocol))
    assert found.depth <= 7 + str(value).count("(") + str(value).count("[") + str(value).count("{")


@pytest.mark.parametrize("length", [3, 7, 19])
def test_tuples_that_hold_the_one_before_twice_double(length: int) -> None:
    value: Any = ("a",)
    for _ in range(length):
        value = (value, value)
    assert walked(value) == 2 ** (length + 1) + 2**length - 1
    found = counted(pickle.dumps(value, protocol=2))
    assert 4 * walked(value) >= found.size >= walked(value)  # the last pair, its two halves, theirs, ...
    assert found.depth == length + 1


def test_it_stops_where_it_is_too_much() -> None:
    value: Any = ("a",)
    for _ in range(200):
        value = (value, value)
    assert unfold(io.BytesIO(pickle.dumps(value, protocol=2)), 5000).size < 4 * 5000
    deep = b"\x80\x02K\x00" + b"\x85" * 10**6 + b"."
    assert counted(deep).depth == MOST_NESTED + 1


def test_what_is_filled_after_it_was_put_elsewhere_is_a_trick() -> None:
    """Lists filled from the outermost inwards look small each time that one is put into the next."""
    names = [f"q{chr(i)}".encode("latin-1") for i in range(40)]
    gets = [f"h{chr(i)}".encode("latin-1") for i in range(40)]
    made = b"".join(b"]" + name + b"0" for name in names)
    filled = b"".join(outer + b"(" + inner * 2 + b"e0" for outer, inner in itertools.pairwise(gets))
    content = b"\x80\x02" + made + filled + gets[0] + b"."
    assert len(pickle.loads(content)) == 2
    assert counted(content).depth > MOST_NESTED


def test_a_file_of_torch_is_counted_to_its_end() -> None:
    buffer = io.BytesIO()
    state = {"a": torch.zeros(3, 5), "b": torch.nn.Parameter(torch.ones(2))}
    content = {"model": state, "args": [1, (2, 3)], "twice": [state, state]}
    torch.save(content, buffer, _use_new_zipfile_serialization=False)
    buffer.seek(0)
    sizes = [unfold(buffer, 10**6).size for _ in range(4)]
    assert sizes[:2] == [1, 1]
    assert 40 < sizes[3] < 400


def test_what_is_no_pickle_is_said_by_python() -> None:
    for content in (b"", b"no pickle", b"\x80\x02K\x00", b"\x80\x02h\x05.", b"\x80\x02\x85.", b"\x80\x02e."):
        with pytest.raises((ValueError, LookupError)):
            counted(content)
