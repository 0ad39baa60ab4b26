"""How far this code is from Black Forest Labs' on the golden files of `tests/golden`: a row a comparison."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from flux_trainer.flow.euler import euler
from flux_trainer.flow.latents import SPACES
from flux_trainer.flow.timesteps import MU, schedule
from flux_trainer.models import sinusoids
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.configs import TIME_DIM, Flux1Config, Flux2Config
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import model_class

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
CONFIGS = {"flux1": Flux1Config, "flux2": Flux2Config}
BFL = {"flux1": "BFL flux 802fb47", "flux2": "BFL flux2 60116b5"}

Row = tuple[str, str, str]
"""What, reference, largest difference."""


def golden_rows() -> list[Row]:
    """With the frequencies of timesteps that BFL's code had; outputs with ours as well."""
    with patch.object(sinusoids, "frequencies", _bfl_frequencies):
        rows = []
        for case in ("flux1_A", "flux1_eps", "flux2_C", "flux2_eps"):
            rows += _transformer(case)
        for family, case in (("flux1", "flux1_A"), ("flux2", "flux2_C")):
            rows += [_schedules(family), *_trajectories(family, case)]
    for case in ("flux1_A", "flux2_C"):
        what, reference, difference = _transformer(case)[0]
        rows.append((f"{what}, with our own frequencies", reference, difference))
    return [*rows, *_sinusoids(), *_autoencoder()]


def _bfl_frequencies(dim: int, base: float, device: torch.device | str = "cpu") -> Tensor:
    if dim != TIME_DIM:
        return _FREQUENCIES(dim, base, device)
    return load_file(GOLDEN / "frequencies.safetensors")["timesteps"].to(device, torch.float64)


_FREQUENCIES = sinusoids.frequencies


def _fields(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / case / "config.json").read_text())["bfl"]


def _filled(case: str, model: nn.Module) -> nn.Module:
    model.load_state_dict(load_file(GOLDEN / case / "weights_bfl.safetensors"))
    return model


def _model(case: str) -> FluxModel:
    config = CONFIGS[case.partition("_")[0]](**_fields(case))
    return _filled(case, model_class(config)(config))


def _call(model: FluxModel, io: dict[str, Tensor], image: Tensor, ids: Tensor, t: Tensor) -> Tensor:
    """The model's output with the text and the guidance of a golden file."""
    arguments = model.arguments(
        image=image,
        image_ids=ids,
        text=io["in.txt"],
        text_ids=io["in.txt_ids"],
        timesteps=t,
        pooled=io.get("in.y"),
        guidance=io["in.guidance"] if "in.guidance" in io else io["guidance"].expand(len(image)),
    )
    return model(**arguments)


def _transformer(case: str) -> list[Row]:
    """Output and gradients; the output with reference images beside it, where there is a file of it."""
    model, reference, folder = _model(case), BFL[case.partition("_")[0]], GOLDEN / case
    rows = []
    for file, what in (("io", ""), ("io_ref", " with two reference images")):
        if not (folder / f"{file}.safetensors").exists():
            continue
        io = load_file(folder / f"{file}.safetensors")
        out = _call(model, io, io["in.img"], io["in.img_ids"], io["in.timesteps"])
        rows.append((f"{case}: output{what}", reference, absolute(out, io["out"])))
        if file == "io":
            (out * io["probe"]).sum().backward()
            gradients = load_file(folder / "grads_bfl.safetensors")
            found = {name: p.grad for name, p in model.named_parameters()}
            worst = max(relative(found[name], want) for name, want in gradients.items())
            what = f"{case}: gradients of {len(gradients)} tensors, of each one's largest entry"
            rows.append((what, reference, f"{worst:.1e}"))
    return rows


def _schedules(family: str) -> Row:
    cases = json.loads((GOLDEN / "schedules.json").read_text())[family]
    cases = [case for case in cases if "base_shift" not in case]  # not FLUX.1's line
    worst = 0.0
    for case in cases:
        steps = case["num_steps"]
        mu = MU[family](case["image_seq_len"], steps) if case.get("shift", True) else None
        pairs = zip(schedule(steps, mu), case["timesteps"], strict=True)
        worst = max(worst, *(abs(ours - theirs) for ours, theirs in pairs))
    return (f"{family}: times of {len(cases)} schedules", BFL[family], f"{worst:.1e}")


@torch.no_grad()
def _trajectories(family: str, case: str) -> list[Row]:
    """Where four Euler steps end, without and with reference images' tokens behind the image's."""
    model, io = _model(case), load_file(GOLDEN / f"sampling/{case}.safetensors")
    space, (height, width) = SPACES[family], io["in.noise_latents"].shape[2:]
    none = (io["in.noise"][:, :0], io["in.img_ids"][:, :0])
    runs = [("out", "", none)]
    if family == "flux1":
        kontext = (io["in.cond_seq"], io["in.cond_seq_ids"])
        runs.append(("out_with_cond_seq", " with a reference image", kontext))
    else:
        runs.append(("out_ref", " with two reference images", (io["in.ref_tokens"], io["in.ref_ids"])))
    rows = []
    for key, what, (tokens, positions) in runs:
        ids = torch.cat([io["in.img_ids"], positions], dim=1)

        def velocity(x: Tensor, t: Tensor, ids: Tensor = ids, tokens: Tensor = tokens) -> Tensor:
            return _call(model, io, torch.cat([x, tokens], dim=1), ids, t)[:, : x.shape[1]]

        end = euler(velocity, io["in.noise"], io["timesteps"].tolist())
        ours, theirs = (space.unpack(x, height, width) for x in (end, io[key]))
        rows.append((f"{case}: latents after 4 steps{what}", BFL[family], absolute(ours, theirs)))
    return rows


def _sinusoids() -> list[Row]:
    """Tables of real sizes, with our own frequencies."""
    io = load_file(GOLDEN / "ids_packing_math.safetensors")
    ours = sinusoids.frequencies(TIME_DIM, 10_000).float()
    theirs = load_file(GOLDEN / "frequencies.safetensors")["timesteps"]
    rows = [("frequencies of timesteps", BFL["flux1"], absolute(ours, theirs))]
    for family, axes_dim, theta in (("flux1", (16, 56, 56), 10_000), ("flux2", (32, 32, 32, 32), 2000)):
        ids = io[f"math.{family}.ids"].float()
        (theirs,) = (table for name, table in io.items() if name.startswith(f"math.{family}.pe"))
        ours = sinusoids.rope_table(ids, axes_dim, theta)[:, :, 0]  # [1, L, D/2, 2]
        what = f"{family}: rotary table, positions up to {ids.max():.0f}"
        rows.append((what, BFL[family], absolute(ours, theirs[:, 0, :, :, :, 0])))
    return rows


@torch.no_grad()
def _autoencoder() -> list[Row]:
    case = "flux1_ae"
    model = _filled(case, AutoEncoder(AutoEncoderConfig(**_fields(case))))
    io = load_file(GOLDEN / case / "io.safetensors")
    return [
        (f"{case}: latents", BFL["flux1"], absolute(model.encode(io["in.image"], None), io["latents"])),
        (f"{case}: image of latents", BFL["flux1"], absolute(model.decode(io["in.z2"]), io["decoded2"])),
    ]


def absolute(ours: Tensor, theirs: Tensor) -> str:
    """`2.1e-06 of 5.6`: the largest difference, and the largest entry."""
    return f"{(ours - theirs).abs().max().item():.1e} of {theirs.abs().max().item():.2g}"


def relative(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()
