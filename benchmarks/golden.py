"""How far this code is from Black Forest Labs' on the golden files of `tests/golden`: a row a comparison."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_trainer.flow.euler import euler
from flux_trainer.flow.latents import FLUX1
from flux_trainer.flow.timesteps import flux1_mu, schedule
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.configs import Flux1Config, Flux2Config
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.flux2 import Flux2Model

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
BFL1, BFL2 = "BFL flux 802fb47", "BFL flux2 60116b5"
FLUX2_INPUTS = {"x": "img", "x_ids": "img_ids", "ctx": "txt", "ctx_ids": "txt_ids"}

Row = tuple[str, str, str]
"""What, reference, largest difference."""


def golden_rows() -> list[Row]:
    rows = []
    for case in ("flux1_A", "flux1_eps"):
        names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
        rows += _transformer(case, Flux1Model, Flux1Config, {name: name for name in names}, BFL1)
    for case in ("flux2_C", "flux2_eps"):
        names2 = {**FLUX2_INPUTS, "timesteps": "timesteps", "guidance": "guidance"}
        rows += _transformer(case, Flux2Model, Flux2Config, names2, BFL2)
    return [*rows, *_autoencoder(), *_sampler()]


def _load(case: str, model: type[nn.Module], config: type) -> nn.Module:
    built = model(config(**json.loads((GOLDEN / case / "config.json").read_text())["bfl"]))
    built.load_state_dict(load_file(GOLDEN / case / "weights_bfl.safetensors"))
    return built


def _transformer(
    case: str, model: type[nn.Module], config: type, inputs: dict[str, str], reference: str
) -> list[Row]:
    built, io = _load(case, model, config), load_file(GOLDEN / case / "io.safetensors")
    out = built(**{argument: io[f"in.{name}"] for argument, name in inputs.items()})
    (out * io["probe"]).sum().backward()
    gradients = load_file(GOLDEN / case / "grads_bfl.safetensors")
    found = {name: p.grad for name, p in built.named_parameters()}
    worst = max(relative(found[name], want) for name, want in gradients.items())
    return [
        (f"{case}: output", reference, absolute(out, io["out"])),
        (
            f"{case}: gradients of {len(gradients)} tensors, of each one's largest entry",
            reference,
            f"{worst:.1e}",
        ),
    ]


@torch.no_grad()
def _autoencoder() -> list[Row]:
    built, io = (
        _load("flux1_ae", AutoEncoder, AutoEncoderConfig),
        load_file(GOLDEN / "flux1_ae/io.safetensors"),
    )
    return [
        ("flux1_ae: latents", BFL1, absolute(built.encode(io["in.image"], None), io["latents"])),
        ("flux1_ae: image of latents", BFL1, absolute(built.decode(io["in.z2"]), io["decoded2"])),
    ]


@torch.no_grad()
def _sampler() -> list[Row]:
    cases = json.loads((GOLDEN / "schedules.json").read_text())["flux1"]
    cases = [case for case in cases if "base_shift" not in case]
    times = max(
        abs(ours - theirs)
        for case in cases
        for ours, theirs in zip(
            schedule(case["num_steps"], flux1_mu(case["image_seq_len"]) if case["shift"] else None),
            case["timesteps"],
            strict=True,
        )
    )
    model, io = _load("flux1_A", Flux1Model, Flux1Config), load_file(GOLDEN / "sampling/flux1_A.safetensors")

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        guidance = io["guidance"].expand(len(x))
        return model(x, io["in.img_ids"], io["in.txt"], io["in.txt_ids"], t, io["in.y"], guidance)

    end = euler(velocity, io["in.noise"], io["timesteps"].tolist())
    return [
        (f"times of {len(cases)} schedules", BFL1, f"{times:.1e}"),
        ("flux1_A: latents after 4 steps", BFL1, absolute(FLUX1.unpack(end, 8, 12), io["out_unpacked"])),
    ]


def absolute(ours: Tensor, theirs: Tensor) -> str:
    """`2.1e-06 of 5.6`: the largest difference, and the largest entry."""
    return f"{(ours - theirs).abs().max().item():.1e} of {theirs.abs().max().item():.2g}"


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
