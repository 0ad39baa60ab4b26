"""Small language models of the two kinds that FLUX.2 reads, stored as diffusers' repositories hold them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from flux_trainer.encoders.chat import SYSTEM_MESSAGE

# What the published templates make of one message of a user, after a system message or none.
TEMPLATES = {
    "flux2-dev": (
        "{{- bos_token }}{{- '[SYSTEM_PROMPT]' + messages[0]['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
        "{{- '[INST]' + messages[1]['content'][0]['text'] + '[/INST]' }}"
    ),
    "flux2-klein": (
        "{{- '<|im_start|>user\\n' + messages[0].content + '<|im_end|>\\n' }}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
        "{%- if enable_thinking is defined and enable_thinking is false %}"
        "{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}{%- endif %}"
    ),
}
# Tokens by their ids from 0 on; both models have a few that FLUX.2 has no use for.
SPECIAL = {
    "flux2-dev": [
        "<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"
    ],
    "flux2-klein": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"],
}  # fmt: skip
LAYERS = {"flux2-dev": 31, "flux2-klein": 28}  # one more than are read


def store(folder: Path, kind: str) -> Path:
    """Write `text_encoder` and `tokenizer` with random weights below `folder`; returns the former."""
    tokens = store_tokenizer(folder / "tokenizer", kind)
    sizes = {
        "vocab_size": tokens + 3,  # real tables are padded, too
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS[kind],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
    torch.manual_seed(0)
    model = _mistral(sizes) if kind == "flux2-dev" else _qwen(sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "text_encoder", max_shard_size="50KB")
    return folder / "text_encoder"


def store_tokenizer(folder: Path, kind: str) -> int:
    """Write a byte-level tokenizer with few merges, the special tokens and the chat; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = SPECIAL[kind]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + 150, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([SYSTEM_MESSAGE], trainer)
    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>" if "<s>" in special else None,
        pad_token="<pad>" if "<pad>" in special else "<|endoftext|>",
        padding_side="left" if kind == "flux2-dev" else "right",
    )
    whole.chat_template = TEMPLATES[kind]
    whole.save_pretrained(folder)
    return len(whole)


def load(folder: Path, kind: str) -> Any:
    """The whole stored model, by transformers."""
    from transformers import Mistral3ForConditionalGeneration, Qwen3ForCausalLM

    model = Mistral3ForConditionalGeneration if kind == "flux2-dev" else Qwen3ForCausalLM
    return model.from_pretrained(folder).eval()


def _mistral(sizes: dict[str, Any]) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    vision = {"model_type": "pixtral", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "head_dim": 8}
    text = {"model_type": "mistral", "sliding_window": None, "rope_theta": 1e9, **sizes}
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision))


def _qwen(sizes: dict[str, Any]) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(rope_theta=1e6, tie_word_embeddings=True, **sizes))
