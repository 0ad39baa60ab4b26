"""8-bit linears, emulated: near bfloat16, the same modules by name, section and checkpoint, on every mesh."""

import importlib.util
import logging

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.small_model import arguments, small, small2
from helpers.tiny_run import train

from flux_trainer.adapters.quantize import chosen, quantize_linears
from flux_trainer.config.compute import ActivationCheckpoint, Compile, Quantize
from flux_trainer.models.layers import FusedLinear
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.remat import apply_checkpointing

needs_torchao = pytest.mark.skipif(
    importlib.util.find_spec("torchao") is None, reason="needs torchao (extra quant)"
)
KINDS = ["float8", "float8_rowwise", "mxfp8"]
FAMILIES = {"flux1": small(), "flux2": small2()}


def build(family: str, linears: str = "none"):
    """A model in bfloat16 with random weights, and what it takes for two samples of 16 + 16 tokens."""
    torch.manual_seed(0)
    config = FAMILIES[family]
    model = model_class(config)(config).bfloat16()
    for p in model.parameters():
        torch.nn.init.normal_(p, 0, 0.1)
    quantize_linears(model, Quantize(linears=linears, emulate=True))
    return model, arguments(config, 2, image=16, text=16, dtype=torch.float32)


def outcome(model, given) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**given)
    out.float().square().sum().backward()
    return {"": out.detach(), **{name: p.grad for name, p in model.named_parameters()}}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@needs_torchao
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("linears", KINDS)
def test_output_and_gradients_are_near_those_of_bfloat16(linears, family):
    """e4m3 has 3 bits: one product is off by 4 %; beside them are residual streams."""
    want, got = outcome(*build(family)), outcome(*build(family, linears))
    assert got.keys() == want.keys()
    assert 0.004 < distance(got[""], want[""]) < 0.04
    for name, grad in want.items():
        assert grad.abs().max() > 0, name
        if grad.ndim == 2:
            assert distance(got[name], grad) < 0.3, name
    flat = [torch.cat([x.flatten().float() for x in each.values()]) for each in (got, want)]
    assert distance(*flat) < 0.05


@needs_torchao
@pytest.mark.parametrize("linears", KINDS)
def test_a_model_keeps_its_names_its_values_and_the_sections_of_its_linears(linears):
    plain, _ = build("flux1")
    model, _ = build("flux1", linears)
    before, after = plain.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    assert {type(p) for p in model.parameters()} == {torch.nn.Parameter}
    qkv = model.double_blocks[0].img_attn.qkv
    assert isinstance(qkv, FusedLinear)
    assert qkv.rows == plain.double_blocks[0].img_attn.qkv.rows
    assert [part.shape[-1] for part in qkv.split(torch.ones(1, qkv.out_features))] == [32, 32, 32]
    assert list(model.init_distributions()) == list(plain.init_distributions())


@needs_torchao
@pytest.mark.parametrize("linears", KINDS)
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputing_changes_nothing(linears, mode):
    model, given = build("flux1", linears)
    want = outcome(model, given)
    want = {name: tensor.clone() for name, tensor in want.items()}
    apply_checkpointing([block for _, block in model.blocks()], ActivationCheckpoint(mode=mode))
    got = outcome(model, given)
    assert all(torch.equal(got[name], tensor) for name, tensor in want.items())


@needs_torchao
@pytest.mark.slow
@pytest.mark.parametrize("linears", KINDS)
def test_compiled_blocks_of_a_kind_share_a_graph(linears):
    model, given = build("flux1", linears)
    want = outcome(model, given)[""].clone()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_blocks([block for _, block in model.blocks()], Compile(enable=True, backend="aot_eager"))
    assert distance(outcome(model, given)[""], want) < 0.02
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_modulations_embedders_and_the_head_are_left_alone():
    config = FAMILIES["flux1"]
    names = chosen(model_class(config)(config), Quantize(linears="float8"))
    kinds = {name.partition(".")[2].partition(".")[2] for name in names}
    assert kinds == {
        *(f"{stream}_attn.{layer}" for stream in ("img", "txt") for layer in ("qkv", "proj")),
        *(f"{stream}_mlp.{layer}" for stream in ("img", "txt") for layer in ("0", "2")),
        "linear1",
        "linear2",
    }
    assert len(names) == 2 * 8 + 2 * 2


@needs_torchao
def test_one_line_says_which_linears_it_are(caplog):
    config = FAMILIES["flux2"]
    section = Quantize(linears="mxfp8", emulate=True, filter=["single_blocks.*"], skip=["*.linear2"])
    with caplog.at_level(logging.INFO, "flux_trainer"):
        names = quantize_linears(model_class(config)(config), section)
    assert names == ["single_blocks.0.linear1", "single_blocks.1.linear1"]
    assert caplog.messages == ["Linears in mxfp8, emulated: 2 x single_blocks.*.linear1"]


@pytest.mark.parametrize(
    ("section", "told"),
    [
        (
            Quantize(linears="float8", filter=["blocks.*"]),
            r'quantize\.filter: "blocks\.\*" matches no linear',
        ),
        (Quantize(linears="float8", skip=["*"]), r"quantize\.skip leaves no linear"),
        (
            Quantize(linears="mxfp8", filter=["txt_in"]),
            r'txt_in has 20 inputs and 32 outputs; mxfp8 needs multiples of 32\. Add "txt_in"',
        ),
        (Quantize(linears="float8"), r"needs a CUDA device of compute capability 8\.9, and there is none"),
    ],
)
def test_what_cannot_be_is_told(section, told):
    config = FAMILIES["flux1"]
    with pytest.raises(ValueError, match=told):
        quantize_linears(model_class(config)(config), section)


def test_without_torchao_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("flux_trainer.adapters.quantize.find_spec", lambda name: None)
    config = FAMILIES["flux1"]
    with pytest.raises(
        ValueError, match=r"needs torchao; install it with pip install 'flux_trainer\[quant\]'"
    ):
        quantize_linears(model_class(config)(config), Quantize(linears="float8", emulate=True))


RUN = [
    *(f"--training.{key}=float32" for key in ("dtype", "mixed_precision_reduce")),
    "--training.mixed_precision_param=bfloat16",
    "--training.img_size=64",
    "--encoder.max_t5_encoding_len=16",
    "--training.steps=4",
    "--training.local_batch_size=4",
    "--checkpoint.enable",
    "--quantize.emulate",
    "--optimizer.lr=1e-3",
]


def run(folder, linears, *flags):
    return train(folder, *RUN, f"--quantize.linears={linears}", *flags)


def losses(result) -> list[float]:
    return [line["loss"] for line in result["lines"]]


@needs_torchao
@pytest.mark.parametrize("linears", KINDS)
def test_a_run_follows_bfloat16s_and_its_checkpoint_is_the_same_kind(tmp_path, linears):
    plain, low = run(tmp_path / "plain", "none"), run(tmp_path / "low", linears)
    assert losses(low) != losses(plain)
    assert losses(low) == pytest.approx(losses(plain), rel=0.1)
    kind = {name: (t.shape, t.dtype) for name, t in plain["tensors"].items()}
    assert {name: (t.shape, t.dtype) for name, t in low["tensors"].items()} == kind
    # Either run goes on from the other's checkpoint.
    more = run(tmp_path / "low", "none", "--training.steps=5")
    assert len(losses(more)) == 5


MESHES = {
    "float8": ["--training.local_batch_size=2"],  # FSDP
    "float8_rowwise": ["--parallelism.context_parallel_degree=2"],
    "mxfp8": ["--parallelism.pipeline_parallel_degree=2", "--training.local_batch_size=2"],
}


@needs_torchao
@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("linears", KINDS)
def test_on_a_mesh_the_run_is_nearly_the_same(tmp_path, linears):
    """Scales are those of what a rank has, so not exactly."""
    one = run(tmp_path / "one", linears)
    first, _ = run_ranks(2, run, tmp_path / "more", linears, *MESHES[linears], timeout=60)
    assert losses(first) == pytest.approx(losses(one), rel=0.01)
