"""Which file of a folder is meant: variants, shards, suffixes, and what lies next to them."""

import json
import shutil

import pytest
from helpers import weights_files

from flux_trainer.hub.detect import ENCODER_STEM, STEM, locate, weights_in
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.verify import verify

FP16_SHARD = f"{STEM}.fp16-00001-of-00002.safetensors"


def found(folder, *names) -> str:
    """The file that is meant among `names`, all of which are good weights or indexes."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in names:
        shutil.copy(weights_files.EPS / "weights_bfl.safetensors", folder / name)
    stem = ENCODER_STEM if any(name.startswith("model.") for name in names) else STEM
    return weights_in(folder, stem).name


@pytest.mark.parametrize(
    "names",  # the one that is meant comes first
    [
        ["a.sft"],
        ["A.SAFETENSORS"],
        [f"{STEM}.fp16.safetensors"],
        [f"{STEM}.safetensors", f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors"],
        [f"{STEM}.safetensors.index.json", f"{STEM}-00001-of-00002.safetensors", f"{STEM}.safetensors"],
        [f"{STEM}.safetensors", f"{STEM}.safetensors.index.fp16.json", FP16_SHARD],
        [f"{STEM}.safetensors.index.fp16.json", FP16_SHARD, "other.safetensors"],
        [f"{STEM}.fp16.safetensors.index.json", FP16_SHARD],
        ["model.safetensors.index.json", "model-00001-of-00002.safetensors", "consolidated.safetensors"],
        ["model.safetensors", "pytorch_model.bin"],
        ["a.safetensors", "a.fp16.safetensors"],
    ],
)  # fmt: skip
def test_the_file_that_is_meant(names, tmp_path):
    assert found(tmp_path / "x", *names) == names[0]
    assert found(tmp_path / "x", *names[::-1]) == names[0]


def test_what_is_not_clear_or_not_there(tmp_path):
    folder = tmp_path / "x"
    with pytest.raises(
        WeightsError, match=r"has a\.safetensors, b\.sft: name one of them, or leave only one"
    ):
        found(folder, "a.safetensors", "b.sft")
    with pytest.raises(WeightsError, match=r"a-00001-of-00002\.safetensors, but not the index"):
        found(folder, "a-00001-of-00002.safetensors", "a-00002-of-00002.safetensors", "ema.safetensors")
    with pytest.raises(WeightsError, match=r"has .*bf16\.safetensors, .*fp16\.safetensors: name one"):
        found(folder, f"{STEM}.fp16.safetensors", f"{STEM}.bf16.safetensors")
    with pytest.raises(WeightsError, match=r"00001-of-00002\.safetensors, but not the index of these files"):
        found(folder, f"{STEM}-00001-of-00002.safetensors", f"{STEM}-00002-of-00002.safetensors")
    with pytest.raises(WeightsError, match="is one of several files of a model: name their folder or index"):
        locate(folder / f"{STEM}-00001-of-00002.safetensors")
    shutil.rmtree(folder)
    folder.mkdir()
    assert weights_in(folder) is None
    (folder / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises((WeightsError, FileNotFoundError), match=r"is a link to .*gone, which"):
            locate(path)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("flux1-dev-Q4_0.gguf", b"GGUF", "is a GGUF file"),
        ("pytorch_model.bin", b"\x80\x02", "is a pickle"),
        ("pytorch_model.bin.index.json", b"{}", "is an index of pickles"),
    ],
)
def test_a_folder_with_nothing_that_is_read(name, content, told, tmp_path):
    (tmp_path / name).write_bytes(content)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(WeightsError, match=told):
            locate(path)


def test_a_sharded_variant_is_read(tmp_path):
    folder = weights_files.sharded(tmp_path)
    index = folder / f"{STEM}.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    renamed = {file: file.replace(STEM, f"{STEM}.fp16") for file in weight_map.values()}
    for file, name in renamed.items():
        (folder / file).rename(folder / name)
    variant = index.rename(folder / f"{STEM}.safetensors.index.fp16.json")
    variant.write_text(json.dumps({"weight_map": {name: renamed[file] for name, file in weight_map.items()}}))
    for path in (folder, variant):
        [report] = verify(path)
        assert not report.problems
        assert report.facts["files"] == "2, as the index says"
