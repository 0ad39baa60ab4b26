"""Where weights are written: what is never replaced, what is refused before work, and what a stop leaves."""

import logging
import os
from pathlib import Path

import pytest
import torch
from helpers import weights_files
from safetensors.torch import save_file

from flux_trainer.hub.convert import convert
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.target import replacing
from flux_trainer.hub.weights import open_weights


def go(folder, target, to, **options):
    source = folder / "bfl.safetensors"
    source = source if source.exists() else weights_files.bfl(folder)
    convert(open_weights(source, config=weights_files.CONFIG, ahead=True), target, to, **options)


def write_new(target):
    with replacing(target) as path:
        path.mkdir()
        (path / "new").touch()


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["flux1-dev.safetensors", "__1_0.distcp", "a.index.json"])
def test_a_folder_of_others_files_is_not_replaced(name, tmp_path):
    models = tmp_path / "models"
    models.mkdir()
    save_file({"x": torch.zeros(3)}, models / name)
    with pytest.raises(WeightsError, match="holds more than weights that this trainer wrote"):
        go(tmp_path, models, "diffusers", overwrite=True)
    assert names(models) == [name]


@pytest.mark.parametrize("to", ["diffusers", "dcp", "torchtitan"])
def test_what_convert_wrote_is_replaced(to, tmp_path):
    target = tmp_path / "out"
    save_file(
        {n: x for n, x in weights_files.native().items() if "guidance" not in n}, tmp_path / "a.safetensors"
    )
    config = type(weights_files.CONFIG)(**{**vars(weights_files.CONFIG), "guidance_embed": False})
    for _ in range(2):
        weights = open_weights(tmp_path / "a.safetensors", config=config, ahead=True)
        convert(weights, target, to, overwrite=True, shard=200_000)
    assert names(tmp_path) == ["a.safetensors", "out"]


@pytest.mark.parametrize(
    ("to", "name", "told"),
    [
        ("diffusers", "thesis", "is a file, and diffusers is a folder"),
        ("dcp", "thesis", "is a file, and dcp is a folder"),
        ("bfl", "folder.safetensors", "is a folder, and bfl is a file"),
        ("diffusers", "x.pt", r"its name cannot end in \.pt"),
        ("dcp", "x.GGUF", r"its name cannot end in \.GGUF"),
        ("bfl", "thesis/x.safetensors", "thesis is a file; name a folder"),
        ("diffusers", "thesis/deep/x", "thesis is a file; name a folder"),
        ("diffusers", "unmounted", "unmounted is a link to .*whose folder is not there"),
        ("bfl", "unmounted/x.safetensors", "unmounted is a link to .*which is not there; mount its disk"),
    ],
)
def test_an_unfit_place_is_refused_before_any_work(to, name, told, tmp_path):
    (tmp_path / "thesis").write_text("years of work")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "unmounted").symlink_to(tmp_path / "disk" / "models")
    weights_files.bfl(tmp_path)
    before = names(tmp_path)
    with pytest.raises(WeightsError, match=told):
        go(tmp_path, tmp_path / name, to, overwrite=True, before=lambda: pytest.fail("too late"))
    assert names(tmp_path) == before
    assert (tmp_path / "thesis").read_text() == "years of work"


@pytest.mark.parametrize("to", ["bfl", "diffusers"])
def test_a_link_is_followed(to, tmp_path):
    suffix = ".safetensors" if to == "bfl" else ""
    disk, here = tmp_path / "disk", tmp_path / "here"
    disk.mkdir()
    here.mkdir()
    real, link = disk / f"real{suffix}", here / f"link{suffix}"
    link.symlink_to(real)
    for overwrite in (False, True):
        go(tmp_path, link, to, overwrite=overwrite)
        assert link.is_symlink()
        assert names(disk) == [real.name]
        assert names(here) == [link.name]
    assert open_weights(link).config == weights_files.CONFIG


@pytest.mark.parametrize("after", [1, 2])
def test_a_stop_at_the_renames_loses_nothing(after, tmp_path, monkeypatch):
    """A signal comes when the old folder has its passing name, or when the new one is there."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").touch()
    count = 0

    def stopping(original):
        def rename(self, to):
            nonlocal count
            result = original(self, to)
            count += 1
            if count == after:
                raise KeyboardInterrupt
            return result

        return rename

    for method in ("rename", "replace"):
        monkeypatch.setattr(Path, method, stopping(getattr(Path, method)))
    with pytest.raises(KeyboardInterrupt):
        write_new(target)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["old" if after == 1 else "new"]


def test_what_a_killed_conversion_left_is_named(tmp_path, caplog):
    left = tmp_path / ".x.tmp-0123abcd"
    left.mkdir()
    (tmp_path / ".xy.tmp-0123abcd").mkdir()
    with caplog.at_level(logging.WARNING), replacing(tmp_path / "x") as path:
        path.mkdir()
    assert [record.getMessage() for record in caplog.records if str(left) in record.getMessage()]
    assert ".xy." not in caplog.text
    assert left.is_dir()
    assert os.access(tmp_path / "x", os.R_OK)
