"""FLUX.2 against golden files written by BFL's code, and what no golden file can show."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_trainer.models import layers
from flux_trainer.models.attention import rope_table
from flux_trainer.models.configs import Flux2Config
from flux_trainer.models.flux2 import Flux2Model

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = [("flux2_C", "io"), ("flux2_C", "io_ref"), ("flux2_eps", "io")]
ARGUMENTS = {
    "x": "img",
    "x_ids": "img_ids",
    "timesteps": "timesteps",
    "ctx": "txt",
    "ctx_ids": "txt_ids",
    "guidance": "guidance",
}


def load_case(case: str, file: str = "io") -> tuple[Flux2Model, dict[str, torch.Tensor]]:
    config = Flux2Config(**json.loads((GOLDEN / case / "config.json").read_text())["bfl"])
    model = Flux2Model(config)
    model.load_state_dict(load_file(GOLDEN / case / "weights_bfl.safetensors"), strict=True)
    return model, load_file(GOLDEN / case / f"{file}.safetensors")


def inputs(io: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {argument: io[f"in.{name}"].clone() for argument, name in ARGUMENTS.items()}


def assert_within(actual: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """Largest difference at most 2e-5 of the largest entry."""
    error, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= 2e-5 * largest, f"{name}: off by {error:.2e}, largest entry {largest:.2e}"


@pytest.mark.parametrize(("case", "file"), CASES)
def test_outputs_and_activations(case, file):
    model, io = load_case(case, file)
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            if isinstance(output, tuple):
                seen[f"{name}.img"], seen[f"{name}.txt"] = output
            else:
                seen[name] = output

        return hook

    for name, module in [("img_in", model.img_in), ("txt_in", model.txt_in), *model.blocks()]:
        module.register_forward_hook(keep(name))
    model.final_layer.register_forward_pre_hook(lambda module, args: seen.update(vec=args[1]))
    with torch.no_grad():
        out = model(**inputs(io))
    torch.testing.assert_close(out, io["out"], atol=2e-5, rtol=0)
    expected = {key.removeprefix("act."): value for key, value in io.items() if key.startswith("act.")}
    table = torch.cat((expected.pop("pe_txt"), expected.pop("pe_img")), dim=2)
    assert seen.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(seen[name], value, atol=2e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    given = inputs(io)
    ids = torch.cat((given["ctx_ids"], given["x_ids"]), dim=1)
    cos, sin = rope_table(ids, model.config.axes_dim, model.config.theta).transpose(1, 2).unbind(-1)
    matrices = torch.stack((cos, -sin, sin, cos), dim=-1).unflatten(-1, (2, 2))
    torch.testing.assert_close(matrices, table, atol=2e-7, rtol=0)


@pytest.mark.parametrize("case", ["flux2_C", "flux2_eps"])
def test_gradients(case):
    """Of every parameter and input; those of the shared modulations are sums over all blocks."""
    model, io = load_case(case)
    arguments = inputs(io)
    for name in ("x", "ctx"):
        arguments[name].requires_grad_()
    out = model(**arguments)
    (out * io["probe"]).sum().backward()
    expected = load_file(GOLDEN / case / "grads_bfl.safetensors")
    actual = {name: p.grad for name, p in model.named_parameters()}
    assert actual.keys() == expected.keys()
    for name in expected:
        assert_within(actual[name], expected[name], name)
    assert_within(arguments["x"].grad, io["grad.img"], "img")
    assert_within(arguments["ctx"].grad, io["grad.txt"], "txt")


def test_gradients_with_reference_images():
    model, io = load_case("flux2_C", "io_ref")
    arguments = inputs(io)
    for name in ("x", "ctx"):
        arguments[name].requires_grad_()
    (model(**arguments) * io["probe"]).sum().backward()
    assert_within(arguments["x"].grad, io["grad.img"], "img")
    assert_within(arguments["ctx"].grad, io["grad.txt"], "txt")


@pytest.mark.parametrize("norm", ["LayerNorm", "RMSNorm"])
def test_eps_case_sees_a_wrong_eps(norm, monkeypatch):
    """The golden case is sharp enough: 1e-5 instead of 1e-6 in either norm fails it."""
    model, io = load_case("flux2_eps")
    if norm == "RMSNorm":
        monkeypatch.setattr(layers, "NORM_EPS", 1e-5)
    else:
        for module in model.modules():
            if isinstance(module, layers.LayerNorm):
                module.eps = 1e-5
    with torch.no_grad():
        out = model(**inputs(io))
    assert (out - io["out"]).abs().max() > 10 * 2e-5


def test_guidance_is_asked_for_where_the_model_embeds_it():
    model, io = load_case("flux2_C")
    given = inputs(io) | {"guidance": None}
    with pytest.raises(ValueError, match="use_guidance_embed"):
        model(**given)
    fields = vars(model.config) | {"use_guidance_embed": False}
    without = Flux2Model(Flux2Config(**fields))
    with torch.no_grad():
        assert torch.equal(without(**given), without(**inputs(io)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_heads": 5}, "multiple of num_heads"),
        ({"axes_dim": (4, 6, 8, 5)}, "each must be even"),
        ({"axes_dim": (4, 6, 8, 8)}, "adds up to 26"),
        ({"context_in_dim": 0}, "Flux2Config.context_in_dim is 0"),
    ],
)
def test_impossible_shapes_are_refused(change, words):
    fields = json.loads((GOLDEN / "flux2_C/config.json").read_text())["bfl"]
    with pytest.raises(ValueError, match=words):
        Flux2Config(**{**fields, **change})
