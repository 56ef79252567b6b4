"""What every probe keeps to, whatever it measures."""

import dataclasses
import inspect
import io
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from ssat_probe import probe as runner
from ssat_probe import registry
from ssat_probe.probe import IDENTITY, Probe
from ssat_probe.sample import Sample
from ssat_probe.subject import Batch, Subject
from ssat_probe.table import KEYS, Column

Paths = dict[str, Path]
PROBES = registry.names("probes")
QUICK: dict[str, dict[str, Any]] = {
    "hessian": {"steps": 9},
    "terms": {"steps": 5},
    "blocks": {"steps": 4},
    "landscape": {"points": 3, "num_random": 2, "steps": 4, "lines": ("random", "bottom")},
}
"Options that make a slow probe quick; everything else runs with its defaults."
NUM_IMAGES = 11
REPRESENTATION = {
    "accuracy", "attention", "fourier", "heads", "histogram", "maps", "reconstruction", "repetition", "similarity",
    "spectrum", "tokens", "variance",
}  # fmt: skip
"Probes of what images look like inside; the others differentiate a loss."

pytestmark = pytest.mark.parametrize("name", PROBES)


def quick(name: str) -> Probe:
    return runner.make(name, **QUICK.get(name, {}))


def subject(path: Path, probe: Probe, batch_size: int = 4) -> Subject:
    sample = Sample(num_images=NUM_IMAGES, batch_size=batch_size, device="cpu", dtype="float64")
    return Subject.of(path, sample, probe.split)


@pytest.fixture
def checkpoints(name: str, checkpoints_of_probe: Callable[[str], Paths]) -> Paths:
    return checkpoints_of_probe(name)


@pytest.fixture(scope="module")
def made() -> dict[str, pd.DataFrame]:
    """Tables by probe; each is measured once."""
    return {}


@pytest.fixture
def tables(checkpoints: Paths, made: dict[str, pd.DataFrame]) -> Callable[[str], pd.DataFrame]:
    """Table of a probe for the three checkpoints."""

    def of(name: str) -> pd.DataFrame:
        if name not in made:
            sample = Sample(num_images=NUM_IMAGES, batch_size=4, device="cpu", dtype="float64")
            made[name] = runner.measure_all(quick(name), list(checkpoints.values()), sample)[0]
        return made[name].copy()

    return of


def grown(table: pd.DataFrame, num: int) -> pd.DataFrame:
    """As for so many checkpoints: more seeds of the same runs, with values a little apart; after a trip through csv."""
    parts = []
    for i in range(num):
        names = table["checkpoint"].unique()
        part = table[table["checkpoint"] == names[i % len(names)]].copy()
        seed = i // len(names)
        part["checkpoint"] = part["checkpoint"].str.replace("seed0", f"seed{seed}")
        part["seed"] = seed
        parts.append(part)
    return pd.read_csv(io.StringIO(pd.concat(parts).to_csv(index=False)))


def test_a_probe_has_defaults_and_cannot_be_changed(name: str) -> None:
    probe = registry.load("probes", name).Probe()
    assert dataclasses.is_dataclass(probe)
    for field in dataclasses.fields(probe):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(probe, field.name, getattr(probe, field.name))
    assert hash(probe) == hash(registry.load("probes", name).Probe())
    assert probe.split in {"train", "test", "val"}


def test_every_option_and_the_command_are_explained(name: str) -> None:
    kind = registry.load("probes", name).Probe
    assert inspect.getdoc(kind)
    assert registry.summary("probes", name)
    source = inspect.getsource(kind)
    for field in dataclasses.fields(kind):
        after = source.partition(f"    {field.name}: ")[2].partition("\n")[2].lstrip()
        assert after.startswith('"'), f"{field.name} needs a docstring below it"


def test_every_column_says_what_it_holds(name: str) -> None:
    columns = registry.load("probes", name).Probe.columns
    assert all(isinstance(column, Column) and column.meaning for column in columns)
    names = [column.name for column in columns]
    assert len(set(names)) == len(names)
    assert not set(names) & {column.name for column in IDENTITY}


def test_every_definition_has_an_entry_in_the_docs(name: str) -> None:
    columns = registry.load("probes", name).Probe.columns
    measures = [column.of for column in columns if column.name == f"{column.of}_sd"]
    pages = (registry.PACKAGE.parent / "docs" / "measures.md").read_text(encoding="utf-8").split("\n## ")
    page = next((page for page in pages if page.startswith(name)), "")
    entries = {word for line in page.splitlines() if line.startswith("| ") for word in re.split("[ ,|`]+", line)}
    assert [one for one in measures if one not in entries] == []


def test_no_measure_of_images_stands_without_its_spread(name: str) -> None:
    """But what is no measure: what names the row, how many there were, what uniform attention or noise would give."""
    columns = registry.load("probes", name).Probe.columns
    if not any(column.of for column in columns):
        return
    spread = {column.of for column in columns}
    whole = {"undefined", "num_keys", "num_tokens", "num_images", "self_check", "grid", "is_coarse", "stage", "density"}
    whole |= {"keys", "queries", "mode", "group", "other_setting", "ceiling", "image_ceiling"}
    references = {"energy_share_noise", "park_kim_frequency", "mass_uniform", "keys_uniform", "distance_uniform"}
    bare = {column.name for column in columns if not column.of} - spread
    assert bare - set(KEYS) - whole - references == set()


def test_the_module_imports_nothing_heavy(name: str) -> None:
    heavy = "{'torch', 'numpy', 'pandas', 'matplotlib', 'scipy'}"
    code = f"import sys, ssat_probe.probes.{name}; print(set(sys.modules) & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_table_has_the_declared_columns_in_order(
    name: str, checkpoints: Paths, tables: Callable[[str], pd.DataFrame]
) -> None:
    probe = quick(name)
    declared = [column.name for column in probe.columns]
    assert list(tables(name).columns) == [column.name for column in IDENTITY] + declared
    own = probe.measure(subject(checkpoints["ssat"], probe))
    assert list(own.columns) == declared
    assert list(own.index) == list(range(len(own)))
    assert len(own)


def test_the_same_subject_gives_the_same_table_twice(name: str, checkpoints: Paths) -> None:
    probe = quick(name)
    one = subject(checkpoints["ssat"], probe)
    first = probe.measure(one)
    torch.manual_seed(12345)
    np.random.seed(54321)
    pd.testing.assert_frame_equal(first, probe.measure(one), check_exact=True)


def is_measured(table: pd.DataFrame) -> pd.DataFrame:
    """False where a table holds what depends on how work is split: rounding errors, and errors from batch to batch."""
    measured = pd.DataFrame(data=True, index=table.index, columns=table.columns)
    if "self_check" in table:
        measured["self_check"] = False
    if "data_error" in table:
        measured["data_error"] = False
        measured.loc[table["quantity"].str.startswith("data_")] = False
    if "quantity" in table:
        measured.loc[table["quantity"].str.startswith("check_") | (table["quantity"] == "noise_floor")] = False
    return measured


def test_no_batch_size_enters(name: str, checkpoints: Paths) -> None:
    """Single images, batches whose last one is smaller, and one batch; of two more such where a probe is quick."""
    probe = quick(name)
    whole = probe.measure(subject(checkpoints["ssat"], probe, NUM_IMAGES))
    for size in (1, 4, NUM_IMAGES + 1, *(() if name in QUICK else (2, NUM_IMAGES - 1))):
        part = probe.measure(subject(checkpoints["ssat"], probe, size))
        part = part.where(is_measured(whole), whole)
        pd.testing.assert_frame_equal(part, whole, check_exact=False, rtol=1e-9, atol=1e-12, obj=f"batch size {size}")


@pytest.mark.parametrize("sizes", [(1,) * NUM_IMAGES, (4, 7), (2, 1, 5, 3), (NUM_IMAGES,)], ids=str)
def test_representation_does_not_know_how_images_came(
    name: str, sizes: tuple[int, ...], checkpoints: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-12 in float64: batches of any sizes, with the images of the sample in any order."""
    if name not in REPRESENTATION:
        pytest.skip("curvature knows rounding of its own: see test_no_batch_size_enters")
    probe = quick(name)
    one = subject(checkpoints["ssat"], probe, NUM_IMAGES)
    expected = probe.measure(one)
    (whole,) = one.batches()
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(sum(sizes[:2])))
    parts = [Batch(whole.images[i], whole.labels[i], whole.ids[i]) for i in order.split(sizes)]
    monkeypatch.setattr(Subject, "batches", lambda self: iter(parts))
    found = probe.measure(one)
    found = found.where(is_measured(expected), expected)
    pd.testing.assert_frame_equal(found, expected, check_exact=False, rtol=1e-12, atol=1e-12)


def test_numbers_are_finite_but_where_a_column_says_otherwise(name: str, tables: Callable[[str], pd.DataFrame]) -> None:
    table = tables(name)
    for column in registry.load("probes", name).Probe.columns:
        values = table[column.name]
        if values.dtype.kind != "f":
            continue
        assert not np.isinf(values).any(), column.name
        if not any(word in column.meaning for word in ("undefined", "empty")):
            optional = name == "hessian" and column.name in {"low", "high", "standard_error", "residual", "weight"}
            assert optional or values.notna().all(), column.name


def test_the_subject_is_left_as_it_was_found(name: str, checkpoints: Paths) -> None:
    probe = quick(name)
    one = subject(checkpoints["ssat"], probe)
    assert one.decoder is not None
    both = nn.ModuleList([one.model, one.decoder])
    one.model.blocks[1].train()  # whatever mode a module is in
    one.model.head.weight.grad = torch.full_like(one.model.head.weight, 3.0)
    one.model.norm.weight.requires_grad_(False)
    state = {key: value.clone() for key, value in both.state_dict().items()}

    def look() -> list[Any]:
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [
            [(key, module.training, type(module), sorted(vars(module))) for key, module in both.named_modules()],
            [len(getattr(module, hook)) for module in both.modules() for hook in hooks],
            [(key, p.requires_grad, p.grad is None, id(p), p.dtype) for key, p in both.named_parameters()],
            [torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_num_threads()],
            [module.forward.__func__ for module in both.modules()],
            [getattr(module, "fused_attn", None) for module in both.modules()],
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.are_deterministic_algorithms_enabled(),
        ]

    before = look()
    generators = torch.get_rng_state(), np.random.get_state()[1].copy()
    probe.measure(one)
    assert look() == before
    assert torch.equal(one.model.head.weight.grad, torch.full_like(one.model.head.weight, 3.0))
    assert all(torch.equal(value, state[key]) for key, value in both.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert np.array_equal(np.random.get_state()[1], generators[1])


def test_nothing_is_printed_or_written(
    name: str, checkpoints: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    probe = quick(name)
    table = probe.measure(subject(checkpoints["ssat"], probe))
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
    assert isinstance(table, pd.DataFrame)


@pytest.mark.parametrize("num", [1, 3, 12])
def test_a_figure_is_drawn_from_a_csv_and_says_what_it_shows(
    name: str, tables: Callable[[str], pd.DataFrame], num: int
) -> None:
    table = grown(tables(name), num)
    before = table.copy()
    figure = registry.load("probes", name).Probe().draw(table)
    pd.testing.assert_frame_equal(table, before)
    figure.canvas.draw()
    assert figure.axes
    for ax in figure.axes:
        assert ax.get_ylabel(), f"{name}: {ax.get_title()!r} needs a label on y"
        named = [label.get_text() for label in ax.get_xticklabels() if not label.get_text().strip("−-.0123456789")]
        assert ax.get_xlabel() or not any(named), f"{name}: {ax.get_title()!r} needs a label on x"
        assert ax.has_data()
    if num > 1:
        legends = [legend for legend in [*figure.legends, *(ax.get_legend() for ax in figure.axes)] if legend]
        words = {text.get_text() for legend in legends for text in legend.get_texts()}
        words |= {label.get_text() for ax in figure.axes for label in ax.get_xticklabels()}
        assert {"SSAT", "SSL+FT", "scratch"} <= words


def test_drawing_leaves_matplotlib_as_it_was(name: str, tables: Callable[[str], pd.DataFrame]) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    registry.load("probes", name).Probe().draw(grown(tables(name), 3))
    assert dict(mpl.rcParams) == before


def test_the_summary_is_short_and_names_every_checkpoint(name: str, tables: Callable[[str], pd.DataFrame]) -> None:
    table = grown(tables(name), 3)
    shown = registry.load("probes", name).Probe().summary(table)
    assert shown["checkpoint"].drop_duplicates().tolist() == table["checkpoint"].drop_duplicates().tolist()
    blocks = table["block"].nunique() if "block" in table else 1
    assert len(shown) <= 3 * max(1, blocks)
    assert len(shown.columns) <= 12
