"""Ways to carry out a training: the same weights as the plain way, bit for bit or but for rounding."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssat_probe.checkpoint import Checkpoint
from ssat_probe.execution import Execution, blocks_of, prepare, recomputing, reproducible
from ssat_probe.network import build_decoder, build_encoder
from ssat_probe.recipe import Recipe
from ssat_probe.training import train


def tiny(folder: Path, model: str = "vit_pico", method: Any = "ssat", options: Any = None, **fields: Any) -> Checkpoint:
    recipe = Recipe(method=method, model=model, subset=20, batch_size=10, epochs=2, warmup_epochs=0, **fields)
    return train(recipe, folder, device="cpu", execution=Execution(**(options or {})))


@pytest.mark.parametrize("method", ["scratch", "ssl_ft", "ssat"])
def test_computing_blocks_again_changes_no_bit(tmp_path: Path, method: str) -> None:
    fields = {"drop_path": 0.5, "accumulate": 2, "ema_decay": 0.9}
    plain = tiny(tmp_path / "plain", method=method, **fields)
    assert tiny(tmp_path / "again", method=method, options={"checkpointing": True}, **fields).hash == plain.hash


def test_blocks_that_are_computed_again_keep_their_input_alone() -> None:
    model = nn.Sequential()
    model.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(3))

    def kept(is_on: bool) -> int:
        sizes: list[int] = []

        def pack(value: Tensor) -> Tensor:
            sizes.append(0 if isinstance(value, nn.Parameter) or value._base is not None else value.numel())
            return value

        values = torch.randn(5, 64, requires_grad=True)
        with recomputing(model, is_on), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            for block in model.blocks:
                values = block(values)
        return sum(sizes)

    assert kept(is_on=False) >= 3 * 3 * 5 * 64
    assert kept(is_on=True) <= 3 * 5 * 64
    assert "forward" not in model.blocks[0].__dict__


@pytest.mark.parametrize("model", ["vit_pico", "swin_nano", "cvt_nano"])
def test_channels_last_and_deterministic_are_the_same_but_for_rounding(tmp_path: Path, model: str) -> None:
    options = {"channels_last": True, "deterministic": True}
    plain = tiny(tmp_path / "plain", model, "scratch")
    other = tiny(tmp_path / "other", model, "scratch", options)
    for name, value in plain.state.items():
        torch.testing.assert_close(other.state[name], value, rtol=1e-3, atol=1e-5)


def test_channels_last_reaches_the_convolutions(make_recipe: Any) -> None:
    encoder = build_encoder(*make_recipe((32, 32), 3, model="cvt_nano", method="scratch"))
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    prepare(encoder, Execution(channels_last=True))
    weight = (
        encoder.stage0.patch_embed.proj.weight
        if hasattr(encoder.stage0.patch_embed, "proj")
        else next(p for p in encoder.parameters() if p.ndim == 4 and p.shape[1] > 1)
    )
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())


def test_deterministic_holds_within_and_not_after() -> None:
    with reproducible(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(KeyError), reproducible(True):
        raise KeyError
    assert not torch.are_deterministic_algorithms_enabled()


PAGES = """
import os, resource, torch
from ssat_probe.execution import keeping_memory

SIZE = 2**26  # 64 MiB: more than glibc ever keeps by itself

def taken():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(SIZE // 4)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * os.sysconf("SC_PAGE_SIZE") / SIZE

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / SIZE

taken()
start = resident()
print(taken())
with keeping_memory():
    for _ in range(30):  # aligned blocks fill gaps of the heap first
        taken()
    print(taken())
    print(resident() - start)
print(resident() - start)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_is_kept_within_and_given_back_after() -> None:
    # In a process of its own: where a process of many tests takes its memory from depends on those before.
    shown = subprocess.run([sys.executable, "-c", PAGES], capture_output=True, text=True, check=True)
    taken_before, taken_within, held_within, held_after = map(float, shown.stdout.split())
    assert taken_before > 0.8
    assert taken_within < 0.03
    assert held_within > 0.9
    assert held_after < 0.1


# torch's compiler looks at the gradient of every tensor, and hides its own warning of that from all but pytest.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on a CPU, and g++ is not here")
def test_compiled_blocks_are_the_same_but_for_rounding(tmp_path: Path) -> None:
    # Not AdamW, which makes whole steps of the rounding where a gradient is 0, as those of the keys' biases are.
    fields: dict[str, Any] = {"ema_decay": 0.9, "optimiser": "sgd", "base_lr": 0.5}
    plain = tiny(tmp_path / "plain", **fields)
    compiled = tiny(tmp_path / "compiled", options={"compile": True}, **fields)
    assert plain.state.keys() == compiled.state.keys()
    for name, value in plain.state.items():
        torch.testing.assert_close(compiled.state[name], value, rtol=1e-3, atol=1e-5)


def test_compiling_is_asked_of_every_block_and_leaves_the_names(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder(*make_recipe(model="vit_nano"))
    names, seen = list(encoder.state_dict()), []
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: seen.append((self, options)))
    prepare(encoder, Execution(compile=True))
    assert [block for block, _ in seen] == list(encoder.blocks) == blocks_of(encoder)
    assert all(options == {"dynamic": False} for _, options in seen)
    assert list(encoder.state_dict()) == names


@pytest.mark.parametrize(
    ("options", "device", "is_fused"),
    [
        ({"compile": True}, "cpu", False),
        ({"compile": True}, "cuda", True),
        ({"compile": True, "attention": "fused"}, "cpu", True),
        ({}, "cpu", True),
    ],
)
def test_the_compiler_sees_the_products_of_attention_on_a_cpu(
    make_recipe: Any, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], device: str, is_fused: bool
) -> None:
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: None)
    recipe, facts = make_recipe(model="vit_nano")
    network = nn.ModuleDict({"encoder": build_encoder(recipe, facts), "decoder": build_decoder(recipe, facts)})
    prepare(network, Execution(**options), device)
    assert [block.attn.fused_attn for block in blocks_of(network)] == [is_fused] * 8


@pytest.mark.parametrize(
    ("model", "options", "sentence"),
    [
        (
            "cvt_nano",
            {"checkpointing": True},
            "checkpointing must be left out for a model with batch norms in its blocks",
        ),
        (
            "vit_pico",
            {"checkpointing": True, "compile": True},
            "checkpointing must be left out with compile, which dec",
        ),
    ],
)
def test_what_cannot_be_is_refused(make_recipe: Any, model: str, options: dict[str, bool], sentence: str) -> None:
    encoder = build_encoder(*make_recipe(model=model))
    with pytest.raises(ValueError, match=sentence):
        prepare(encoder, Execution(**options))


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(
        ValueError, match="compile must be left out for a model whose blocks are not known, got compile"
    ):
        prepare(nn.Linear(2, 2), Execution(compile=True))
