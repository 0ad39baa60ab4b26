"""Packing and positions against BFL's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_trainer.flow.latents import FLUX1, FLUX2, SPACES

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "ids_packing_math.safetensors")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN if key.endswith(".packed")})


def test_golden_file_has_cases():
    assert len(CASES) == 6


@pytest.mark.parametrize("case", CASES)
def test_golden_packing_and_ids(case):
    space = SPACES[case.partition(".")[0]]
    latents, packed = GOLDEN[f"{case}.latents"], GOLDEN[f"{case}.packed"]
    batch, _, height, width = latents.shape
    assert torch.equal(space.pack(latents), packed)
    assert torch.equal(space.unpack(packed, height, width), latents)
    assert torch.equal(space.image_ids(batch, height, width), GOLDEN[f"{case}.img_ids"].float())
    golden_text = GOLDEN[f"{case}.txt_ids"]
    assert torch.equal(space.text_ids(batch, golden_text.shape[1]), golden_text.float())
    assert space.image_ids(1, 2, 2).dtype == space.text_ids(1, 1).dtype == torch.float32


@pytest.mark.parametrize("case", ["one", "two"])
def test_golden_positions_of_reference_images(case):
    """Every 97th of them, the last one, and their number."""
    sizes = GOLDEN[f"flux2.refs.{case}.image_sizes_wh"].tolist()
    ids = torch.cat(
        [
            FLUX2.image_ids(1, h // 16, w // 16, time=FLUX2.reference_time * (i + 1))
            for i, (w, h) in enumerate(sizes)
        ],
        dim=1,
    )
    assert torch.equal(ids, GOLDEN[f"flux2.refs.{case}.ids"].float())


def test_odd_latents_are_refused():
    for function in (lambda: FLUX1.pack(torch.zeros(1, 16, 3, 4)), lambda: FLUX1.image_ids(1, 4, 5)):
        with pytest.raises(ValueError, match="multiples of 16"):
            function()


def test_shapes_and_numbers_of_tokens():
    assert FLUX1.shape(64, 96) == (16, 8, 12)
    assert FLUX2.shape(64, 96) == (128, 4, 6)
    assert FLUX1.tokens(64, 96) == FLUX2.tokens(64, 96) == 24
