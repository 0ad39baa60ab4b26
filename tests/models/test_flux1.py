"""FLUX.1 against golden files written by BFL's code, and what no golden file can show."""

import json
import sys

import pytest
import torch
from helpers import golden
from helpers.golden import GOLDEN, assert_activations, assert_within
from safetensors.torch import load_file

from flux_trainer.flow.euler import euler
from flux_trainer.flow.latents import FLUX1
from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.flux1 import Flux1Model
from flux_trainer.models.sinusoids import rope_table, timestep_embedding

CASES = ["flux1_A", "flux1_eps"]


def load_case(case: str) -> tuple[Flux1Model, dict[str, torch.Tensor]]:
    return golden.load_case(case, Flux1Model, Flux1Config)


def inputs(io: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    return {name: io[f"in.{name}"].clone() for name in names}


@pytest.fixture(params=["short", "long"])
def either_kernel(request, monkeypatch):
    """Attention as the CPU computes short sequences, and as it is everywhere else."""
    if request.param == "long":
        monkeypatch.setattr(sys.modules["flux_trainer.models.attention"], "SHORT", 0)


@pytest.mark.usefixtures("recorded_frequencies")
@pytest.mark.parametrize("case", CASES)
def test_outputs_and_activations(case, either_kernel):
    model, io = load_case(case)
    seen = golden.record(model)
    with torch.no_grad():
        out = model(**inputs(io))
    torch.testing.assert_close(out, io["out"], atol=2e-5, rtol=0)
    assert_activations(seen, io)


@pytest.mark.usefixtures("recorded_frequencies")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiling", [False, True])
def test_gradients(case, compiling, either_kernel, monkeypatch):
    """Of every parameter and input; also with the arithmetic that is used inside compiled blocks."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    model, io = load_case(case)
    arguments = inputs(io)
    for name in ("img", "txt", "y"):
        arguments[name].requires_grad_()
    out = model(**arguments)
    (out * io["probe"]).sum().backward()
    torch.testing.assert_close(out, io["out"], atol=2e-5, rtol=0)
    expected = golden.gradients(case)
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_within(actual[name], expected[name], name)
    for name in ("img", "txt", "y"):
        assert_within(arguments[name].grad, io[f"grad.{name}"], name)


def test_attention_is_not_causal(either_kernel):
    """The last image token reaches the first text token within one block of either kind."""
    model, io = load_case("flux1_A")
    arguments = inputs(io)
    moved = {**arguments, "img": arguments["img"].clone()}
    moved["img"][:, -1] += 1.0

    @torch.no_grad()
    def first_text_tokens(arguments):
        ids = torch.cat((arguments["txt_ids"], arguments["img_ids"]), dim=1)
        pe = rope_table(ids, model.config.axes_dim, model.config.theta)
        img, txt, vec = model.img_in(arguments["img"]), model.txt_in(arguments["txt"]), io["act.vec"]
        double = model.double_blocks[0](img, txt, vec, pe)[1]
        single = model.single_blocks[0](torch.cat((txt, img), dim=1), vec, pe)
        return double[:, 0], single[:, 0]

    for before, after in zip(first_text_tokens(arguments), first_text_tokens(moved), strict=True):
        assert (before - after).abs().max() > 1e-3


def test_bf16_weights_keep_float32_where_it_matters():
    model, io = load_case("flux1_A")
    arguments = inputs(io)
    with torch.no_grad():
        exact = model(**arguments)
    model.bfloat16()
    seen = {}
    model.double_blocks[0].register_forward_pre_hook(
        lambda m, args: seen.update(img=args[0].dtype, vec=args[2].dtype, pe=args[3].dtype)
    )
    with torch.no_grad():
        rounded = model(**arguments)
    assert seen == {"img": torch.bfloat16, "vec": torch.bfloat16, "pe": torch.float32}
    assert rounded.dtype == torch.bfloat16
    assert timestep_embedding(arguments["timesteps"]).dtype == torch.float32
    error = (rounded.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < 0.02  # measured: 0.011; timesteps and guidance rounded to bf16 give 0.5


def test_bf16_model_tells_far_positions_apart():
    """bf16 rounds positions above 256, which would turn neighbours by the same angle."""
    model, io = load_case("flux1_A")
    model.bfloat16()
    arguments = inputs(io)
    arguments["img_ids"] += 301.0
    tables, sinusoids = [], []
    model.single_blocks[0].register_forward_pre_hook(lambda m, args: tables.append(args[2]))
    model.time_in.register_forward_pre_hook(lambda m, args: sinusoids.append(args[0]))
    with torch.no_grad():
        model(**arguments)
    ids = torch.cat((arguments["txt_ids"], arguments["img_ids"]), dim=1)
    assert torch.equal(tables[0], rope_table(ids, model.config.axes_dim, model.config.theta))
    assert torch.equal(sinusoids[0], timestep_embedding(arguments["timesteps"]).bfloat16())


def test_float64_throughout():
    """With inputs in float64 nothing inside is rounded to float32 (which would leave 1e-7)."""
    model, io = load_case("flux1_A")
    model.double()
    arguments = {name: value.double() for name, value in inputs(io).items()}
    seen = {}
    model.double_blocks[0].register_forward_pre_hook(lambda m, args: seen.update(pe=args[3].dtype))
    with torch.no_grad():
        out = model(**arguments)
        nudged = model(**{**arguments, "timesteps": arguments["timesteps"] + 1e-12})
    assert seen["pe"] == out.dtype == torch.float64
    torch.testing.assert_close(out.float(), io["out"], atol=1e-3, rtol=0)  # float32 rounds 3500 rad to 2e-4
    assert 0 < (nudged - out).abs().max() < 1e-7


def test_guidance():
    model, io = load_case("flux1_A")
    arguments = inputs(io)
    with pytest.raises(ValueError, match="guidance"):
        model(**{**arguments, "guidance": None})
    config = Flux1Config(**{**vars(model.config), "guidance_embed": False})
    plain = Flux1Model(config)
    assert plain.guidance_in is None
    with torch.no_grad():
        assert torch.equal(plain(**arguments), plain(**{**arguments, "guidance": None}))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"hidden_size": 50}, "num_heads"),
        ({"axes_dim": [2, 4, 8]}, "axes_dim"),
        ({"axes_dim": [3, 3, 6]}, "even"),
        ({"depth": -1}, "depth"),
        ({"num_heads": 0}, "num_heads"),
        ({"mlp_ratio": 0.0}, "mlp_ratio"),
    ],
)
def test_impossible_configs_are_refused(change, word):
    fields = json.loads((GOLDEN / "flux1_A" / "config.json").read_text())["bfl"]
    with pytest.raises(ValueError, match=word):
        Flux1Config(**{**fields, **change})


def test_qkv_bias_is_optional():
    fields = json.loads((GOLDEN / "flux1_A" / "config.json").read_text())["bfl"]
    with torch.device("meta"):
        with_bias, without = (Flux1Model(Flux1Config(**{**fields, "qkv_bias": b})) for b in (True, False))
    gone = set(with_bias.state_dict()) - set(without.state_dict())
    assert gone == {f"double_blocks.{i}.{s}_attn.qkv.bias" for i in (0, 1) for s in ("img", "txt")}


@pytest.mark.slow
def test_blocks_compile_without_breaks():
    """Forward and backward of both kinds of block through AOTAutograd equal eager mode."""
    model, io = load_case("flux1_A")
    arguments = inputs(io)

    def run():
        model.zero_grad()
        out = model(**arguments)
        (out * io["probe"]).sum().backward()
        return out, [p.grad.clone() for p in model.parameters()]

    out, grads = run()
    for block in (model.double_blocks[0], model.single_blocks[0]):
        block.compile(backend="aot_eager", fullgraph=True)
    compiled_out, compiled_grads = run()
    torch.testing.assert_close(compiled_out, out, atol=1e-5, rtol=0)
    for a, b in zip(compiled_grads, grads, strict=True):
        assert_within(a, b, "gradient")


@pytest.mark.usefixtures("recorded_frequencies")
def test_golden_sampling():
    """Our packing, sampler and model against the trajectory of BFL's."""
    model, _ = load_case("flux1_A")
    golden = load_file(GOLDEN / "sampling" / "flux1_A.safetensors")
    noise, latents = golden["in.noise"], golden["in.noise_latents"]
    torch.testing.assert_close(FLUX1.pack(latents), noise, atol=0, rtol=0)
    conditioning = {name: golden[f"in.{name}"] for name in ("img_ids", "txt", "txt_ids", "y")}
    guidance = golden["guidance"].expand(len(noise))
    step = 0

    def predict(x, t):
        nonlocal step
        expected = {key: golden[f"plain.step{step}.{key}"] for key in ("model_in", "t", "pred")}
        v = model(img=x, timesteps=t, guidance=guidance, **conditioning)
        for ours, key in [(x, "model_in"), (t, "t"), (v, "pred")]:
            torch.testing.assert_close(ours, expected[key], atol=2e-5, rtol=0)
        step += 1
        return v

    with torch.no_grad():
        out = euler(predict, noise, golden["timesteps"].tolist())
    assert step == 4
    torch.testing.assert_close(out, golden["out"], atol=2e-5, rtol=0)
    unpacked = FLUX1.unpack(out, *latents.shape[2:])
    torch.testing.assert_close(unpacked, golden["out_unpacked"], atol=2e-5, rtol=0)
