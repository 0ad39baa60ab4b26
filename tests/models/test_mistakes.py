"""The golden files are sharp enough: each mistake that is often made in FLUX's code fails their comparison.

Every mistake is made once, by changing the model's code in memory. In the comparison as it is made in
`test_flux1.py` and `test_flux2.py`, the output then is off by a multiple of the tolerance.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import golden
from helpers.golden import GOLDEN
from torch import Tensor

from flux_trainer.models import layers, model
from flux_trainer.models.configs import Flux1Config, Flux2Config
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.flux2 import Flux2Model
from flux_trainer.models.fused import plain_norm_rope
from flux_trainer.models.model import FluxModel

pytestmark = pytest.mark.usefixtures("recorded_frequencies")

TOLERANCE = 2e-5
FAMILIES = {"flux1": (Flux1Model, Flux1Config, "flux1_A"), "flux2": (Flux2Model, Flux2Config, "flux2_C")}

Break = Callable[[FluxModel, pytest.MonkeyPatch], object]


def error(family: str, case: str, file: str, mistake: Break | None, monkeypatch: pytest.MonkeyPatch) -> float:
    """How far the output is off."""
    kind, config, main = FAMILIES[family]
    case = main if case == "main" else f"{family}_eps"
    built, io = golden.load_case(case, kind, config, file)
    if mistake is not None:
        mistake(built, monkeypatch)
    given = {name: io.get(f"in.{key}") for name, key in _BFL.items()}
    with torch.no_grad():
        out = built(**built.arguments(**given))
    return float((out - io["out"]).abs().max())


_BFL = {
    "image": "img",
    "image_ids": "img_ids",
    "text": "txt",
    "text_ids": "txt_ids",
    "timesteps": "timesteps",
    "pooled": "y",
    "guidance": "guidance",
}


def layer_norm_eps(built, monkeypatch):
    for module in built.modules():
        if isinstance(module, layers.LayerNorm):
            module.eps = 1e-5


def rms_norm_eps(eps: float) -> Break:
    return lambda built, monkeypatch: monkeypatch.setattr(layers, "NORM_EPS", eps)


def rope_half_split(built, monkeypatch):
    """The first half of a head's dimensions is paired with the second, as in Llama's code."""

    def turned(x: Tensor, scale: Tensor, pe: Tensor, eps: float) -> Tensor:
        def apart(y):
            return y.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

        turned = plain_norm_rope(apart(x), apart(scale), pe, eps)
        return turned.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

    monkeypatch.setattr(layers, "norm_rope", turned)


def positions(change: Callable[[Tensor, int], Tensor], text: int = 7) -> Break:
    """Positions [B, L, axes] are changed; the first `text` are those of text."""

    def mistake(built, monkeypatch):
        right = model.rope_table
        monkeypatch.setattr(
            model, "rope_table", lambda ids, *others: right(change(ids.clone(), text), *others)
        )

    return mistake


def swap_rows_and_columns(ids: Tensor, text: int) -> Tensor:
    order = [0, 2, 1, 3][: ids.shape[-1]]
    return ids[..., order]


def zero_image(ids: Tensor, text: int) -> Tensor:
    ids[:, text:] = 0
    return ids


def zero_text(ids: Tensor, text: int) -> Tensor:
    ids[:, :text] = 0
    return ids


def zero_time(ids: Tensor, text: int) -> Tensor:
    ids[..., 0] = 0
    return ids


def theta(value: float) -> Break:
    def mistake(built, monkeypatch):
        right = model.rope_table
        monkeypatch.setattr(model, "rope_table", lambda ids, axes, _: right(ids, axes, value))

    return mistake


def exact_gelu(built, monkeypatch):
    monkeypatch.setattr(layers, "gelu", F.gelu)


def swapped_gate(built, monkeypatch):
    right = layers.swiglu
    monkeypatch.setattr(layers, "swiglu", lambda gate, up: right(up, gate))


def final_shift_and_scale(built, monkeypatch):
    right = built.final_layer.norm_final.forward
    monkeypatch.setattr(
        built.final_layer.norm_final, "forward", lambda x, shift, scale: right(x, scale, shift)
    )


def times(change: Callable[[Callable[..., Tensor], Tensor], Tensor]) -> Break:
    """`change` makes the embedding [B, dim] of timesteps and guidance [B], given the right function."""

    def mistake(built, monkeypatch):
        right = model.timestep_embedding
        monkeypatch.setattr(model, "timestep_embedding", lambda t, dim: change(lambda t: right(t, dim), t))

    return mistake


MISTAKES: dict[str, tuple[Break, str, str]] = {
    "LayerNorm's eps is 1e-5": (layer_norm_eps, "eps", "flux1 flux2"),
    "RMSNorm's eps is 1e-5": (rms_norm_eps(1e-5), "eps", "flux1 flux2"),
    "RMSNorm's eps is float32's": (rms_norm_eps(torch.finfo(torch.float32).eps), "eps", "flux1 flux2"),
    "rotary pairs are halves apart": (rope_half_split, "main", "flux1 flux2"),
    "rows and columns are swapped": (positions(swap_rows_and_columns), "main", "flux1 flux2"),
    "all of the image is at 0": (positions(zero_image), "main", "flux1 flux2"),
    "all of the text is at 0": (positions(zero_text), "main", "flux2"),
    "references are at time 0": (positions(zero_time), "ref", "flux2"),
    "the other family's theta, 2000": (theta(2000), "main", "flux1"),
    "the other family's theta, 10000": (theta(10_000), "main", "flux2"),
    "GELU by erf": (exact_gelu, "main", "flux1"),
    "SwiGLU's halves are swapped": (swapped_gate, "main", "flux2"),
    "the head's shift and scale are swapped": (final_shift_and_scale, "main", "flux1 flux2"),
    "all samples have the first one's time": (
        times(lambda right, t: right(t[:1].expand_as(t))),
        "main",
        "flux1 flux2",
    ),
    "sines come before cosines": (times(lambda right, t: right(t).roll(128, dims=1)), "main", "flux1 flux2"),
    "times are not multiplied by 1000": (times(lambda right, t: right(t / 1000)), "main", "flux1 flux2"),
    "times are rounded to bfloat16": (times(lambda right, t: right(t.bfloat16())), "main", "flux1 flux2"),
}
"""Name -> how to make it, the golden case that sees it, and the families in which it can be made."""


@pytest.mark.parametrize(
    ("name", "family"), [(name, family) for name, case in MISTAKES.items() for family in case[2].split()]
)
def test_the_golden_case_sees_it(name, family, monkeypatch):
    mistake, case, _ = MISTAKES[name]
    file, case = ("io_ref", "main") if case == "ref" else ("io", case)
    assert error(family, case, file, None, monkeypatch) <= TOLERANCE
    assert error(family, case, file, mistake, monkeypatch) > 5 * TOLERANCE


def test_what_the_references_positions_are():
    """`zero_time` and `zero_text` change what they are meant to."""
    config = json.loads((GOLDEN / "flux2_C/config.json").read_text())["bfl"]
    _, io = golden.load_case("flux2_C", Flux2Model, Flux2Config, "io_ref")
    assert io["in.txt_ids"].shape == (2, 7, len(config["axes_dim"]))
    assert io["in.img_ids"][..., 0].unique().tolist() == [0, 10, 20]
