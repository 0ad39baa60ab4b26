"""The committed encoder configs: each is listed in the README beside them, with its size."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, CLIPTextModel, T5EncoderModel

ENCODERS = Path(__file__).parents[2] / "assets" / "encoders"


@pytest.mark.parametrize(
    "folder", sorted(path.parent for path in ENCODERS.glob("*/config.json")), ids=lambda path: path.name
)
def test_the_readme_lists_it_with_its_parameters(folder):
    classes = {"t5": T5EncoderModel, "clip": CLIPTextModel, "qwen3": AutoModel.from_config}
    with torch.device("meta"):
        model = classes[folder.name.partition("-")[0]](AutoConfig.from_pretrained(folder))
    size = sum(p.numel() for p in model.parameters())
    tokens = model.get_input_embeddings().weight.numel()
    rows = [line for line in (ENCODERS / "README.md").read_text().splitlines() if f"`{folder.name}`" in line]
    assert [row.split("|")[3].strip() for row in rows] == [
        f"{size / 1e6:.1f} M, of which {tokens / 1e6:.1f} M embed tokens"
    ]
