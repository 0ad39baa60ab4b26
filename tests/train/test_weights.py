"""Runs that start from weights of other programs, and leave weights for them."""

import dataclasses

import pytest
import torch
from helpers import tiny_run
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config, whole
from safetensors.torch import load_file

from flux_trainer.hub import distilled
from flux_trainer.hub.weights import open_weights
from flux_trainer.models import keys
from flux_trainer.models.registry import FLAVORS

FLAGS = ("--training.steps=2", "--checkpoint.enable", "--checkpoint.export_dtype=float32")
WIDE = dataclasses.replace(tiny_run.MODEL, mlp_ratio=4.0)  # diffusers has no other ratio


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(tiny_run, "MODEL", WIDE)
    monkeypatch.setitem(FLAVORS, "flux-tiny", WIDE)  # TinyTrainer sets it; put back afterwards


def parameters(trainer):
    return {name: whole(p.detach()) for name, p in trainer.parameters.items()}


def test_a_run_leaves_files_for_others_and_another_starts_from_them(tmp_path):
    trainer = TinyTrainer(tiny_config(tmp_path, *FLAGS, "--checkpoint.export=diffusers,bfl"))
    trainer.train()
    weights = parameters(trainer)
    folder = tmp_path / "run" / "export" / "step-2"
    assert sorted(path.name for path in folder.iterdir()) == ["flux-tiny.safetensors", "transformer"]
    exported = load_file(folder / "flux-tiny.safetensors")
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[name], x.float()) for name, x in weights.items())
    for source in (folder / "transformer", folder / "flux-tiny.safetensors", tmp_path / "run"):
        other = TinyTrainer(
            tiny_config(
                tmp_path, f"--checkpoint.initial_load_path={source}", f"--job.dump_folder={tmp_path}/new"
            )
        )
        start = weights if source.name == "run" else exported
        assert all(torch.equal(x, start[name].double()) for name, x in parameters(other).items())
        average = {name.removeprefix("ema."): whole(x) for name, x in other.ema.tensors().items()}
        assert all(torch.equal(x, start[name].double()) for name, x in average.items())


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
