"""Runs that start from weights of other programs, and leave weights for them."""

import dataclasses
import json

import pytest
import torch
from helpers import tiny_run
from helpers.ranks import run_ranks
from helpers.small_model import inputs
from helpers.tiny_run import TinyTrainer, tiny_config, whole
from safetensors.torch import load_file

from flux_trainer.hub import distilled
from flux_trainer.hub.weights import open_weights
from flux_trainer.models import keys
from flux_trainer.models.registry import FLAVORS, model_class

FLAGS = ("--training.steps=2", "--checkpoint.enable", "--checkpoint.export_dtype=float32")
WIDE = dataclasses.replace(tiny_run.MODEL, mlp_ratio=4.0)  # diffusers has no other ratio of FLUX.1
FAMILIES = ["flux-tiny", "flux2-tiny"]


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(tiny_run, "MODEL", WIDE)
    for flavor, model in zip(FAMILIES, (WIDE, tiny_run.MODEL2), strict=True):
        monkeypatch.setitem(FLAVORS, flavor, model)  # TinyTrainer sets it; put back afterwards


def parameters(trainer):
    return {name: whole(p.detach()) for name, p in trainer.parameters.items()}


@pytest.mark.parametrize("flavor", FAMILIES)
def test_a_run_leaves_files_for_others_and_another_starts_from_them(flavor, tmp_path):
    model = f"--model.flavor={flavor}"
    trainer = TinyTrainer(tiny_config(tmp_path, model, *FLAGS, "--checkpoint.export=diffusers,bfl"))
    trainer.train()
    weights = parameters(trainer)
    folder = tmp_path / "run" / "export" / "step-2"
    assert sorted(path.name for path in folder.iterdir()) == [f"{flavor}.safetensors", "transformer"]
    exported = load_file(folder / f"{flavor}.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], x.float()) for name, x in weights.items())
    for source in (folder / "transformer", folder / f"{flavor}.safetensors", tmp_path / "run"):
        start_from = (f"--checkpoint.initial_load_path={source}", f"--job.dump_folder={tmp_path}/new")
        other = TinyTrainer(tiny_config(tmp_path, model, *start_from))
        start = weights if source.name == "run" else exported
        assert all(torch.equal(x, start[name].double()) for name, x in parameters(other).items())
        average = {name.removeprefix("ema."): whole(x) for name, x in other.ema.tensors().items()}
        assert all(torch.equal(x, start[name].double()) for name, x in average.items())


@pytest.mark.usefixtures("float32_frequencies")
@pytest.mark.parametrize("flavor", FAMILIES)
def test_diffusers_opens_what_a_run_made_of_exported_weights(flavor, tmp_path):
    """From diffusers' layout and from BFL's alike, and it computes the same."""
    flags = (f"--model.flavor={flavor}", *FLAGS, "--checkpoint.export=diffusers,bfl")
    TinyTrainer(tiny_config(tmp_path, *flags)).train()
    first = tmp_path / "run" / "export" / "step-2"
    ends = []
    for source in (first / "transformer", first / f"{flavor}.safetensors"):
        dump = tmp_path / f"from {source.name}"
        start_from = (f"--checkpoint.initial_load_path={source}", f"--job.dump_folder={dump}")
        trainer = TinyTrainer(tiny_config(tmp_path, *flags, *start_from))
        before = parameters(trainer)
        trainer.train()
        ends.append(parameters(trainer))
        assert all((before[name] != x).any() for name, x in ends[-1].items())
        compare_with_diffusers(dump / "export" / "step-2" / "transformer", FLAVORS[flavor], ends[-1])
    assert all(torch.equal(ends[1][name], x) for name, x in ends[0].items())


@torch.no_grad()
def compare_with_diffusers(folder, config, weights):
    """0 missing, 0 unexpected keys; the same output, in float32."""
    import diffusers

    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    assert (
        kind.__name__
        == {"flux1": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel"}[config.family]
    )
    theirs, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    ours = model_class(config)(config)
    ours.load_state_dict(weights)
    given = inputs(config, 2, dtype=torch.float32)
    for name in ("image_ids", "text_ids"):  # diffusers has one list for all samples
        given[name] = given[name][:1].expand(2, -1, -1)
    out = theirs(
        hidden_states=given["image"],
        encoder_hidden_states=given["text"],
        timestep=given["timesteps"],
        img_ids=given["image_ids"][0],
        txt_ids=given["text_ids"][0],
        guidance=given["guidance"],
        **({"pooled_projections": given["pooled"]} if config.family == "flux1" else {}),
    ).sample
    mine = ours(**model_class(config).arguments(**given))
    assert mine.abs().max() > 0.1
    assert (out - mine).abs().max() <= 2e-5 * mine.abs().max()


def test_full_training_of_distilled_weights_is_warned_of(tmp_path, caplog):
    """Once, with what works; not for what a run has made of them."""
    said = {}
    TinyTrainer(tiny_config(tmp_path, *FLAGS, "--checkpoint.export=diffusers")).train()
    for source in ("export/step-2/transformer", "checkpoint/step-2"):
        caplog.clear()
        with caplog.at_level("WARNING"), pytest.MonkeyPatch.context() as patch:
            patch.setitem(distilled._WARNINGS, "flux-tiny", distilled._WARNINGS["flux-schnell"])
            start = f"--checkpoint.initial_load_path={tmp_path}/run/{source}"
            TinyTrainer(tiny_config(tmp_path, start, f"--job.dump_folder={tmp_path}/new"))
        said[source] = [record.message for record in caplog.records if "distilled" in record.message]
    assert [len(told) for told in said.values()] == [1, 0]


def test_every_distilled_flavor_has_its_recipe():
    published = [name for name in FLAVORS if not name.endswith(("debug", "tiny"))]
    for name in published:
        recipe = "flow.guidance = 1" if FLAVORS[name].guidance_embed else "undistilled"
        assert recipe in distilled._WARNINGS[name]
    assert "FLUX.2-klein-base-4B" in distilled._WARNINGS["flux2-klein-4b"]
    assert "flux-tiny" not in distilled._WARNINGS


def test_the_average_is_exported_on_request(tmp_path):
    flags = (*FLAGS, "--checkpoint.export=diffusers", "--checkpoint.export_ema")
    trainer = TinyTrainer(tiny_config(tmp_path, *flags))
    trainer.train()
    average = open_weights(tmp_path / "run" / "export" / "step-2" / "transformer")
    assert average.config == WIDE
    for name, x in trainer.ema.tensors().items():
        native = name.removeprefix("ema.")
        rows = [part for _, part in average.read(native, (0,) * x.ndim, tuple(x.shape))]
        assert torch.equal(torch.cat(rows), whole(x).float()), name
    differs = trainer.parameters["img_in.weight"] != trainer.ema.tensors()["ema.img_in.weight"]
    assert differs.any()


def test_a_model_that_a_format_cannot_hold_is_refused_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_run, "MODEL", dataclasses.replace(WIDE, mlp_ratio=2.0))
    with pytest.raises(ValueError, match=r'checkpoint\.export = \["diffusers"\].*mlp_ratio = 2\.0'):
        TinyTrainer(tiny_config(tmp_path, *FLAGS, "--checkpoint.export=diffusers"))


def run_two(folder, *flags):
    tiny_run.MODEL = WIDE
    trainer = TinyTrainer(tiny_config(folder, *FLAGS, *flags))
    trainer.train()
    return {name: whole(p.detach()) for name, p in trainer.parameters.items()}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_export_what_one_does(tmp_path):
    tiny_config(tmp_path)
    weights, _ = run_ranks(2, run_two, tmp_path, "--checkpoint.export=bfl", "--checkpoint.async_mode=async")
    exported = load_file(tmp_path / "run" / "export" / "step-2" / "flux-tiny.safetensors")
    assert all(torch.equal(exported[name], x.float()) for name, x in weights.items())
    assert set(keys.shapes(open_weights(tmp_path / "run").entries)) == exported.keys()
