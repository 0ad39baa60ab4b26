"""FLUX.2 against golden files written by BFL's code, and what no golden file can show."""

import json

import pytest
import torch
from helpers import golden
from helpers.golden import GOLDEN, assert_activations, assert_within

from flux_trainer.models.configs import Flux2Config
from flux_trainer.models.flux2 import Flux2Model

pytestmark = pytest.mark.usefixtures("recorded_frequencies")

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
    return golden.load_case(case, Flux2Model, Flux2Config, file)


def inputs(io: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {argument: io[f"in.{name}"].clone() for argument, name in ARGUMENTS.items()}


@pytest.mark.parametrize(("case", "file"), CASES)
def test_outputs_and_activations(case, file):
    model, io = load_case(case, file)
    seen = golden.record(model)
    with torch.no_grad():
        out = model(**inputs(io))
    torch.testing.assert_close(out, io["out"], atol=2e-5, rtol=0)
    assert_activations(seen, io)


@pytest.mark.parametrize("case", ["flux2_C", "flux2_eps"])
def test_gradients(case):
    """Of every parameter and input; those of the shared modulations are sums over all blocks."""
    model, io = load_case(case)
    arguments = inputs(io)
    for name in ("x", "ctx"):
        arguments[name].requires_grad_()
    out = model(**arguments)
    (out * io["probe"]).sum().backward()
    expected = golden.gradients(case)
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
