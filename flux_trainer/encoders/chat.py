"""Captions as FLUX.2's language models read them: inside a chat, then as ids with a mask.

FLUX.2 takes hidden states of a chat model that is about to answer. Its transformer was trained on exactly the
messages below (black-forest-labs/flux2, `text_encoder.py`, `system_messages.py`), so the words around the
caption, the side of the padding and the hidden states that are read belong to the model like its weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.tokenizers import tokenizer_folder

if TYPE_CHECKING:
    from torch import Tensor

FILES = (("tokenizer.json",),)


@dataclass(frozen=True)
class Chat:
    """How one kind of FLUX.2 talks to its language model."""

    language_model: str
    """For people."""
    model_type: str
    """In the language model's config.json."""
    states: tuple[int, ...]
    """The hidden states that FLUX.2 reads; number n is the output of the n-th layer."""
    before: str
    after: str
    """What stands around the caption; special tokens count as such."""
    special: tuple[str, ...]
    """Tokens that the tokenizer must have."""
    pad: str
    padding_side: Literal["left", "right"]
    removed: str = ""
    """Taken out of captions: the mark of a picture, which is never there."""


# The line break within the sentence is BFL's, and the model was trained with it.
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)

MISTRAL = Chat(
    language_model="Mistral-Small-3.2",
    model_type="mistral3",
    states=(10, 20, 30),
    before=f"<s>[SYSTEM_PROMPT]{SYSTEM_MESSAGE}[/SYSTEM_PROMPT][INST]",
    after="[/INST]",
    special=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"),
    pad="<pad>",
    padding_side="left",
    removed="[IMG]",
)
QWEN3 = Chat(
    language_model="Qwen3",
    model_type="qwen3",
    states=(9, 18, 27),
    before="<|im_start|>user\n",
    after="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",  # an answer without thinking
    special=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
    pad="<|endoftext|>",
    padding_side="right",
)
CHATS = {"flux2-dev": MISTRAL, "flux2-klein": QWEN3}
"""By the kind of FLUX.2."""


class ChatTokenizer:
    """The tokenizer of FLUX.2's language model. Holds no tensors and can be pickled, for data workers."""

    def __init__(self, section: Encoder, chat: Chat) -> None:
        """Raises FileNotFoundError where the tokenizer is missing, ValueError if it is another model's."""
        from transformers import PreTrainedTokenizerFast

        folder = tokenizer_folder(section.llm_tokenizer, section.llm_encoder, "llm", FILES)
        self.chat = chat
        self.length = section.max_llm_encoding_len
        self.llm: Any = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
        vocabulary = self.llm.get_vocab()
        if missing := [token for token in (*chat.special, chat.pad) if token not in vocabulary]:
            raise ValueError(
                f"The tokenizer in {folder.absolute()} is not {chat.language_model}'s: it has no token "
                f"{' '.join(missing)}. Set encoder.llm_tokenizer to the one that belongs to the encoder."
            )
        self.llm.pad_token = chat.pad
        self.llm.padding_side = chat.padding_side
        self.llm.truncation_side = "right"

    def text(self, caption: str) -> str:
        """What the language model reads of a caption."""
        caption = caption.replace(self.chat.removed, "") if self.chat.removed else caption
        return f"{self.chat.before}{caption}{self.chat.after}"

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """`llm`: ids [B, max_llm_encoding_len], int64, padded or cut at the end; `llm_mask`: bool, likewise,
        true for tokens that are no padding."""
        batch = self.llm(
            [self.text(caption) for caption in captions],
            add_special_tokens=False,  # they are in the text
            max_length=self.length,
            padding="max_length",
            truncation=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        return {"llm": batch["input_ids"], "llm_mask": batch["attention_mask"].bool()}
