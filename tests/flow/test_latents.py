"""Packing and positions against BFL's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_trainer.flow.latents import image_ids, pack, text_ids, unpack

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "ids_packing_math.safetensors")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("flux1.")})


def test_golden_file_has_cases():
    assert len(CASES) == 3


@pytest.mark.parametrize("case", CASES)
def test_golden_packing_and_ids(case):
    latents, packed = GOLDEN[f"{case}.latents"], GOLDEN[f"{case}.packed"]
    batch, _, height, width = latents.shape
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, height, width), latents)
    assert torch.equal(image_ids(batch, height, width), GOLDEN[f"{case}.img_ids"])
    golden_text = GOLDEN[f"{case}.txt_ids"]
    assert torch.equal(text_ids(batch, golden_text.shape[1]), golden_text)
    assert image_ids(1, 2, 2).dtype == text_ids(1, 1).dtype == torch.float32


def test_odd_latents_are_refused():
    for function in (lambda: pack(torch.zeros(1, 16, 3, 4)), lambda: image_ids(1, 4, 5)):
        with pytest.raises(ValueError, match="multiples of 16"):
            function()
