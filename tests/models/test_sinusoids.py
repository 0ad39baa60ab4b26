"""The sinusoids of timesteps and positions: closed forms, BFL's and diffusers' tables, and equal bits."""

from __future__ import annotations

import json
import math
from decimal import Decimal, getcontext

import pytest
import torch
from helpers.golden import GOLDEN, as_matrices, recorded_frequencies
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.models.sinusoids import frequencies, rope_table, timestep_embedding

TABLES = [(256, 10_000), (16, 10_000), (56, 10_000), (32, 2000)]
"""(dim, base) of all published models: timesteps, FLUX.1's axes, FLUX.2's."""
CASES = {"flux1": ((16, 56, 56), 10_000), "flux2": ((32, 32, 32, 32), 2000)}


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ids_packing_math.safetensors")


@pytest.mark.parametrize(("dim", "base"), TABLES)
def test_frequencies_are_the_closed_form_rounded_once(dim, base):
    """Against 50 decimal digits. float64's last bits do not matter to float32: each frequency is more than a
    thousand of them away from where float32 would round to another number."""
    getcontext().prec = 50
    exact = [Decimal(base) ** (Decimal(-2 * i) / dim) for i in range(dim // 2)]
    ours = frequencies(dim, base)
    assert ours.dtype == torch.float64
    for got, rounded, want in zip(ours.tolist(), ours.float().tolist(), exact, strict=True):
        assert abs(Decimal(got) - want) <= 4 * Decimal(math.ulp(got))  # the exponent is rounded, too
        half_step = Decimal(2.0 ** (math.frexp(rounded)[1] - 25))  # of float32
        assert half_step - abs(Decimal(rounded) - want) > 1000 * Decimal(math.ulp(got))


def test_bfl_float32_frequencies_are_as_near_as_float32_allows():
    """BFL's exp(-log(10000) i / 128) in float32 rounds the exponent, too. Small frequencies are up to seven
    units in the last place away, and none is by more than the last place of the largest: 2^-24."""
    ours, theirs = frequencies(256, 10_000), recorded_frequencies().double()
    distance = (ours.float().double() - theirs).abs()
    assert 0 < distance.max() <= 2**-24
    assert (distance / (theirs * 2**-23)).max() < 8


def test_the_embedding_of_timesteps_is_bfls(golden):
    t = golden["math.t"]
    ours, theirs = timestep_embedding(t), golden["math.timestep_embedding_256"]
    # An angle of a radians has a frequency's error, and two numbers near a round differently.
    freedom = 1000 * t * (2**-24 + 2**-23) + 2**-23
    assert ((ours - theirs).abs().amax(1) <= freedom).all()
    exact = 1000 * t.double()[:, None] * frequencies(256, 10_000)
    want = torch.cat((exact.cos(), exact.sin()), dim=1)
    assert ((ours - want).abs().amax(1) <= 1000 * t * 2**-23 + 2**-24).all()


@pytest.mark.usefixtures("recorded_frequencies")
def test_with_bfls_frequencies_the_embedding_is_bfls_to_the_last_bit_but_one(golden):
    ours = timestep_embedding(golden["math.t"])
    torch.testing.assert_close(ours, golden["math.timestep_embedding_256"], atol=2e-7, rtol=0)


@pytest.mark.parametrize("family", CASES)
def test_the_rotary_table_is_diffusers(family, golden):
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    axes_dim, theta = CASES[family]
    ids = golden[f"math.{family}.ids"]
    parts = [
        embeddings.get_1d_rotary_pos_embed(
            dim, ids[0, :, axis].double(), theta=theta, use_real=True, freqs_dtype=torch.float64
        )
        for axis, dim in enumerate(axes_dim)
    ]
    cos, sin = (torch.cat([part[k] for part in parts], dim=-1)[:, ::2] for k in (0, 1))
    ours = rope_table(ids.float(), axes_dim, theta)[0, :, 0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, torch.stack((cos, sin), dim=-1).float(), atol=2**-24, rtol=0)


@pytest.mark.parametrize("family", CASES)
def test_the_rotary_table_is_bfls_but_for_its_float32_frequencies(family, golden):
    """Two units in the last place of a frequency, times the position: up to 125 in FLUX.1, 479 in FLUX.2."""
    axes_dim, theta = CASES[family]
    (theirs,) = (x for name, x in golden.items() if name.startswith(f"math.{family}.pe"))
    ids = golden[f"math.{family}.ids"].float()
    ours = as_matrices(rope_table(ids, axes_dim, theta))
    reach = torch.cat([ids[0, :, axis, None].expand(-1, d // 2) for axis, d in enumerate(axes_dim)], dim=1)
    freedom = reach[None, None, :, :, None, None] * 2**-23 + 2**-23  # [1, 1, L, D/2, 1, 1]
    assert ((ours - theirs).abs() <= freedom).all()


@pytest.mark.parametrize("case", ["flux1_A", "flux1_eps", "flux2_C", "flux2_eps"])
def test_the_rotary_table_of_small_models_is_bfls(case):
    config, io = (
        json.loads((GOLDEN / case / "config.json").read_text())["bfl"],
        load_file(GOLDEN / case / "io.safetensors"),
    )
    theirs = io["act.pe"] if "act.pe" in io else torch.cat((io["act.pe_txt"], io["act.pe_img"]), dim=2)
    ids = torch.cat((io["in.txt_ids"], io["in.img_ids"]), dim=1)
    ours = as_matrices(rope_table(ids, tuple(config["axes_dim"]), config["theta"]))
    torch.testing.assert_close(ours, theirs, atol=ids.max().item() * 2**-23 + 2**-23, rtol=0)


class OtherDevice(TorchDispatchMode):
    """Another make of device: each exp, pow, cos or sin is one unit in the last place off, up or down.

    The four basic operations are exactly rounded everywhere.
    """

    OPERATIONS = ("exp", "pow", "cos", "sin")

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)
        self.changed: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in self.OPERATIONS:
            self.changed.append(name)
            up = torch.rand(out.shape, generator=self.generator) < 0.5
            return torch.nextafter(out, torch.where(up, torch.inf, -torch.inf).to(out.dtype))
        return out


def test_timesteps_have_the_same_bits_on_every_device():
    t = torch.cat((torch.arange(1001) / 1000, torch.arange(1, 81) / 10))
    with OtherDevice() as device:
        there = timestep_embedding(t)
    assert {"cos", "sin"} <= set(device.changed)
    assert torch.equal(there, timestep_embedding(t))


@pytest.mark.parametrize("family", CASES)
def test_rotary_tables_have_the_same_bits_on_every_device(family):
    """At all positions of an image of 1024 pixels with 512 tokens of text, and of a tenth reference."""
    axes_dim, theta = CASES[family]
    ids = torch.zeros(1, 512, len(axes_dim))
    ids[0, :, 0], ids[0, :, -1] = 100, torch.arange(512)
    ids[0, :64, 1] = ids[0, :64, 2] = torch.arange(64)
    with OtherDevice() as device:
        there = rope_table(ids, axes_dim, theta)
    assert {"cos", "sin"} <= set(device.changed)
    assert torch.equal(there, rope_table(ids, axes_dim, theta))
