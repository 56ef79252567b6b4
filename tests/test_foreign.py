"""Weights of other tools under the probes: images as the model wants them, classes only where they are known."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from ssat_probe.checkpoint import Checkpoint
from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.probe import make, measure
from ssat_probe.sample import Sample
from ssat_probe.source import Source
from ssat_probe.subject import Subject

NAME = "vit_tiny_patch16_224"
SMALL = Source(model=f"timm:{NAME}", img_size=(32,), resize=True)
FEW = {"data": "digits", "num_images": 7, "batch_size": 3, "device": "cpu"}


def foreign(path: Path | str, source: Source = Source(), **more: object) -> Foreign:
    found = open_weights(path, source, **more)  # type: ignore[arg-type]
    assert isinstance(found, Foreign)
    return found


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A real timm model's own file, with a head for ten classes."""
    torch.manual_seed(5)
    path = tmp_path / "tiny.safetensors"
    save_file(timm.create_model(NAME, img_size=32, num_classes=10).state_dict(), path)
    return path


def test_our_own_checkpoints_are_read_as_ever(checkpoints: dict[str, Path]) -> None:
    assert isinstance(open_weights(checkpoints["ssat"], SMALL), Checkpoint)


def test_an_untrained_model_depends_on_its_seed_alone() -> None:
    small = Source(img_size=(32,))
    first = foreign(f"timm:{NAME}", small)
    torch.rand(3)
    assert foreign(f"timm:{NAME}?seed=0", small).hash == first.hash
    other = foreign(f"timm:{NAME}?seed=1", small)
    assert other.hash != first.hash
    assert (first.label, other.label, first.recipe.method) == (f"{NAME}-untrained", f"{NAME}-untrained-1", "")
    assert (first.facts.mean, first.preparation.crop) == ((0.5, 0.5, 0.5), 0.9)
    assert foreign(f"timm:{NAME}", small, data="digits").facts.num_classes == 10


def test_words_after_a_name_of_timm_are_checked() -> None:
    with pytest.raises(ValueError, match=r"must be timm:NAME, timm:NAME\?pretrained or .* got 'timm:vit\?pretraned'"):
        open_weights("timm:vit?pretraned")
    with pytest.raises(ValueError, match=r"must be one that timm .* got 'no_such_model'"):
        open_weights("timm:no_such_model")


def test_pretrained_weights_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder as the hub's client lays it out: timm's and the hub's own code read it, without a network."""
    from huggingface_hub import constants

    torch.manual_seed(3)
    model = timm.create_model("vit_tiny_patch16_224")
    repository = tmp_path / "models--timm--vit_tiny_patch16_224.augreg_in21k_ft_in1k"
    (repository / "snapshots" / "0").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0")
    save_file(model.state_dict(), repository / "snapshots" / "0" / "model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = foreign(f"timm:{NAME}?pretrained")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(found.encoder().eval()(images), model.eval()(images))
    assert (found.label, found.facts.classes[:2]) == (f"{NAME}-pretrained", ("n01440764", "n01443537"))
    with pytest.raises(ValueError, match=r"must be shown images of \(224, 224\) pixels, .* got --img-size \(32, 32\)"):
        open_weights(f"timm:{NAME}?pretrained", Source(img_size=(32,)))
    small = foreign(f"timm:{NAME}?pretrained", Source(img_size=(32,), resize=True))
    assert small.report.resized == {"pos_embed": "from images of (224, 224) to (32, 32)"}
    with pytest.raises(ValueError, match=r"timm:vit_small_patch16_224\?pretrained must be in the cache .* got: "):
        open_weights("timm:vit_small_patch16_224?pretrained")


def test_a_bare_state_dict_of_a_named_model(saved: Path) -> None:
    named, told = foreign(saved, SMALL), foreign(saved)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(named.encoder().eval()(images), told.encoder().eval()(images))
    assert named.facts.mean == (0.5, 0.5, 0.5)
    assert told.facts.mean != named.facts.mean
    assert foreign(saved, Source(mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))).facts.std == (1.0, 2.0, 3.0)


def test_hierarchical_models_load_by_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", num_classes=5)
    torch.save({"model": model.state_dict()}, tmp_path / "swin.pth")
    found = foreign(tmp_path / "swin.pth", Source(model="timm:swin_tiny_patch4_window7_224"))
    assert found.report.fraction == 1.0
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(found.encoder().eval()(images), model.eval()(images))


def test_what_no_format_knows_is_named(tmp_path: Path, saved: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"linear\.pt must be a checkpoint written by .* formats cvt, .* weight, bias"):
        open_weights(tmp_path / "linear.pt")
    with pytest.raises(ValueError, match=r"tiny\.safetensors: The weights must fill the model .* got "):
        open_weights(saved, Source(model="timm:vit_small_patch16_224", img_size=(32,)))


def test_images_are_shown_as_the_models_config_says(saved: Path) -> None:
    subject = Subject.of(saved, Sample(**FEW), source=SMALL)
    batch = next(subject.batches())
    assert batch.images.shape == (3, 3, 32, 32)
    assert float(batch.images.min()) >= -1
    assert torch.equal(batch.images[:, 0], batch.images[:, 2])
    with pytest.raises(ValueError, match=r"does not say on which images it was trained; name the ones .* with --data"):
        Subject.of(saved, Sample(), source=SMALL)


def test_accuracy_only_where_classes_agree(saved: Path) -> None:
    with pytest.raises(ValueError, match=r"The classes of .*tiny\.safetensors must be known .* --trained-on"):
        measure("accuracy", [saved], model=SMALL.model, img_size=(32,), **FEW)
    table = measure("accuracy", [saved], model=SMALL.model, img_size=(32,), trained_on="digits", **FEW)
    assert table["num_images"].tolist() == [7]
    assert table["data"].tolist() == ["digits"]
    torch.save(timm.create_model(NAME, img_size=32, num_classes=5).state_dict(), saved.with_suffix(".pt"))
    with pytest.raises(ValueError, match=r"with the 5 classes that the head has, got 'digits' with 10"):
        open_weights(saved.with_suffix(".pt"), Source(trained_on="digits"))


@pytest.mark.parametrize("name", ["variance", "attention"])
def test_probes_do_not_depend_on_the_batch_size(saved: Path, name: str) -> None:
    options = FEW | {"model": SMALL.model, "img_size": (32,), "dtype": "float64", "untrained_twin": False}
    tables = [measure(name, [saved], **options | {"batch_size": size}) for size in (3, 7)]
    numbers = [table.select_dtypes("number").drop(columns="self_check", errors="ignore") for table in tables]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=1e-9, atol=1e-12)
    assert tables[0]["method"].tolist() == [""] * len(tables[0])


def test_the_hash_is_that_of_the_weights_whatever_the_arithmetic(saved: Path) -> None:
    hashes = {
        Subject.of(saved, Sample(**FEW, dtype=dtype), source=SMALL).checkpoint.hash for dtype in ("float32", "float64")
    }
    assert len(hashes) == 1


def test_the_hessian_of_a_foreign_model() -> None:
    tiny = Source(img_size=(16,))
    subject = Subject.of(f"timm:{NAME}", Sample(**FEW | {"num_images": 2}), "train", tiny)
    loss = subject.loss(next(subject.batches()))
    assert float(loss.detach()) == pytest.approx(np.log(10), rel=0.1)
    assert make("hessian").columns


def test_the_untrained_twin_has_the_architecture_and_other_weights(saved: Path) -> None:
    subject = Subject.of(saved, Sample(**FEW), source=SMALL)
    twins = [subject.untrained() for _ in range(2)]
    assert twins[0].checkpoint.hash == twins[1].checkpoint.hash != subject.checkpoint.hash
    shapes = [[value.shape for value in one.model.state_dict().values()] for one in (subject, twins[0])]
    assert shapes[0] == shapes[1]
    assert (twins[0].checkpoint.epoch, twins[0].model.training) == (0, False)


def test_the_name_of_the_twin_says_what_is_known(saved: Path) -> None:
    table = measure("variance", [saved], **FEW | {"model": SMALL.model, "img_size": (32,), "num_images": 2})
    names = table.loc[table["method"] == "untrained", "checkpoint"].unique()
    assert names.tolist() == [f"{NAME}-untrained-patch16x16-seed0"]


def test_a_small_file_whose_names_tell_a_huge_model_is_refused_before_there_is_room(tmp_path: Path) -> None:
    width = 4096
    shapes = {
        "patch_embed.proj.weight": (width, 3, 1, 1),
        "cls_token": (1, 1, width),
        "pos_embed": (1, 5, width),
        "blocks.0.norm1.weight": (width,),
        "blocks.0.attn.qkv.weight": (3 * width, 1),
        "blocks.0.mlp.fc1.weight": (4 * width, 1),
        "blocks.200.norm1.weight": (1,),
        "norm.weight": (width,),
    }
    torch.save({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "few.pth")
    sentence = r"few\.pth: The file must hold about as many values as its model has, got 73,\d+ for a model of 40,47"
    with pytest.raises(ValueError, match=sentence):
        open_weights(tmp_path / "few.pth", Source(allow_partial=True))


def test_what_is_said_of_the_pixels_is_what_is_done(tmp_path: Path) -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5, depth=2)
    torch.save(model.state_dict(), tmp_path / "a.pth")

    def said(**fields: object) -> tuple[str, tuple[float, ...]]:
        found = open_weights(tmp_path / "a.pth", Source(**fields))  # type: ignore[arg-type]
        assert isinstance(found, Foreign)
        return found.report.note, found.facts.mean

    assert said() == ("images normalised as ImageNet's", (0.485, 0.456, 0.406))
    told = said(model="timm:vit_tiny_patch16_224", img_size=(32,), allow_partial=True)
    assert told == ("images normalised as timm's configuration says", (0.5, 0.5, 0.5))
    assert said(mean=(0.1, 0.2, 0.3), std=(1.0,) * 3) == ("images normalised as told", (0.1, 0.2, 0.3))
