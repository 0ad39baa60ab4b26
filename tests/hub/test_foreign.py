"""Files that hold no weights, by their first bytes: each is called what it is, whatever its name."""

import io
import pickle
import zipfile

import pytest
import torch
from helpers import weights_files

from flux_trainer.hub.contents import read_contents, read_header
from flux_trainer.hub.detect import locate, read_json
from flux_trainer.hub.errors import WeightsError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


def torch_file(**options) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(2)}, file, **options)
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "weights")
    return file.getvalue()


FILES = {
    "pointer": (POINTER, r"is a git-lfs pointer, not the file itself: run `git lfs pull` in /"),
    "gguf": (b"GGUF" + bytes(64), "is a GGUF file of quantised weights"),
    "zip of torch": (torch_file(), "is a pickle, which can run any code"),
    "older torch": (torch_file(_use_new_zipfile_serialization=False), "is a pickle, which can run any code"),
    "pickle": (pickle.dumps({}), "is a pickle, which can run any code"),
    "page": (b"\n<!DOCTYPE html><title>Log in</title>", "is a web page, not weights"),
    "denied": (b"<?xml version='1.0'?><Error>AccessDenied</Error>", "is a web page, not weights"),
    "sentence": (b"Access to model is restricted.", "it is text that begins with 'Access to model"),
    "empty": (b"", "it is empty"),
    "zeros": (bytes(4096), "it begins with zeros"),
    "zip": (zipped(), "it is a zip archive"),
    "noise": (bytes(range(128, 256)), "its header is damaged"),
}


@pytest.mark.parametrize("name", ["x.safetensors", "x.sft", "blob"])
@pytest.mark.parametrize("kind", FILES)
def test_it_is_called_what_it_is(kind, name, tmp_path):
    content, told = FILES[kind]
    (tmp_path / name).write_bytes(content)
    for read in (read_header, locate):
        with pytest.raises(WeightsError, match=told) as error:
            read(tmp_path / name)
        assert str(error.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize("kind", ["pointer", "page", "empty"])
def test_a_name_makes_no_pickle(kind, tmp_path):
    content, told = FILES[kind]
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(WeightsError, match=told):
        locate(tmp_path / "model.bin")


def test_a_pointer_in_place_of_an_index(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_bytes(POINTER)
    with pytest.raises(WeightsError, match="is a git-lfs pointer"):
        read_contents(tmp_path / "model.safetensors.index.json")


def test_json_without_end_is_damage(tmp_path):
    deep = b'{"a":' + b"[" * 100_000
    (tmp_path / "x").write_bytes(len(deep).to_bytes(8, "little") + deep)
    (tmp_path / "config.json").write_bytes(deep)
    with pytest.raises(WeightsError, match="its header is damaged"):
        read_header(tmp_path / "x")
    with pytest.raises(WeightsError, match="is not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("keep", [7, 100, -1])
def test_a_file_that_is_cut_off(keep, tmp_path):
    path = weights_files.bfl(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match="cut off" if keep != 7 else "damaged"):
        read_header(path)


def test_a_header_as_long_as_a_pickles_first_bytes_is_none(tmp_path):
    """0x280 bytes: the file begins as a pickle of protocol 2 does."""
    header = b'{"a": {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}}'.ljust(0x280)
    (tmp_path / "x").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    assert list(read_header(tmp_path / "x").tensors) == ["a"]
