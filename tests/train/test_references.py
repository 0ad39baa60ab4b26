"""What training and validation make of reference images, against a computation by hand, sample by sample."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.referring import SIZES, referring_flags, write_referring
from helpers.tiny_run import TinyTrainer, tiny_config
from PIL import Image
from torch import Tensor

from flux_trainer.flow import rng
from flux_trainer.flow.rng import Purpose, uniform
from flux_trainer.models.flops import train_flops_per_sample

COUNTS = (1, 0, 2, 3, 0, 1, 2)
TIME = {"flux1": 1, "flux2": 10}
PIXELS = 16  # of a token


@pytest.fixture(params=["flux-tiny", "flux2-tiny"])
def trainer(request, tmp_path) -> TinyTrainer:
    write_referring(tmp_path / "data", COUNTS)
    flags = [f"--model.flavor={request.param}", *referring_flags(tmp_path / "data")]
    flags += ["--training.img_size=32", "--training.local_batch_size=4", "--training.global_batch_size=8"]
    flags += ["--validation.enable", "--validation.timesteps=2", "--validation.local_batch_size=4"]
    return TinyTrainer(tiny_config(tmp_path, *flags))


def references_of(trainer: TinyTrainer, folder: Path, row: int, flip: bool) -> tuple[Tensor, Tensor]:
    """Tokens [1, R, C] and positions [1, R, axes] of the images that a row of the file refers to."""
    tokens, ids = (
        [torch.zeros(1, 0, trainer.model_config.in_channels)],
        [torch.zeros(1, 0, trainer.space.axes)],
    )
    for k in range(COUNTS[row]):
        image = np.array(Image.open(folder / f"reference{(row + k) % len(SIZES)}.png"))  # [H, W, 3]
        image = np.ascontiguousarray(image[:, ::-1] if flip else image)
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None].double() / 127.5 - 1
        with torch.no_grad():
            latents = trainer.encoders.autoencoder.encode(pixels, None)
        tokens.append(trainer.space.pack(latents))
        height, width = pixels.shape[2] // PIXELS, pixels.shape[3] // PIXELS
        place = torch.zeros(height, width, trainer.space.axes)
        place[..., 0] = TIME[trainer.model_config.family] * (k + 1)
        place[..., 1], place[..., 2] = torch.meshgrid(
            torch.arange(height), torch.arange(width), indexing="ij"
        )
        ids.append(place.view(1, height * width, -1))
    return torch.cat([x.double() for x in tokens], dim=1), torch.cat(ids, dim=1)


def velocity_alone(trainer, x_t, t, txt, vec, references) -> Tensor:
    """Tokens [1, L, C] of one sample's image: the plain model on its own tokens, none of which is padding."""
    (model,), space = trainer.parallel.parts, trainer.space
    image, (tokens, ids) = space.pack(x_t), references
    out = model(
        **model.arguments(
            image=torch.cat((image, tokens), dim=1),
            image_ids=torch.cat((space.image_ids(1, *x_t.shape[2:]), ids), dim=1),
            text=txt,
            text_ids=space.text_ids(1, txt.shape[1]),
            timesteps=t,
            pooled=vec,
            guidance=trainer.guidance(t) if trainer.model_config.guidance_embed else None,
        )
    )
    return out[:, : image.shape[1]]


def one(x: Tensor | None, i: int) -> Tensor | None:
    return None if x is None else x[i : i + 1]


def test_the_loss_is_that_of_each_sample_with_its_own_references(trainer, tmp_path):
    batch = next(trainer.build_loader(0))
    flips = uniform(0, Purpose.FLIP, batch.draws) < 0.5
    rows = [trainer.mixture.locate(int(draw))[1] for draw in batch.draws]
    assert {COUNTS[row] for row in rows} == {0, 1, 2, 3}
    got, want, number = 0.0, 0.0, 0
    (model,) = trainer.parallel.parts
    for b in trainer.micro_batches(batch):
        got += trainer.loss(model(**trainer.inputs(b)), b).item()
        counts = []
        for i in range(len(b.t)):
            references = references_of(trainer, tmp_path / "data", rows[number], bool(flips[number]))
            v = velocity_alone(
                trainer, b.x_t[i : i + 1], b.t[i : i + 1], one(b.txt, i), one(b.vec, i), references
            )
            want += (v - trainer.space.pack(b.target[i : i + 1])).square().mean().item() / 8
            counts.append(references[0].shape[1])
            number += 1
        image, text = trainer.tokens_per_sample()
        flops = sum(train_flops_per_sample(trainer.model_config, image + n, text) for n in counts)
        assert trainer.work(b) == (sum(counts) + 4 * (image + text), flops)
    assert number == 8
    assert got == pytest.approx(want, rel=1e-12)


def test_so_is_the_validation_loss(trainer, tmp_path):
    losses = trainer.losses(trainer.held_out)
    for k, t in enumerate((0.25, 0.75)):
        errors = []
        for row in range(len(COUNTS)):
            sample = trainer.held_out.samples.get(row)
            text = trainer.encoders.text.encode(trainer.encoders.text.tokenize([sample.caption]))
            x_0 = trainer.encoders.encode_images(sample.image[None])
            draws = torch.tensor([2 * row + k])
            noise = rng.normal(0, Purpose.VAL_NOISE, draws, trainer.latent_shape, torch.float64)
            references = references_of(trainer, tmp_path / "data", row, flip=False)
            time = torch.tensor([t], dtype=torch.float64)
            with torch.no_grad():
                v = velocity_alone(trainer, (1 - t) * x_0 + t * noise, time, text.txt, text.vec, references)
            errors.append((v - trainer.space.pack(noise - x_0)).square().mean().item())
        assert losses[k] == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_pictures_of_other_prompts_have_their_own_references(trainer):
    first, *others = trainer.prompts
    a, b = trainer.draw([first]), trainer.draw(others)
    assert a.shape[0] == 1
    assert b.shape[0] == len(others)
    assert torch.equal(trainer.draw([first]), a)
