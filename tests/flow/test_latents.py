"""Packing and positions against BFL's."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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


@pytest.mark.parametrize("case", ["one", "two"])
def test_references_stand_where_bfl_puts_them(case):
    """One sample with the golden images, one with none and one with the first alone, padded."""
    sizes = GOLDEN[f"flux2.refs.{case}.image_sizes_wh"].tolist()
    images = [torch.randn(128, h // 16, w // 16) for w, h in sizes]
    got = FLUX2.references([images, [], images[:1]], torch.zeros(0))
    whole, first = GOLDEN[f"flux2.refs.{case}.ids"].float()[0], images[0].shape[1] * images[0].shape[2]
    assert got.counts == (len(whole), 0, first)
    assert torch.equal(got.ids[0], whole)
    assert torch.equal(got.tokens[0], torch.cat([x.flatten(1).T for x in images]))
    assert torch.equal(got.tokens[2, :first], got.tokens[0, :first])
    assert torch.equal(got.ids[2, :first], whole[:first])
    assert not got.tokens[1].any()
    assert not got.tokens[2, first:].any()


def test_kontexts_reference_has_bfls_positions():
    """Every 37th of them."""
    height, width = (n // 8 for n in GOLDEN["flux1.kontext.target_hw"].tolist())
    got = FLUX1.references([[torch.zeros(16, height, width)]], torch.zeros(0))
    assert got.counts == (GOLDEN["flux1.kontext.num_cond_tokens"].item(),)
    assert torch.equal(got.ids[:, ::37], GOLDEN["flux1.kontext.img_cond_seq_ids"])


def test_references_are_made_where_the_latents_are():
    """A copy from the host would make it wait for a GPU, once for each image."""
    devices = set()

    class Look(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            devices.update(x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor))
            return func(*args, **(kwargs or {}))

    image = torch.zeros(128, 2, 3, device="meta")
    with Look():
        FLUX2.references([[image, image], [image]], image)
    assert devices == {"meta"}


def test_references_can_be_padded_further_and_there_may_be_none():
    assert FLUX1.references([[], []], torch.zeros(0)) is None
    assert FLUX1.references([], torch.zeros(0)) is None
    like = torch.zeros(0, dtype=torch.float64)
    padded = FLUX1.references([[], []], like, 3)
    assert (padded.tokens.shape, padded.tokens.dtype, padded.counts) == ((2, 3, 64), like.dtype, (0, 0))
    assert FLUX1.references([[torch.zeros(16, 4, 4)]], like, 3).tokens.shape == (1, 4, 64)


def test_odd_latents_are_refused():
    for function in (lambda: FLUX1.pack(torch.zeros(1, 16, 3, 4)), lambda: FLUX1.image_ids(1, 4, 5)):
        with pytest.raises(ValueError, match="multiples of 16"):
            function()


def test_shapes_and_numbers_of_tokens():
    assert FLUX1.shape(64, 96) == (16, 8, 12)
    assert FLUX2.shape(64, 96) == (128, 4, 6)
    assert FLUX1.tokens(64, 96) == FLUX2.tokens(64, 96) == 24
