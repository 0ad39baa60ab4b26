"""Reference images: their sizes, against BFL's and diffusers' numbers, and the samples that have them."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.referring import SIZES, picture, write_referring
from PIL import Image

from flux_trainer.config.schema import Data, Source
from flux_trainer.data.bad import BadSample, DataError
from flux_trainer.data.image import decode
from flux_trainer.data.loader import TrainLoader
from flux_trainer.data.reference import kontext, load_reference, published_side, shrunk
from flux_trainer.data.sampler import open_mixture
from flux_trainer.data.samples import Batch, TrainSamples, ValidationSamples, load
from flux_trainer.data.sources import FolderSource, JsonlSource
from flux_trainer.flow.rng import Purpose, uniform

COUNTS = (1, 0, 2, 3, 0, 1, 2)


@pytest.mark.parametrize(
    ("size", "side", "expected"),
    [  # as diffusers' Flux2Pipeline does it, whose limit is 1024
        ((64, 64), 1024, (64, 64)),
        ((100, 70), 1024, (96, 64)),
        ((1000, 1000), 1024, (992, 992)),
        ((1025, 1024), 1024, (1024, 1008)),
        ((1920, 1080), 1024, (1360, 768)),
        ((2048, 256), 1024, (2048, 256)),
        ((3001, 2001), 1024, (1248, 832)),
        ((3001, 2001), 2024, (2464, 1648)),
    ],
)
def test_sizes_of_flux2s_references(size, side, expected):
    assert tuple(shrunk(Image.new("RGB", size), side).shape) == (3, expected[1], expected[0])


def test_what_need_not_shrink_is_cut_at_the_centre():
    image = picture(0, (39, 21))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(shrunk(image, 64), pixels[:, 2:18, 3:35])


@pytest.mark.parametrize(
    ("size", "expected"),
    [  # as diffusers' FluxKontextPipeline does it, and BFL's prepare_kontext the last
        ((64, 64), (1024, 1024)),
        ((512, 384), (1184, 880)),
        ((1920, 1080), (1392, 752)),
        ((1080, 1920), (752, 1392)),
        ((2048, 256), (1568, 672)),
        ((320, 200), (1328, 800)),
    ],
)
def test_sizes_of_kontexts_references(size, expected):
    assert tuple(kontext(Image.new("RGB", size)).shape) == (3, expected[1], expected[0])


def test_a_reference_that_is_no_image_or_too_thin_is_named(tmp_path):
    for name, image in (("thin.png", picture(0, (100, 15))), ("large.png", picture(0, (200, 100)))):
        image.save(tmp_path / name)
    (tmp_path / "none.png").write_bytes(b"rubbish")
    for name, reason in (
        ("thin.png", "100 x 15 pixels is too thin"),
        ("large.png", "too large"),
        ("none.png", "no known image format"),
        ("missing.png", "No such file"),
    ):
        with pytest.raises(BadSample, match=rf"{name}.*{reason}"):
            load_reference(str(tmp_path / name), 64, 10_000)


def test_the_published_sizes():
    cases = [("flux2", 1), ("flux2", 2), ("flux1", 1)]
    assert [published_side(*case) for case in cases] == [2024, 1024, None]


def test_a_file_is_brought_to_either_size(tmp_path):
    picture(0, (210, 100)).save(tmp_path / "a.png")
    assert load_reference(str(tmp_path / "a.png"), 64, 10**8).shape == (3, 32, 80)
    assert load_reference(str(tmp_path / "a.png"), None, 10**8).shape == (3, 720, 1456)


def expected_of(folder: Path, sample: int) -> list[torch.Tensor]:
    numbers = [(sample + k) % len(SIZES) for k in range(COUNTS[sample])]
    images = [decode((folder / f"reference{n}.png").read_bytes(), 10**6) for n in numbers]
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


def same(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def samples(folder: Path, **data) -> TrainSamples:
    path = str(write_referring(folder, COUNTS))
    section = Data(
        sources=[Source(type="jsonl", path=path, reference_key="references")],
        **{"max_references": 3, "flip_prob": 0.5, **data},
    )
    mixture = open_mixture(section.sources, 0)
    return TrainSamples(section, mixture, image_size=32, seed=0, dropout_prob=0, joint_dropout=True)


def test_a_jsonl_files_samples_come_with_their_references_flipped_alike(tmp_path):
    loaded = samples(tmp_path)
    flips = uniform(0, Purpose.FLIP, torch.arange(30)) < 0.5
    for draw in range(30):
        got, number = loaded.get(draw), loaded.mixture.locate(draw)[1]
        want = [x.flip(2) if flips[draw] else x for x in expected_of(tmp_path, number)]
        assert same(got.references, want)


def test_too_many_references_make_a_sample_bad(tmp_path):
    loaded = samples(tmp_path, max_references=2)
    found = [loaded.get(draw) for draw in range(7)]  # one epoch
    bad = [record for sample in found for record in sample.bad if record.index == 3]
    assert "3.png: 3 reference images, data.max_references is 2" in bad[0].reason
    assert all(len(sample.references) <= 2 for sample in found)


def test_batches_keep_references_apart_through_processes(tmp_path):
    """In one tensor, for each would be a file of its own."""
    loaded = samples(tmp_path, flip_prob=0.0)
    want = [loaded.get(draw).references for draw in range(8)]
    batch = Batch.of([loaded.get(draw) for draw in range(8)])
    for each in (batch, pickle.loads(pickle.dumps(batch))):
        assert all(same(a, b) for a, b in zip(each.references(), want, strict=True))
    section = Data(num_workers=1)
    loader = TrainLoader(section, loaded, start_draw=0, global_batch_size=4, rank=0, world_size=1)
    for start in (0, 4):
        got = next(loader).references()
        assert all(same(a, b) for a, b in zip(got, want[start : start + 4], strict=True))
    loader.close()


def test_validation_samples_have_references_too(tmp_path):
    path = write_referring(tmp_path, COUNTS)
    sections = [Source(type="jsonl", path=str(path), reference_key="references")]
    fixed = ValidationSamples(sections, count=-1, image_size=32, data=Data(max_references=3))
    assert all(same(fixed.get(i).references, expected_of(tmp_path, i)) for i in range(len(COUNTS)))
    assert fixed.get(len(COUNTS)).references == []


def test_folders_of_the_same_names_are_references_in_order(tmp_path):
    for name, number in (
        ("a/x/1.png", 1),
        ("a/2.jpg", 2),
        ("b/x/1.webp", 3),
        ("c/x/1.png", 4),
        ("c/2.png", 5),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(tmp_path / name)
    for name in ("a/x/1.txt", "a/2.txt"):
        (tmp_path / name).write_text("a caption")
    source = FolderSource(str(tmp_path / "a"), [str(tmp_path / "b"), str(tmp_path / "c")])
    named = {
        source.files[i]: [Path(path).relative_to(tmp_path).as_posix() for path in source[i].references]
        for i in range(2)
    }
    assert named == {"x/1.png": ["b/x/1.webp", "c/x/1.png"], "2.jpg": ["c/2.png"]}
    other = FolderSource(str(tmp_path / "a"), [str(tmp_path / "c"), str(tmp_path / "b")])
    plain = FolderSource(str(tmp_path / "a"))
    assert len({source.fingerprint, other.fingerprint, plain.fingerprint}) == 3
    (tmp_path / "d").mkdir()
    with pytest.raises(DataError, match=r"No image in .*d has the name of one in .*a"):
        FolderSource(str(tmp_path / "a"), [str(tmp_path / "d")])
    picture(6).save(tmp_path / "c/2.webp")
    with pytest.raises(DataError, match=r"c has several images for one name, of which one is 2\.png"):
        FolderSource(str(tmp_path / "a"), [str(tmp_path / "c")])


def test_jsonl_says_what_is_no_reference(tmp_path):
    picture(0).save(tmp_path / "0.png")
    lines = {
        '{"file_name": "0.png", "text": "a", "refs": 7}': "neither a path nor a list",
        '{"file_name": "0.png", "text": "a", "refs": ["0.png", 7]}': "neither a path nor a list",
    }
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    source = JsonlSource(str(tmp_path / "list.jsonl"), "file_name", "text", "refs")
    for i, reason in enumerate(lines.values()):
        with pytest.raises(BadSample, match=reason):
            source[i]
    with pytest.raises(DataError, match=r'Not one line of .*list\.jsonl has the field "reference"'):
        JsonlSource(str(tmp_path / "list.jsonl"), "file_name", "text", "reference")


def test_a_bad_reference_is_named_and_too_many_are_not_read(tmp_path, monkeypatch):
    loaded = samples(tmp_path, max_references=2)
    (tmp_path / "reference1.png").write_bytes(b"rubbish")
    seen = [record for draw in range(7) for record in loaded.get(draw).bad]
    assert any("reference1.png: corrupt image" in record.reason for record in seen)
    monkeypatch.setattr("flux_trainer.data.reference.read", lambda path: pytest.fail(f"{path} was read"))
    with pytest.raises(BadSample, match="3 reference images"):
        load(loaded.mixture.sources[0], 3, loaded.limits)
