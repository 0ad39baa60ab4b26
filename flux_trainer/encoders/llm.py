"""FLUX.2's text encoder, frozen: hidden states of a language model, side by side, are the tokens `txt`.

Mistral-Small-3.2 for dev, Qwen3-4B or 8B for klein; `chat.py` says what they read. Unlike FLUX.1's encoders
the language model does not see the padding; the transformer does. There is no pooled vector. Layers after
the last state that is read, the final norm, the output layer and a vision tower are never built or read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.chat import Chat, ChatTokenizer
from flux_trainer.encoders.text import Shard, TextFeatures, check_vocabulary, source
from flux_trainer.encoders.weights import build, fill, random_values


class LLMEncoder:
    """A language model with its tokenizer, and the features of the empty prompt.

    A sharded one communicates in every call: all ranks must make the same number of calls of `encode`.
    """

    def __init__(
        self,
        section: Encoder,
        chat: Chat,
        device: torch.device,
        seed: int,
        shard: Shard | None = None,
        context_in_dim: int | None = None,
    ) -> None:
        """Build, shard, fill; encode the empty prompt, once on every rank.

        Args:
            chat: what the language model reads, and which of its hidden states are the features.
            seed: determines the weights under `section.random_init`; unused otherwise.
            shard: applied while the model is on the meta device; None: it is whole on every rank.
            context_in_dim: features of a token that the transformer takes, to be checked before weights are
                read; None: not checked.

        Raises:
            FileNotFoundError: a file is missing; the message names it and the command that brings it.
            ValueError: it is another language model, or the weights do not fit config.json.
        """
        from transformers import AutoConfig, AutoModel

        self.device = device
        self.chat = chat
        folder, values = source("llm", section.llm_encoder, section.random_init)
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.txt_dim = _check(config, chat, section.llm_encoder, context_in_dim)
        self.vec_dim: int | None = None
        config = config.get_text_config()
        self.tokenizers = ChatTokenizer(section, chat)
        check_vocabulary("llm", self.tokenizers.llm, config.vocab_size)

        _shorten(config, chat.states[-1])
        self.model: Any = build(lambda: AutoModel.from_config(config), getattr(torch, section.dtype))
        self.model.norm = nn.Identity()  # it would come after the last state
        rotary = type(self.model.rotary_emb)(config=config)  # float32 frequencies, whatever the weights are
        del self.model.rotary_emb
        if shard is not None:
            # The token table is a block of its own: it is as large as a layer or two, and needed only once.
            shard(self.model, [self.model.embed_tokens, *self.model.layers])
        fill(self.model, values or random_values(seed, device), device)
        self.model.rotary_emb = rotary.to(device)

        self.empty = self.encode(self.tokenize([""]))

    def tokenize(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Of B captions `llm`, ids, and `llm_mask`: both [B, max_llm_encoding_len], on the CPU."""
        return self.tokenizers.tokenize(captions)

    @torch.no_grad()
    def encode(self, ids: Mapping[str, Tensor]) -> TextFeatures:
        """Features of tokenized captions (see `tokenize`), in the encoder's dtype, on its device."""
        states: list[Tensor] = []

        def keep(layer: nn.Module, inputs: Any, output: Any) -> None:
            states.append(output[0] if isinstance(output, tuple) else output)

        hooks = [self.model.layers[n - 1].register_forward_hook(keep) for n in self.chat.states]
        mask = ids["llm_mask"].to(self.device, non_blocking=True).bool()  # [B, L]
        past = torch.ones(mask.shape[1], mask.shape[1], dtype=torch.bool, device=self.device).tril()
        self.model(
            input_ids=ids["llm"].to(self.device, non_blocking=True),
            # [B, 1, L, L]. Made from [B, L] by transformers, it would cost two waits for the device.
            attention_mask=past & mask[:, None, None, :],
            use_cache=False,
        )
        for hook in hooks:
            hook.remove()
        if hasattr(self.model, "reshard"):  # FSDP's root waits for a backward that never comes
            self.model.reshard()
        return TextFeatures(torch.cat(states, dim=-1), None)  # 3 times [B, L, D] -> [B, L, 3D]

    def drop(self, features: TextFeatures, drop_txt: Tensor, drop_vec: Tensor) -> TextFeatures:
        """`features` with the rows flagged in `drop_txt` (bool [B]) as for the empty prompt.

        `drop_vec` is FLUX.1's second flag, for the vector that FLUX.2 does not have.
        """
        drop_txt = drop_txt.to(self.device, non_blocking=True)
        return TextFeatures(torch.where(drop_txt[:, None, None], self.empty.txt, features.txt), None)


def _check(config: Any, chat: Chat, spec: str, context_in_dim: int | None) -> int:
    """The number of features of a token; raises ValueError if FLUX.2 cannot read such a model."""
    encoder = f"encoder.llm_encoder = {spec!r}"
    if config.model_type != chat.model_type:
        raise ValueError(
            f"{encoder} is of type {config.model_type!r}, but this FLUX.2 reads {chat.language_model} "
            f"({chat.model_type!r}): choose the encoder that belongs to the flavor."
        )
    config = config.get_text_config()
    if config.num_hidden_layers < chat.states[-1]:
        raise ValueError(
            f"{encoder} has {config.num_hidden_layers} layers, but FLUX.2 reads the outputs of layers "
            f"{', '.join(map(str, chat.states))} of {chat.language_model}."
        )
    features = len(chat.states) * int(config.hidden_size)
    if context_in_dim not in (None, features):
        raise ValueError(
            f"{encoder} gives {len(chat.states)} x {config.hidden_size} = {features} features, but the "
            f"transformer takes {context_in_dim}: choose the encoder that belongs to the flavor."
        )
    return features


def _shorten(config: Any, layers: int) -> None:
    """Leave away the layers after the first `layers`."""
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[:layers]
