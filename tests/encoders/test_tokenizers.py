"""Padding, cutting and finding of the tokenizers."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.tokenizers import Tokenizers

ASSETS = Path(__file__).parents[2] / "assets"
T5, CLIP = ASSETS / "tokenizers" / "t5", ASSETS / "tokenizers" / "clip"
APPLE = "a photo of a red apple on a wooden table"
# The ids that sentencepiece and CLIP's original code give.
T5_APPLE = [3, 9, 1202, 13, 3, 9, 1131, 8947, 30, 3, 9, 5726, 953, 1]
CLIP_APPLE = [49406, 320, 1125, 539, 320, 736, 3055, 525, 320, 9057, 2175, 49407]


def section(**overrides) -> Encoder:
    return Encoder(**{"t5_tokenizer": str(T5), "clip_tokenizer": str(CLIP), **overrides})


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return Tokenizers(section(max_t5_encoding_len=20))


def test_short_captions_are_padded(tokenizers):
    ids = tokenizers.tokenize([APPLE, ""])
    assert ids["t5"].shape == (2, 20)
    assert ids["clip"].shape == (2, 77)
    assert ids["t5"].dtype == ids["clip"].dtype == torch.int64
    assert ids["t5"][0].tolist() == T5_APPLE + [0] * 6
    assert ids["t5"][1].tolist() == [1] + [0] * 19
    assert ids["clip"][0].tolist() == CLIP_APPLE + [49407] * (
        77 - len(CLIP_APPLE)
    )  # CLIP pads with its end token
    assert ids["clip"][1].tolist() == [49406] + [49407] * 76


def test_long_captions_are_cut_before_the_end_token(tokenizers):
    ids = tokenizers.tokenize([" ".join([APPLE] * 20)])
    assert ids["t5"].shape == (1, 20)
    assert ids["clip"].shape == (1, 77)
    assert ids["t5"][0, :13].tolist() == T5_APPLE[:13]
    assert ids["t5"][0, -1] == 1
    assert ids["clip"][0, :11].tolist() == CLIP_APPLE[:11]
    assert (ids["clip"][0, :-1] != 49407).all()
    assert ids["clip"][0, -1] == 49407


def test_pickled_tokenizers_do_the_same(tokenizers):
    copy = pickle.loads(pickle.dumps(tokenizers))
    first, second = tokenizers.tokenize([APPLE]), copy.tokenize([APPLE])
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tokenizers_beside_the_encoders_are_found(tmp_path):
    """In the encoder's own folder (CLIP here), or in the sibling folder of a diffusers repository (T5)."""
    shutil.copytree(CLIP, tmp_path / "clip")
    shutil.copytree(T5, tmp_path / "flux" / "tokenizer_2")
    (tmp_path / "flux" / "text_encoder_2").mkdir()
    tokenizers = Tokenizers(
        Encoder(
            t5_encoder=str(tmp_path / "flux" / "text_encoder_2"),
            clip_encoder=str(tmp_path / "clip"),
            max_t5_encoding_len=14,
        )
    )
    ids = tokenizers.tokenize([APPLE])
    assert ids["t5"][0].tolist() == T5_APPLE
    assert ids["clip"][0, : len(CLIP_APPLE)].tolist() == CLIP_APPLE


def test_a_pointer_is_named(tmp_path):
    folder = Path(shutil.copytree(T5, tmp_path / "t5"))
    (folder / "spiece.model").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"spiece\.model is a git-lfs pointer"):
        Tokenizers(section(t5_tokenizer=str(folder)))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        Tokenizers(section(t5_tokenizer="", t5_encoder=str(tmp_path)))
    message = str(error.value)
    assert "tokenizer.json or spiece.model" in message
    assert str(tmp_path) in message
    assert "hf download" in message
    (tmp_path / "vocab.json").write_text("{}")  # merges.txt is still missing
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json or vocab\.json \+ merges\.txt"):
        Tokenizers(section(clip_tokenizer=str(tmp_path)))
