"""CIFAR-10 in its real format, a few images of it written by the test."""

import copyreg
import functools
import hashlib
import io
import pickle
import re
import shutil
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

from ssat_probe.data import cifar10
from ssat_probe.data.cifar10 import FACTS, Dataset
from ssat_probe.images import normalise

COUNTS = {
    "data_batch_1": 7,
    "data_batch_2": 5,
    "data_batch_3": 3,
    "data_batch_4": 2,
    "data_batch_5": 2,
    "test_batch": 11,
}


def as_in_2009(content: object) -> bytes:
    """A pickle as the original files are: protocol 2, and the dtype with integers where booleans are due today."""
    buffer = io.BytesIO()
    pickler = pickle.Pickler(buffer, protocol=2)
    state = (3, "|", None, None, None, -1, -1, 0)
    pickler.dispatch_table = copyreg.dispatch_table.copy()
    pickler.dispatch_table[type(np.dtype(np.uint8))] = lambda dtype: (np.dtype, ("u1", 0, 1), state)
    pickler.dump(content)
    return buffer.getvalue()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with cifar-10-batches-py, whose checksums the loader has been told."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, count in COUNTS.items():
        labels = generator.integers(0, 10, count).tolist()
        data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
        (folder / name).write_bytes(as_in_2009({"data": data, "labels": labels, "batch_label": name}))
    (folder / "batches.meta").write_bytes(as_in_2009({"label_names": list(FACTS.classes)}))
    checksums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(CIFAR10, "train_list", [[name, checksums[name]] for name in COUNTS if name != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", checksums["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": checksums["batches.meta"]})
    monkeypatch.setitem(cifar10.NUM_IMAGES, "train", 19)
    monkeypatch.setitem(cifar10.NUM_IMAGES, "test", 11)
    return tmp_path


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Address under which this machine serves the files of a folder."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_images_and_labels_are_those_on_disk(root: Path) -> None:
    data = Dataset(root)
    train, test = data.images("train"), data.images("test")
    assert (len(train), len(test)) == (19, 11)
    stored = pickle.loads((root / "cifar-10-batches-py" / "data_batch_2").read_bytes(), encoding="latin1")
    assert train.labels[7:12].tolist() == stored["labels"]
    assert torch.equal(train.read([8]), torch.from_numpy(stored["data"][1].reshape(1, 3, 32, 32)))


def test_facts_need_no_files() -> None:
    facts = Dataset().facts
    assert (facts.num_classes, facts.img_size, facts.channels, facts.flip) == (10, (32, 32), 3, True)
    assert facts.std == (0.2470, 0.2435, 0.2616)


def test_another_size_is_made_when_asked_for(root: Path) -> None:
    data = Dataset(root, img_size=(48, 48))
    assert data.facts.img_size == (48, 48)
    assert normalise(data.images("test").read([3, 5]), data.facts).shape == (2, 3, 48, 48)


def test_without_a_folder_the_sentence_says_how_to_name_one() -> None:
    with pytest.raises(
        FileNotFoundError, match="cifar10 must lie in a folder on disk, got none; name it with --data-dir"
    ):
        Dataset().images("train")


def test_missing_files_are_named_with_the_way_to_get_them(root: Path) -> None:
    (root / "cifar-10-batches-py" / "data_batch_4").unlink()
    sentence = f"{root / 'cifar-10-batches-py'} must hold data_batch_1, data_batch_2, "
    with pytest.raises(
        FileNotFoundError, match=re.escape(sentence) + ".*, got no data_batch_4; add --download, or unpack"
    ):
        Dataset(root).images("test")


def test_a_changed_file_is_refused_before_it_is_opened(root: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("code in a pickle was run",)

    path = root / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(pickle.dumps(Trap()))
    checksum = CIFAR10.test_list[0][1]
    with pytest.raises(
        ValueError, match=re.escape(f"{path} must have the md5 checksum {checksum}, got another; remove")
    ):
        Dataset(root).images("test")


def test_a_wrong_count_names_both_numbers(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar10.NUM_IMAGES, "train", 50_000)
    with pytest.raises(ValueError, match=re.escape(f"must have 50000 train images, got 19 in {root}; the files are")):
        Dataset(root).images("train")


def test_download_unpacks_the_archive_and_does_nothing_a_second_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "elsewhere" / CIFAR10.filename
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    shutil.rmtree(root / "cifar-10-batches-py")
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    fresh = tmp_path / "new" / "folder"
    with served(archive.parent) as address:
        monkeypatch.setattr(CIFAR10, "url", f"{address}/{archive.name}")
        assert len(Dataset(fresh, download=True).images("train")) == 19
    assert len(Dataset(fresh, download=True).images("test")) == 11  # nothing is fetched again


def test_a_download_that_fails_says_what_to_do_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = CIFAR10.url
    monkeypatch.setattr(CIFAR10, "url", (tmp_path / "gone.tar.gz").as_uri())
    with pytest.raises(ValueError, match=re.escape(f"{url} must be reachable and {tmp_path / 'here'} writable")):
        Dataset(tmp_path / "here", download=True).images("train")
