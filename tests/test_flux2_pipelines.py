"""Prompts to pictures as diffusers' two FLUX.2 pipelines: its own language model, chat, times and decoder.

Everything that a pipeline does takes part: random weights in every parameter of a small language model and
of a small transformer, the autoencoder of the assets. Only the noise is ours.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.referring import picture
from helpers.small_llm import load, store
from helpers.small_model import small2
from helpers.weights_files import go
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from flux_trainer.config.pictures import Request
from flux_trainer.config.schema import Encoder
from flux_trainer.data.reference import published_side
from flux_trainer.encoders.bundle import Encoders
from flux_trainer.encoders.choose import kind_of
from flux_trainer.flow import rng
from flux_trainer.flow.latents import FLUX2
from flux_trainer.flow.timesteps import MU
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.mesh import DataGroup
from flux_trainer.runtime.dist import World
from flux_trainer.sample import draw, encode_prompts, encode_references, reference_encoder, share_out
from flux_trainer.velocity import Velocity

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("float32_frequencies")]

CPU = torch.device("cpu")
AUTOENCODER = Path(__file__).parents[1] / "assets/autoencoder/flux2_ae.safetensors"
LENGTH = 160  # tokens, by a tokenizer of little more than bytes
WIDTH, HEIGHT, STEPS = 96, 64, 6


@pytest.fixture(scope="module")
def both(request, tmp_path_factory) -> SimpleNamespace:
    """Our parts and diffusers' pipeline, of one kind of FLUX.2, with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    from transformers import PreTrainedTokenizerFast

    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    config = small2(in_channels=128, context_in_dim=48, use_guidance_embed=kind == "flux2-dev")
    assert kind_of(config) == kind
    model = model_class(config)(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # [out, in]
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        else:
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
    save_file(dict(model.state_dict()), folder / "flux2.safetensors")
    velocity = Velocity(Parallel([model], {}, None, None), config, CPU)
    llm = store(folder, kind)
    section = Encoder(
        llm_encoder=str(llm),
        max_llm_encoding_len=LENGTH,
        dtype="float32",
        autoencoder_path=str(AUTOENCODER),
        autoencoder_dtype="float32",
    )
    encoders = Encoders(section, CPU, seed=0, kind=kind, context_in_dim=48)

    parts = {}
    for name, reader, source, shape in (
        ("transformer", diffusers.Flux2Transformer2DModel, folder / "flux2.safetensors", config),
        ("vae", diffusers.AutoencoderKLFlux2, AUTOENCODER, None),
    ):
        target = go(source, folder / name, "diffusers", config=shape)
        parts[name], info = reader.from_pretrained(target, output_loading_info=True)
        assert not any(info.values()), info
    pipeline = diffusers.Flux2Pipeline if kind == "flux2-dev" else diffusers.Flux2KleinPipeline
    pipe = pipeline(
        **parts,
        text_encoder=load(llm, kind),
        tokenizer=PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer"),
        # As it is published with FLUX.2; the pipeline itself computes the shift.
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )
    pipe.set_progress_bar_config(disable=True)
    return SimpleNamespace(velocity=velocity, encoders=encoders, pipe=pipe)


def ours(both: SimpleNamespace, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """Final latents [B, C, h, w] and pictures uint8 [B, 3, H, W], by the functions that `generate` calls."""
    alone = DataGroup(0, 1, True, World(0, 0, 1, CPU, None, None))
    rounds = share_out(requests, groups=1, batch_size=4)
    features = encode_prompts(requests, rounds, both.encoders.text, alone)
    side_of = partial(published_side, "flux2")
    encode = reference_encoder(both.encoders.encode_images, side_of, max_pixels=10**8)
    shown = encode_references(requests, rounds, encode, alone)
    latents: list[Tensor] = []

    def decode(x: Tensor) -> Tensor:
        latents.append(x)
        return both.encoders.decode(x)

    drawn = draw(
        requests, rounds, features, both.velocity, decode,
        space=FLUX2, mu=MU["flux2"], group=alone, dtype=torch.float32, shown=shown,
    )  # fmt: skip
    pictures = dict(drawn)
    return torch.cat(latents), torch.stack([pictures[i] for i in range(len(requests))])


def theirs(both: SimpleNamespace, requests: list[Request]) -> tuple[Tensor, Tensor]:
    """The same by the pipeline, from prompts as they are."""
    zero, shape = torch.zeros(1, dtype=torch.int64), FLUX2.shape(HEIGHT, WIDTH)
    noise = torch.cat([rng.normal(r.seed, rng.Purpose.PICTURE, zero, shape) for r in requests])
    last: list[Tensor] = []

    def keep(pipe: Any, step: int, t: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        last[:] = [tensors["latents"]]
        return {}

    scale = requests[0].guidance or requests[0].cfg_scale  # one argument for either kind of guidance
    images = [Image.open(path) for path in requests[0].references]  # one list, for all of the prompts
    out = both.pipe(
        image=images or None,
        prompt=[r.prompt for r in requests],
        latents=noise,
        width=WIDTH,
        height=HEIGHT,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        max_sequence_length=LENGTH,
        output_type="np",
        callback_on_step_end=keep,
    )
    pictures = torch.from_numpy(np.round(out.images * 255)).permute(0, 3, 1, 2)
    return FLUX2.unpack(last[0], *shape[1:]), pictures.to(torch.uint8)


@pytest.mark.parametrize("sizes", [[], [(100, 70)], [(64, 80), (130, 65)]], ids=str)
@pytest.mark.parametrize(
    ("both", "guidance", "cfg_scale"),
    [("flux2-dev", 4.0, 1.0), ("flux2-klein", None, 4.0), ("flux2-klein", None, 1.0)],
    ids=["dev", "klein-base", "klein-distilled"],
    indirect=["both"],
)
def test_prompts_become_the_pictures_of_the_pipeline(both, guidance, cfg_scale, sizes, tmp_path):
    """In float32, where both are 1e-5 from float64. Another chat, hidden state or position makes 1e-2 and
    more, a mu that is off by 0.001 too."""
    files = []
    for number, size in enumerate(sizes):  # of the reference images; cut to multiples of 16 by both
        files.append(str(tmp_path / f"{number}.png"))
        picture(number, size).save(files[-1])
    base = Request("a", WIDTH, HEIGHT, STEPS, guidance, cfg_scale, seed=5, references=tuple(files))
    requests = [replace(base, prompt="a red apple on a table"), replace(base, prompt="two dogs", seed=6)]
    latents, pictures = ours(both, requests)
    want_latents, want_pictures = theirs(both, requests)
    difference = (latents - want_latents).abs().max().item()
    levels = (pictures.int() - want_pictures.int()).abs()
    print(f"latents differ by {difference:.1e} of {want_latents.abs().max():.1f}")
    print(f"pictures differ by {levels.max()} levels, mean {levels.float().mean():.1e}")
    assert difference <= 3e-5
    assert levels.max() <= 1
    assert pictures.float().std() > 10
    assert not torch.equal(pictures[0], pictures[1])
