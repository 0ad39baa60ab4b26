"""Trains the small tokenizer of `assets/tokenizers/qwen3-tiny` on the captions of the embedded data set.

Byte pairs over all bytes, as in Qwen3, with those of Qwen3's special tokens that FLUX.2's chat uses: it lets
runs of FLUX.2 go through the whole text path with a random language model. The same file every time.

    python assets/build_tiny_tokenizer.py
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ASSETS = Path(__file__).parent
SIZE = 2048
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
THINKING = [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
CHAT = "user\nassistant\n\n\n"  # what else the chat consists of


def main() -> None:
    lines = (ASSETS / "emoji" / "train.jsonl").read_text(encoding="utf-8").splitlines()
    captions = [json.loads(line)["text"] for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(THINKING),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*captions, *[CHAT] * 200], trainer)
    tokenizer.add_tokens(THINKING)
    assert tokenizer.get_vocab_size() == SIZE
    out = ASSETS / "tokenizers" / "qwen3-tiny" / "tokenizer.json"
    out.parent.mkdir(exist_ok=True)
    tokenizer.save(str(out), pretty=False)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
