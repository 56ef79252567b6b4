"""Downloads that fail: the hub's own client against a port where nobody listens, and stand-ins for what may come."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from timm.models import _hub

from ssat_probe.cli import main
from ssat_probe.foreign import open_weights
from ssat_probe.hub import fetching

NAME = "vit_tiny_patch16_224"
SENTENCE = f"timm:{NAME}?pretrained must be in the cache of timm's hub or be fetched from there, got: "


@pytest.fixture
def nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub that refuses every connection, an empty cache, and no pause between attempts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"http://127.0.0.1:{port}/{{repo_id}}/{{filename}}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)


@pytest.mark.parametrize(
    "words",
    [
        ("describe", "--ckpt", f"timm:{NAME}?pretrained"),
        ("variance", "--ckpt", f"timm:{NAME}?pretrained", "--data", "digits", "--out", "out"),
        ("train", "--model", f"timm:{NAME}?pretrained", "--data", "digits", "--img-size", "32", "--out", "out"),
    ],
)
def test_without_a_network_every_command_ends_in_one_sentence_and_writes_nothing(
    nobody: None, words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    said = capfd.readouterr()
    lines = [line for line in said.err.splitlines() if line.strip()]
    assert len(lines) == 1, said.err
    assert SENTENCE in lines[0]
    assert lines[0].endswith("try again with a network, or fetch its weights elsewhere and name the file.")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


class OfAClientError(Exception):
    """Of no kind that Python knows, as those of the hub's client."""


def _raise(error: Exception) -> Callable[..., str]:
    def download(*_: object, **__: object) -> str:
        raise error

    return download


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionResetError("gone. Then more."), "gone"),
        (OfAClientError("401 Client Error.\n\nRepository Not Found"), "401 Client Error"),
        (KeyError("etag"), "'etag'"),
        (EOFError(), "EOFError"),
    ],
)
def test_whatever_the_client_raises_is_one_sentence(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_hub, "hf_hub_download", _raise(error))
    with pytest.raises(ValueError, match="must be in the cache") as raised:
        open_weights(f"timm:{NAME}?pretrained")
    assert str(raised.value).startswith(f"{SENTENCE}{said}; try again")


def test_a_download_that_is_not_whole_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half.safetensors").write_bytes(b"\x00\x10\x00\x00\x00\x00\x00\x00{")
    monkeypatch.setattr(_hub, "hf_hub_download", lambda **_: str(tmp_path / "half.safetensors"))
    with pytest.raises(ValueError, match="must be in the cache") as raised:
        open_weights(f"timm:{NAME}?pretrained")
    assert str(raised.value).startswith(SENTENCE)


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(ValueError, match="got: No pretrained weights exist for vit_small_patch16_36x1_224; try again"):
        open_weights("timm:vit_small_patch16_36x1_224?pretrained")


def test_options_and_interruptions_pass_and_the_log_is_as_loud_as_before() -> None:
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    for error in (TypeError("no such option"), AssertionError("too small"), KeyboardInterrupt()):
        with pytest.raises(type(error)), fetching(NAME):
            raise error
        assert logger.level == level
