"""A draw's crop, flip, dropout and substitute; and the fixed samples of validation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flux_trainer.config.schema import Data, Source
from flux_trainer.data.bad import DataError
from flux_trainer.data.image import decode, square
from flux_trainer.data.sampler import open_mixture
from flux_trainer.data.samples import Batch, Sample, TrainSamples, ValidationSamples
from flux_trainer.flow.rng import Purpose, uniform

Jsonl = Callable[..., Source]
SIZE = 16


def train_samples(
    source: Source, seed: int = 0, dropout: float = 0.0, joint: bool = True, **data: Any
) -> TrainSamples:
    section = Data(sources=[source], **data)
    mixture = open_mixture(section.sources, seed)
    return TrainSamples(
        section, mixture, image_size=SIZE, seed=seed, dropout_prob=dropout, joint_dropout=joint
    )


def same(a: Sample, b: Sample) -> bool:
    return torch.equal(a.image, b.image) and (a.draw, a.caption, a.drop_t5, a.drop_clip) == (
        b.draw,
        b.caption,
        b.drop_t5,
        b.drop_clip,
    )


def test_crop_flip_and_dropout_follow_their_keyed_numbers(jsonl: Jsonl) -> None:
    options = {"dropout": 0.3, "joint": False, "crop": "random", "flip_prob": 0.4}
    samples = train_samples(jsonl(5), seed=3, **options)
    draws = torch.arange(200)
    crop = uniform(3, Purpose.CROP, draws)
    flip = uniform(3, Purpose.FLIP, draws) < 0.4
    drop = uniform(3, Purpose.DROPOUT, draws, (2,)) < 0.3
    for draw in range(200):
        sample = samples.get(draw)
        source, index = samples.mixture.locate(draw)
        raw = samples.mixture.sources[source][index]
        expected = square(decode(raw.image, 10**6), SIZE, crop[draw].item(), bool(flip[draw]))
        assert torch.equal(sample.image, expected)
        assert sample.caption == raw.caption
        assert [sample.drop_t5, sample.drop_clip] == drop[draw].tolist()
    assert 40 < flip.sum() < 120
    assert 30 < (drop[:, 0] != drop[:, 1]).sum() < 130


def test_defaults_neither_flip_nor_move_nor_drop(jsonl: Jsonl) -> None:
    samples = train_samples(jsonl(5))
    for draw in range(50):
        sample = samples.get(draw)
        raw = samples.mixture.sources[0][samples.mixture.locate(draw)[1]]
        assert torch.equal(sample.image, square(decode(raw.image, 10**6), SIZE))
        assert not sample.drop_t5
        assert not sample.drop_clip


def test_joint_dropout_drops_for_both(jsonl: Jsonl) -> None:
    samples = train_samples(jsonl(2), dropout=0.5)
    flags = [(sample.drop_t5, sample.drop_clip) for sample in map(samples.get, range(100))]
    assert set(flags) == {(True, True), (False, False)}
    always = train_samples(samples_source(samples), dropout=1.0, joint=False)
    assert all(always.get(i).drop_t5 and always.get(i).drop_clip for i in range(20))


def samples_source(samples: TrainSamples) -> Source:
    return Source(type="jsonl", path=samples.mixture.sources[0].path)


def test_a_substitute_disturbs_no_other_draw_and_keeps_the_draws_own_numbers(jsonl: Jsonl) -> None:
    options = {"crop": "random", "flip_prob": 0.5, "dropout": 0.5}
    whole = train_samples(jsonl(20, "whole"), **options)
    broken = train_samples(jsonl(20, "broken", broken=(4, 11)), **options)
    replaced = 0
    for draw in range(60):
        expected, sample = whole.get(draw), broken.get(draw)
        index = broken.mixture.locate(draw)[1]
        assert bool(sample.bad) == (index in (4, 11))
        if not sample.bad:
            assert torch.equal(sample.image, expected.image)
            assert sample.caption == expected.caption.replace("whole", "broken")
        else:
            replaced += 1
            assert sample.bad[0].index == index
            assert "png: corrupt image: no known image format" in sample.bad[0].reason
            substitute = broken.mixture.substitute(draw, len(sample.bad))[1]
            assert sample.caption == f"broken {substitute}"
        assert (sample.draw, sample.drop_t5) == (draw, expected.drop_t5)
        assert same(sample, broken.get(draw))
    assert replaced == 6


def test_an_image_over_max_pixels_is_bad(jsonl: Jsonl) -> None:
    with pytest.raises(DataError, match="24 x 16 pixels"):
        train_samples(jsonl(2), max_pixels=24 * 16 - 1).get(0)


def test_a_set_without_a_single_good_sample_says_why(jsonl: Jsonl) -> None:
    samples = train_samples(jsonl(2, broken=(0, 1)))
    with pytest.raises(DataError) as caught:
        samples.get(0)
    message = str(caught.value)
    assert "Draw 0 and 15 substitutes were all bad" in message
    assert message.count("corrupt image") == 2  # each sample is named once
    assert "1.png" in message


def test_validation_samples_are_fixed_and_in_order(jsonl: Jsonl) -> None:
    sections = [jsonl(3, "a"), jsonl(4, "b", broken=(1,))]
    samples = ValidationSamples(sections, count=-1, image_size=SIZE, data=Data(max_pixels=1000))
    assert samples.count == 7
    got = [samples.get(i) for i in range(9)]
    assert [s.draw for s in got] == list(range(9))
    assert [s.caption for s in got] == ["a 0", "a 1", "a 2", "b 0", "", "b 2", "b 3", "", ""]
    assert [s.valid for s in got] == [True] * 4 + [False] + [True] * 2 + [False] * 2
    assert [(r.source, r.index) for s in got for r in s.bad] == [(f"jsonl {sections[1].path}", 1)]
    raw = samples.sources[1][2]
    assert torch.equal(got[5].image, square(decode(raw.image, 1000), SIZE))
    few = ValidationSamples(sections, count=3, image_size=SIZE, data=Data(max_pixels=1000))
    assert [few.get(i).caption for i in range(3)] == ["a 0", "a 2", ""]  # items 0, 2 and 4 of 7
    assert ValidationSamples(sections, count=100, image_size=SIZE, data=Data(max_pixels=1000)).count == 7


def test_validation_refuses_weights_and_nothing(jsonl: Jsonl) -> None:
    section = jsonl(1)
    for sections, words in (
        ([], r"\[\[validation.sources\]\]"),
        ([section.model_copy(update={"weight": 1.0})], "remove weight"),
        ([section.model_copy(update={"repeats": 2})], "remove weight"),
    ):
        with pytest.raises(DataError, match=words):
            ValidationSamples(sections, count=-1, image_size=SIZE, data=Data(max_pixels=1000))


def test_a_batch_counts_bad_draws_and_records(jsonl: Jsonl) -> None:
    samples = train_samples(jsonl(8, broken=(0, 1, 2, 3)))
    batch = Batch.of([samples.get(draw) for draw in range(8)])
    assert batch.images.shape == (8, 3, SIZE, SIZE)
    assert batch.images.dtype == torch.uint8
    assert batch.draws.tolist() == list(range(8))
    assert batch.bad_draws == 4  # in one epoch of eight
    assert len(batch.bad) >= 4
    assert batch.valid.all()
