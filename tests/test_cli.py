"""The command line, in process: what it prints, what it writes, and one sentence for every mistake."""

import json
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ssat_probe import registry
from ssat_probe.checkpoint import load_checkpoint, save_tensors
from ssat_probe.cli import main

Paths = dict[str, Path]
Run = Callable[..., str]
METHODS = ("scratch", "ssl_ft", "ssat")
SMALL = ("--subset", "23", "--epochs", "1", "--batch-size", "7", "--device", "cpu")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that works, in a folder of its own; gives what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")

    def ran(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert (caught.value.code, printed.err) == (0, "")
        return printed.out

    return ran


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command that is a mistake; gives the one line on stderr."""
    monkeypatch.chdir(tmp_path)

    def said(*words: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        printed = capsys.readouterr()
        assert caught.value.code == 2
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        assert "Traceback" not in printed.out + printed.err
        return printed.err.rstrip("\n")

    return said


# Mistakes: checkpoints


@pytest.mark.parametrize("option", [("--data-dir", "there"), ("--download",)])
def test_an_embedded_set_takes_no_folder(refused: Run, option: tuple[str, ...]) -> None:
    said = refused("train", *SMALL, *option)
    assert said == f"{option[0]} must have an effect, got one that has none: data digits is embedded; leave it out."


@pytest.mark.parametrize("command", ["describe", "variance", "path"])
def test_a_look_at_embedded_images_takes_no_folder(refused: Run, checkpoints: Paths, command: str) -> None:
    two = ["--ckpt", checkpoints["ssat"], checkpoints["scratch"], "--data-dir", "there"]
    sentence = "--data-dir must have an effect, got one that has none: data {} is embedded; leave it out."
    assert refused(command, *two) == sentence.format("digits")
    assert refused(command, *two, "--data", "mnist5k") == sentence.format("mnist5k")
    said = refused(command, *two, "--data", "fashion_mnist")
    assert said.startswith("there must be the folder of fashion_mnist, got no such folder; check --data-dir")


def test_an_option_that_is_typed_has_an_effect_even_at_its_default(refused: Run) -> None:
    said = refused("train", *SMALL, "--method", "scratch", "--lambda-weight", "0.1")
    assert said.startswith("--lambda-weight must have an effect, got one that has none: method scratch has one loss")


def test_a_warning_is_one_sentence_on_stderr(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(["train", "--method", "scratch", "--select-on", "test", *SMALL])
    said = capsys.readouterr().err
    assert caught.value.code == 0
    assert said.count("\n") == 1
    assert said.startswith("Warning: select_on test keeps the epoch that is best on the test images, so their accur")


def test_a_checkpoint_that_is_not_there(refused: Run, checkpoints: Paths) -> None:
    assert refused("attention", "--ckpt", "no/such.pt") == "no/such.pt must be a checkpoint, got no such file."
    assert (
        refused("accuracy", "--ckpt", checkpoints["ssat"], "no.pt") == "no.pt must be a checkpoint, got no such file."
    )
    assert refused("accuracy", "--ckpt", ".") == ". must be a checkpoint, got a folder."


@pytest.mark.parametrize("probe", registry.names("probes"))
def test_a_checkpoint_cut_short(refused: Run, checkpoints: Paths, tmp_path: Path, probe: str) -> None:
    (tmp_path / "cut.pt").write_bytes(checkpoints["ssat"].read_bytes()[:100_000])
    assert refused(probe, "--ckpt", "cut.pt") == (
        "cut.pt must be a checkpoint, got 100000 bytes that cannot be read as one; it is damaged, cut short or of "
        "another kind: copy or train it again."
    )


def test_a_corrupt_checkpoint(refused: Run, checkpoints: Paths, tmp_path: Path) -> None:
    content = bytearray(checkpoints["ssat"].read_bytes())
    head = torch.load(checkpoints["ssat"], weights_only=True)["model"]["head.weight"].numpy().tobytes()
    content[content.index(head) + len(head) // 2] ^= 0xFF  # between tensors there are bytes that mean nothing
    (tmp_path / "a.pt").write_bytes(content)
    assert re.match(
        r"a\.pt must be a checkpoint, got \d+ bytes that .* it is damaged", refused("accuracy", "--ckpt", "a.pt")
    )
    (tmp_path / "b.pt").write_text("no checkpoint")
    assert refused("accuracy", "--ckpt", "b.pt").startswith(
        "b.pt must be a checkpoint, got 13 bytes that cannot be read"
    )


def test_a_checkpoint_of_another_model(refused: Run, checkpoints: Paths, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 3).state_dict(), tmp_path / "linear.pt")
    assert refused("accuracy", "--ckpt", "linear.pt") == (
        "linear.pt must be a checkpoint written by ssat-probe (format ssat-probe/1) or weights in one of the formats "
        "cvt, dino, huggingface, lucidrains, mae, simmim, swin, timm, videomae, got a file with: weight, bias; if it "
        "holds a model of timm's, name it with --model timm:NAME."
    )
    one = load_checkpoint(checkpoints["ssat"])
    content = torch.load(checkpoints["ssat"], weights_only=True)
    content["recipe"]["patch_size"] = [4, 4]
    recipe = type(one.recipe).from_dict(content["recipe"])
    content["hash"] = type(one)(one.path, recipe, one.facts, one.stage, one.epoch, one.state).hash
    save_tensors(content, tmp_path / "other.pt")
    assert refused("accuracy", "--ckpt", "other.pt") == (
        "other.pt: 'patch_embed.proj.weight' must have shape (32, 1, 4, 4) for the recipe's vit_nano, got shape "
        "(32, 1, 2, 2); the file holds weights of another model."
    )


class Touch:
    """A pickle of it makes a file when it is opened by a careless program."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("sign"),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_pickle_with_code_in_it(refused: Run, tmp_path: Path, *, is_zip: bool) -> None:
    if is_zip:
        torch.save({"model": Touch()}, tmp_path / "evil.pt")
    else:
        (tmp_path / "evil.pt").write_bytes(pickle.dumps({"model": Touch()}))
    assert re.fullmatch(
        r"evil\.pt must hold tensors and plain data alone, got a pickle that would run code when opened \([\w.]+\), "
        r"so it was not opened; save a state_dict instead, or give --trust if you trust its author to run programs "
        r"here\.",
        refused("attention", "--ckpt", "evil.pt"),
    )
    assert not (tmp_path / "sign").exists()


# Mistakes: words


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        # unknown probe, model, data set, method, option
        ("atention --ckpt a.pt", r'Unknown command "atention"\. Did you mean "attention"\? .*'),
        ("train --model vit_tny", r"No 'vit_tny' in models: .*vit_pico, vit_nano, .*\. Did you mean 'vit_tiny'\?"),
        ("train --data digts", r"No 'digts' in data: .*cifar10, .*digits, .*\. Did you mean 'digits'\?"),
        ("train --method sat", r'Invalid value "sat" for --method\. Choose from: .*\. Did you mean "ssat"\?'),
        ("train --decoder shalow", r"No 'shalow' in decoders: shallow, simmim\. Did you mean 'shallow'\?"),
        ("train --augmentation stong", r'Invalid value "stong" for --augmentation\. .*Did you mean "strong"\?'),
        ("train --mask-ration 0.5", r"Unknown option: --mask-ration\. Did you mean --mask-ratio\?"),
        ("attention --ckpt a.pt --querys cls", r"Unknown option: --querys\. Did you mean --queries\?"),
        ("accuracy --ckpt a.pt --num-image 3", r"Unknown option: --num-image\. Did you mean --num-images\?"),
        ("accuracy", r'Command "accuracy" parameter --ckpt requires an argument\.'),
        ("train extra", r"Unused Tokens: \['extra'\]\."),
        # outside their range
        ("train --lambda-weight 1.5", r"lambda_weight must be between 0 and 1, got 1\.5\."),
        ("train --lambda-weight -0.1", r"lambda_weight must be between 0 and 1, got -0\.1\."),
        ("train --mask-ratio 1", r"mask_ratio must be between 0 and 1, both excluded, got 1\.0\."),
        ("train --mask-ratio -3", r"mask_ratio must be between 0 and 1, both excluded, got -3\.0\."),
        ("train --subset 0", r"subset must be a share .* of at least 2 \(all images: leave it out\), got 0\.0\."),
        ("train --subset -5", r"subset must be a share .* of at least 2 \(all images: leave it out\), got -5\.0\."),
        ("train --subset 1.5", r"subset must be a share .* of at least 2 \(all images: leave it out\), got 1\.5\."),
        ("train --subset 5000", r"A subset must be a count from 1 to the 1170 images there are, .* got 5000; .*"),
        ("train --epochs 0", r"epochs must be at least 1, got 0\."),
        ("train --epochs few", r'Invalid value for --epochs: unable to convert "few" into int\.'),
        ("accuracy --ckpt a.pt --num-images -1", r"num_images must be a whole number of at least 0, got -1\."),
        ("accuracy --ckpt a.pt --max-images -1", r"num_images must be a whole number of at least 0, got -1\."),
        ("accuracy --ckpt a.pt --batch-size 0", r"batch_size must be a whole number of at least 1, got 0\."),
        # patches and tokens
        ("train --patch-size 3", r"patch_size must divide the image of 8x8 pixels, got 3x3; choose another .*"),
        ("train --img-size 12 10 --patch-size 4 4", r"patch_size must divide the image of 12x10 pixels, got 4x4; .*"),
        ("train --mask-ratio 0.99", r"mask_ratio must leave .* of 16, got 0\.99, which leaves no visible one; .*"),
        ("train --mask-ratio 0.01", r"mask_ratio must leave .* of 16, got 0\.01, which leaves no masked one; .*"),
        ("train --decoder-heads 3 --device cpu", r"decoder_width must be a multiple of decoder_heads 3, got 16; .*"),
        # data not on disk
        ("train --data cifar10 --data-dir no/such", r"no/such must be the folder of cifar10, got .*--download.*"),
        ("train --data folder --data-dir no/such", r".*no/such.*"),
        ("train --data folder", r".*--data-dir.*"),
        ("train --device abacus --epochs 1 --subset 23", r"device must be one that is here, got 'abacus'; use cpu, .*"),
        # files of the other commands
        ("draw no/attention.csv", r"no/attention\.csv must be a table written by a probe, got no such file\."),
        ("train --config no.yaml", r"--config must be followed by a YAML file, got 'no\.yaml'; check the path\."),
    ],
)  # fmt: skip
def test_a_word_that_makes_no_sense(refused: Run, words: str, sentence: str) -> None:
    assert re.fullmatch(sentence, refused(*words.split()))


def test_a_device_that_is_not_here_for_a_probe(refused: Run, checkpoints: Paths) -> None:
    said = refused("accuracy", "--ckpt", checkpoints["ssat"], "--device", "abacus")
    assert said == "device must be one that is here and has float64, got 'abacus'; use cpu, or leave it out."


def test_an_output_folder_that_cannot_be_written(refused: Run, checkpoints: Paths, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ending = "must be a folder that can be written, got 'Not a directory'; choose another with --out."
    assert refused("train", *SMALL, "--out", "file/sub") == f"file/sub/vit_nano-digits-ssat-seed0 {ending}"
    words = ("accuracy", "--ckpt", checkpoints["ssat"], "--device", "cpu", "--num-images", 11, "--out", "file/sub")
    assert refused(*words) == f"file/sub {ending}"


def test_reconstruction_of_a_checkpoint_without_a_decoder(refused: Run, checkpoints: Paths) -> None:
    said = refused("hessian", "--ckpt", checkpoints["scratch"], "--loss", "joint", "--device", "cpu")
    assert re.search(r"scratch\.pt must hold a decoder for the reconstruction error, got none; use --loss", said)


def test_a_table_that_no_probe_wrote(refused: Run, tmp_path: Path) -> None:
    for name in registry.names("probes"):
        (tmp_path / f"{name}.csv").write_text("a,b\n1,2\n")
        said = f"A table of {name} must have a column 'checkpoint', got none; pass one the probe wrote."
        assert refused("draw", f"{name}.csv") == said
    (tmp_path / "weather.csv").write_text("a,b\n1,2\n")
    assert refused("draw", "weather.csv").startswith("No 'weather' in probes: accuracy, attention, ")


# Mistakes: YAML


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("lamda_weight: 0.3", r'Unknown option: "\[lamda_weight\]" from .*a\.yaml\. Did you mean --lambda-weight\?'),
        ("method: scrach", r'Invalid value "scrach" for \[method\] from .*a\.yaml\. .*Did you mean "scratch"\?'),
        ("epochs: [1", r"a\.yaml must be YAML \(key: value\), got something else in line 1; correct it there\."),
        ("- epochs", r"a\.yaml must hold options \(key: value\), got a list; write one a line\."),
        ("lambda_weight: 7", r"lambda_weight must be between 0 and 1, got 7\.0\."),
    ],
)
@pytest.mark.parametrize("form", ["two words", "one word"])
def test_a_mistake_in_a_yaml_file(refused: Run, tmp_path: Path, text: str, sentence: str, form: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    option = ("--config", "a.yaml") if form == "two words" else ("--config=a.yaml",)
    assert re.fullmatch(sentence, refused("train", *option, "--plan"))


# What works


@pytest.mark.parametrize(
    "words", [("--help",), ("train", "--help"), *((p, "--help") for p in registry.names("probes"))]
)
def test_help(run: Run, words: tuple[str, ...]) -> None:
    printed = run(*words)
    assert printed.startswith("Usage: ")
    if words == ("--help",):
        for name in ("train", "reproduce", "draw", "report", "data", "list", *registry.names("probes")):
            assert re.search(rf"\b{name}\b +\w", printed), name
    elif words[0] != "train":
        assert all(option in printed for option in ("--ckpt", "--out", "--num-images", "--device", "--data-dir"))
        assert registry.summary("probes", words[0])[:40] in printed
    else:
        assert "Weight of classification in ssat" in " ".join(printed.replace("│", " ").split())


@pytest.mark.parametrize("words", [["--help"], ["attention", "--help"]])
def test_help_is_fast_because_it_imports_nothing_heavy(words: list[str]) -> None:
    code = f"""
import sys
from ssat_probe.cli import main
try:
    main({words})
except SystemExit:
    pass
print("loaded:", *({{"torch", "timm", "numpy", "pandas", "matplotlib", "scipy", "sklearn"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("loaded:\n")


def test_list_names_everything_there_is(run: Run) -> None:
    printed = run("list")
    for kind in ("models", "data", "objectives", "decoders", "probes"):
        assert f"{kind}:" in printed
        for name in registry.names(kind):
            assert f"  {name:<16} {registry.summary(kind, name)}\n" in printed
    assert "vit_pico, vit_nano, vit_tiny6, vit_tiny, vit_small, vit_base" in printed


def test_data_describes_a_set_and_checks_what_is_there(run: Run, refused: Run, tmp_path: Path) -> None:
    printed = run("data", "digits")
    assert "Layout: nothing is needed." in printed
    assert "Check of test: 497 images, read at 8x8; as it should be.\n" in printed
    sentence = f"{tmp_path / 'train_32x32.mat'} must be the train images of SVHN in format 2 (cropped digits), got no"
    assert refused("data", "svhn", "--data-dir", tmp_path).startswith(sentence)
    assert refused("data", "digist").endswith("Did you mean 'digits'?")


def test_a_plan_says_what_a_run_costs_and_trains_nothing(run: Run, tmp_path: Path) -> None:
    printed = run("train", "--method", "ssl_ft", "--subset", "500", "--epochs", "13", "--plan")
    assert printed == (
        "vit_nano-digits-ssl_ft-seed0: 51,850 parameters + 7,204 in the decoder, peak learning rate 0.00025\n"
        "  pretrain: 13 epochs, 91 steps, 5,824 images, 0.369 M multiply-adds per image forward\n"
        "  finetune: 13 epochs, 91 steps, 5,824 images, 0.949 M multiply-adds per image forward\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_training_writes_a_checkpoint_and_a_second_call_reuses_it(run: Run, tmp_path: Path, method: str) -> None:
    words = ("train", "--method", method, *SMALL, "--out", "runs")
    path = Path("runs") / f"vit_nano-digits-{method}-seed0" / f"{method}.pt"
    assert run(*words).endswith(f"Wrote {path}\n")
    recipe = load_checkpoint(path).recipe
    assert (recipe.method, recipe.subset, recipe.epochs, recipe.batch_size) == (method, 23, 1, 7)
    before = path.stat().st_mtime_ns
    assert run(*words).endswith(f"Found {path}, trained before\n")
    assert path.stat().st_mtime_ns == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["runs"]


def test_a_yaml_file_gives_options_and_the_command_line_overrides_them(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("method: scratch\nepochs: 7\nsubset: 100\nimg_size: [8, 8]\nbetas: [0.9, 0.95]\n")
    for words in (("--config", "a.yaml", "--epochs", "3"), ("--epochs", "3", "--config=a.yaml")):
        printed = run("train", *words, "--plan")
        assert "vit_nano-digits-scratch-seed0" in printed
        assert "train: 3 epochs, 3 steps, 192 images" in printed
    (tmp_path / "empty.yaml").write_text("")
    assert "vit_nano-digits-ssat-seed0" in run("train", "--config", "empty.yaml", "--plan")


QUICK: dict[str, tuple[str, ...]] = {
    "hessian": ("--steps", "7"),
    "terms": ("--steps", "6"),
    "blocks": ("--steps", "6"),
    "landscape": ("--points", "5", "--num-random", "2", "--steps", "6"),
}
"What makes a slow probe quick."


@pytest.mark.parametrize("probe", registry.names("probes"))
def test_a_probe_from_end_to_end(
    run: Run, checkpoints_of_probe: Callable[[str], Paths], tmp_path: Path, probe: str
) -> None:
    options = QUICK.get(probe, ())
    paths = list(checkpoints_of_probe(probe).values())
    common = ("--num-images", 11, "--batch-size", 4, "--device", "cpu", "--out", "out")
    printed = run(probe, "--ckpt", *paths, *common, *options)
    assert all(path.parent.name in printed for path in paths)
    assert printed.endswith(f"Wrote out/{probe}.csv, .json, .png and .pdf\n")
    has_rows = any(column.of for column in registry.load("probes", probe).Probe.columns)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *(f"{probe}.{ending}" for ending in ("csv", "json", "pdf", "png")),
        *([f"{probe}_rows.csv"] if has_rows else []),
    ]
    record = json.loads((tmp_path / "out" / f"{probe}.json").read_text())
    seen = [entry["path"] for entry in record["checkpoints"]]
    assert [path for path in seen if path] == [str(path) for path in paths]
    assert record["sample"]["num_images"] == 11
    # The figure can be drawn again from the table alone.
    shutil.copy(tmp_path / "out" / f"{probe}.csv", tmp_path / f"{probe}.csv")
    assert run("draw", f"{probe}.csv") == f"Wrote {probe}.png and .pdf\n"
    assert (tmp_path / f"{probe}.png").read_bytes() == (tmp_path / "out" / f"{probe}.png").read_bytes()


def test_without_out_the_results_lie_in_a_folder_named_after_the_checkpoints(run: Run, checkpoints: Paths) -> None:
    run("accuracy", "--ckpt", checkpoints["ssat"], "--num-images", 11, "--device", "cpu")
    (folder,) = Path("figures").iterdir()
    assert folder.name.startswith("vit_nano-digits-ssat-seed0-ssat-")


def test_an_exact_spectrum_says_first_what_it_costs(run: Run, refused: Run, checkpoints: Paths) -> None:
    command = ["hessian", "--ckpt", checkpoints["ssat"], "--num-images", 3, "--method", "exact", "--device", "cpu"]
    told, *_, written = run(*command, "--params", "head.*", "--out", "out").splitlines()
    assert told.startswith("hessian: exact spectrum of 330 parameters, 0.0016 GiB of matrices: about ")
    assert told.endswith(" s for eigenvalues per checkpoint, 1 of them")
    assert written.startswith("Wrote out/hessian.csv")
    assert "must fit into 1e-05 GiB, got 330 parameters that need 0.00162 GiB. At most 25 parameters fit" in refused(
        *command, "--params", "head.*", "--memory", "1e-5"
    )


def test_a_key_of_a_yaml_file_may_have_the_name_of_a_command(run: Run, refused: Run, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("data: mnist5k\nmethod: scratch\nepochs: 1\n")
    assert run("train", "--config", "a.yaml", "--plan").startswith("vit_nano-mnist5k-scratch-seed0: ")
    (tmp_path / "b.yaml").write_text("data: digit\n")
    assert "'digits'" in refused("train", "--config", "b.yaml", "--plan")


def test_options_of_a_probe_from_a_yaml_file(run: Run, checkpoints: Paths, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("queries: cls\nblocks: [1, 3]\nnum_images: 11\nout: there\n")
    run("attention", "--ckpt", checkpoints["ssat"], "--config", "a.yaml", "--device", "cpu")
    record = json.loads((tmp_path / "there" / "attention.json").read_text())
    assert record["options"] == {"queries": "cls", "keys": "patch", "blocks": [1, 3], "untrained_twin": True}


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: object) -> tuple[str, ...]:
        raise KeyboardInterrupt

    monkeypatch.setattr(registry, "summary", interrupted)
    with pytest.raises(SystemExit) as caught:
        main(["list"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "Interrupted; the same command goes on from what was saved last.\n"


def test_a_process_whose_peer_has_gone_says_so_and_another_error_keeps_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*args: object) -> tuple[str, ...]:
        raise RuntimeError(sentence)

    monkeypatch.setattr(registry, "summary", lost)
    sentence = "[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:43605"
    with pytest.raises(SystemExit) as caught:
        main(["list"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("All processes must go on together, got one that has ended; what")
    sentence = "mat1 and mat2 shapes cannot be multiplied"
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        main(["list"])


def test_the_version_is_that_of_the_package(run: Run) -> None:
    from importlib.metadata import version

    assert run("--version").strip() == version("ssat-probe")


# Weights of other tools


def test_foreign_weights_are_described_and_probed(run: Run) -> None:
    words = ("--ckpt", "timm:vit_tiny_patch16_224", "--img-size", "32", "--data", "digits", "--device", "cpu")
    described = run("describe", *words)
    assert "loaded: nothing, untrained" in described
    assert "attention: applies" in described
    run("variance", *words, "--num-images", "3", "--out", "a")
    seen, twin = json.loads(Path("a/variance.json").read_text())["checkpoints"]
    assert twin["path"] == ""
    assert seen["loading"]["layout"] == "timm:vit_tiny_patch16_224"
    assert Path("a/variance.png").is_file()


def test_a_checkpoint_is_exported(run: Run, refused: Run, checkpoints: Paths) -> None:
    for to, name in (("timm", "b.pth"), ("mae", "c.pth"), ("safetensors", "d.safetensors")):
        assert run("export", "--ckpt", checkpoints["ssat"], "--to", to, "--out", name) == f"Wrote {name}\n"
        assert Path(name).is_file()
    assert "applies" in run("describe", "--ckpt", "d.safetensors", "--device", "cpu")
    assert refused("export", "--ckpt", checkpoints["scratch"], "--to", "mae").endswith("files without a decoder.")


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} -m ssat_probe list | head -n 1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("models:\n", "")


def test_the_plan_of_a_sweep_says_which_point_costs_what(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(
        "{recipe: {model: vit_pico, subset: 40}, methods: [scratch, ssat], seeds: [0], vary: {mask_ratio: [0.5, 0.75]},"
        " probes: {accuracy: {}}}",
        encoding="utf-8",
    )
    named = [line.split(":")[0] for line in run("reproduce", path, "--plan").splitlines() if "parameters" in line]
    assert named == [
        "vit_pico-digits-scratch-seed0",
        "mask_ratio=0.5/vit_pico-digits-ssat-seed0",
        "mask_ratio=0.75/vit_pico-digits-ssat-seed0",
    ]


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("data", "--set must be followed by field=value, got 'data'"),
        ("base_lr=x1e-3", "base_lr must be float or int, got 'x1e-3'"),
        ("data=fake-data", "No 'fake-data' in data: "),
    ],
)
def test_a_change_of_an_analysis_that_cannot_be(refused: Run, word: str, sentence: str) -> None:
    assert sentence in refused("reproduce", "--plan", "--set", word)
