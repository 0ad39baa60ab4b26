"""The committed tokenizer files give FLUX.1's token ids, and the small encoder configs fit them."""

from pathlib import Path

import pytest

ASSETS = Path(__file__).parents[2] / "assets"
PROMPT = "a photo of a red apple on a wooden table"
# Ids on which sentencepiece itself, tokenizers and transformers agree.
CLIP_IDS = [49406, 320, 1125, 539, 320, 736, 3055, 525, 320, 9057, 2175, 49407]
T5_IDS = [3, 9, 1202, 13, 3, 9, 1131, 8947, 30, 3, 9, 5726, 953, 1]


@pytest.fixture(scope="module")
def clip():
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(ASSETS / "tokenizers" / "clip")


@pytest.fixture(scope="module")
def t5():
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(ASSETS / "tokenizers" / "t5")


def test_clip_ids(clip):
    assert len(clip) == 49408
    assert clip(PROMPT).input_ids == CLIP_IDS
    assert clip(PROMPT.upper()).input_ids == CLIP_IDS  # CLIP knows lower case only
    padded = clip(PROMPT, padding="max_length", max_length=77, truncation=True).input_ids
    assert padded == CLIP_IDS + [49407] * (77 - len(CLIP_IDS))
    long = clip("apple " * 100, padding="max_length", max_length=77, truncation=True).input_ids
    assert (len(long), long[0], long[-1]) == (77, 49406, 49407)


def test_t5_ids(t5):
    assert len(t5) == 32100  # 32000 pieces and 100 sentinels; the model's table is padded to 32128
    assert t5(PROMPT).input_ids == T5_IDS
    assert t5("").input_ids == [1]
    padded = t5(PROMPT, padding="max_length", max_length=20, truncation=True).input_ids
    assert padded == T5_IDS + [0] * (20 - len(T5_IDS))
    assert t5("<extra_id_0>").input_ids == [32099, 1]


def test_t5_agrees_with_sentencepiece(t5):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(str(ASSETS / "tokenizers" / "t5" / "spiece.model"))
    for text in (PROMPT, "Two Cats,  three dogs!", "café piñata", "12:45 o'clock", "flag: côte d’ivoire"):
        assert t5(text).input_ids == [*pieces.encode(text), 1]


def test_small_encoder_configs_fit_the_tokenizers(clip, t5):
    from transformers import AutoConfig

    small_clip = AutoConfig.from_pretrained(ASSETS / "encoders" / "clip-tiny")
    small_t5 = AutoConfig.from_pretrained(ASSETS / "encoders" / "t5-tiny")
    assert (small_clip.vocab_size, small_clip.eos_token_id) == (len(clip), clip.eos_token_id)
    assert small_clip.max_position_embeddings == 77
    assert small_t5.vocab_size >= len(t5)
