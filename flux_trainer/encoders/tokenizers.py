"""Captions to token ids: T5's sentencepiece and CLIP's byte-pair encoding, through transformers.

FLUX.1 sees the padding: both encoders run without an attention mask, so the lengths are part of the model.
T5 is padded or cut to `max_t5_encoding_len`, CLIP to 77.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.locate import HINTS, locate
from flux_trainer.hub.foreign import check_no_pointer

if TYPE_CHECKING:
    from torch import Tensor

CLIP_LENGTH = 77

# A diffusers repository keeps the tokenizers beside the encoders, under these names.
SIBLINGS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}

# What a tokenizer can be read from: one of these sets of files.
T5_FILES = (("tokenizer.json",), ("spiece.model",))
CLIP_FILES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
SETTINGS_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


class Tokenizers:
    """The tokenizers of T5 and CLIP. Holds no tensors and can be pickled, for data workers."""

    def __init__(self, section: Encoder) -> None:
        """Raises FileNotFoundError or WeightsError, naming the files, where a tokenizer is missing."""
        from transformers import CLIPTokenizerFast, T5TokenizerFast

        t5 = tokenizer_folder(section.t5_tokenizer, section.t5_encoder, "t5", T5_FILES)
        clip = tokenizer_folder(section.clip_tokenizer, section.clip_encoder, "clip", CLIP_FILES)
        self.t5: Any = T5TokenizerFast.from_pretrained(t5, local_files_only=True)
        self.clip: Any = CLIPTokenizerFast.from_pretrained(clip, local_files_only=True)
        self.t5_length = section.max_t5_encoding_len

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Token ids of B captions: `t5` [B, max_t5_encoding_len] and `clip` [B, 77], both int64."""
        return {
            "t5": _pad(self.t5, captions, self.t5_length),
            "clip": _pad(self.clip, captions, CLIP_LENGTH),
        }


def _pad(tokenizer: Any, captions: Sequence[str], length: int) -> Tensor:
    """Ids [B, length]: longer captions are cut (the end token stays), shorter ones padded."""
    batch = tokenizer(
        list(captions),
        max_length=length,
        padding="max_length",
        truncation=True,
        return_attention_mask=False,
        return_tensors="pt",
    )
    ids: Tensor = batch["input_ids"]
    return ids


def tokenizer_folder(tokenizer: str, encoder: str, name: str, choices: Sequence[Sequence[str]]) -> Path:
    """The folder with the tokenizer's files: the given one, or else the encoder's own or its sibling."""
    key, spec = (
        (f"encoder.{name}_tokenizer", tokenizer) if tokenizer else (f"encoder.{name}_encoder", encoder)
    )
    wanted = [*SETTINGS_FILES, *(file for files in choices for file in files)]
    folder = locate(spec, key, wanted, HINTS[name])
    candidates = [folder]
    if not tokenizer and folder.name in SIBLINGS:
        candidates.append(folder.parent / SIBLINGS[folder.name])
    for candidate in candidates:
        if any(all((candidate / file).is_file() for file in files) for files in choices):
            for file in wanted:
                if (candidate / file).is_file():
                    check_no_pointer(candidate / file)
            return candidate
    needed = " or ".join(" + ".join(files) for files in choices)
    looked = " and ".join(str(candidate.absolute()) for candidate in candidates)
    ours = f", such as assets/tokenizers/{name}" if name in ("t5", "clip") else ""
    raise FileNotFoundError(
        f"No {needed} of the {name.upper()} tokenizer in {looked} ({key} = {spec!r}). "
        f"Set encoder.{name}_tokenizer to a folder that has it{ours}. {HINTS[name]}"
    )
