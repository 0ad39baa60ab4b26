"""WEIGHTS on a command line: their flavor, what lies beside them, and that the loader finds the same."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from helpers import weights_files
from helpers.headers import shapes_of, write_header

from flux_trainer.cli.weights import find_weights
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.toml import to_toml
from flux_trainer.hub.convert import convert
from flux_trainer.hub.detect import locate
from flux_trainer.hub.errors import WeightsError
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.registry import FLAVORS


def settings(path: Path) -> dict[str, object]:
    return {".".join(a.path): a.value for a in find_weights(str(path)).settings}


@pytest.fixture
def golden_flavor(monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-debug", weights_files.CONFIG)


@pytest.mark.parametrize("kind", [k for k in weights_files.ALL if k not in ("torchtitan", "own")])
def test_the_flavor_is_found_and_the_loader_opens_the_same(tmp_path, golden_flavor, kind):
    path = weights_files.ALL[kind](tmp_path)
    weights = find_weights(str(path))
    assert weights.flavors == ["flux-debug"]
    assert locate(weights.path) == locate(path)
    open_weights(weights.path, config=FLAVORS[weights.flavors[0]])


@pytest.mark.parametrize("to", ["bfl", "diffusers", "dcp"])
def test_files_of_this_trainer_say_their_model(tmp_path, golden_flavor, to):
    """Rotary axes, which no shape shows, are in the note or config.json."""
    path = tmp_path / ("out.safetensors" if to == "bfl" else "out")
    convert(open_weights(weights_files.bfl(tmp_path), config=weights_files.CONFIG), path, to)
    assert find_weights(str(path)).flavors == ["flux-debug"]
    axes = weights_files.CONFIG.axes_dim
    assert axes != axes[::-1]
    FLAVORS["flux-debug"] = replace(weights_files.CONFIG, axes_dim=axes[::-1])
    with pytest.raises(ConfigError, match=r"this is FLUX\.1 with .*hidden_size.*which is no flavor"):
        find_weights(str(path))


def test_an_index_and_files_of_a_checkpoint_are_taken_too(tmp_path, golden_flavor):
    [index] = weights_files.sharded(tmp_path).glob("*.index.json")
    assert find_weights(str(index)).flavors == ["flux-debug"]
    assert locate(find_weights(str(index)).path) == locate(index)
    titan = weights_files.torchtitan(tmp_path)
    for path in (titan, titan / "step-5", titan / "step-5/.metadata", next(titan.glob("*/*.distcp"))):
        weights = find_weights(str(path))
        assert (weights.path, weights.flavors, weights.settings) == (titan / "step-5", [], [])
        assert locate(weights.path) == locate(path)


def test_a_run_gives_its_settings_to_all_that_lies_in_it(tmp_path, golden_flavor):
    run = weights_files.own(tmp_path)
    config = JobConfig().model_copy(
        update={"model": JobConfig().model.model_copy(update={"flavor": "flux-debug"})}
    )
    (run / "config.toml").write_text(to_toml(config))
    step = run / "checkpoint/step-10"
    export = run / "export/step-10"
    source = open_weights(weights_files.bfl(tmp_path), config=weights_files.CONFIG)
    convert(source, export / "transformer", "diffusers")
    convert(source, export / "bfl.safetensors", "bfl")
    for path in (run, step, export / "transformer", export / "bfl.safetensors"):
        weights = find_weights(str(path))
        assert locate(weights.path) == (locate(step if path == run else path))
        assert settings(path)["job.dump_folder"] == str(run)
        assert settings(path)["model.flavor"] == "flux-debug"
    # What lies there by chance is its own.
    write_header(run / "flux1-dev.safetensors", shapes_of("flux-dev", "bfl"))
    assert settings(run / "flux1-dev.safetensors") == {
        "model.flavor": "flux-dev",
        "encoder.max_t5_encoding_len": 512,
    }


FLUX1 = {"t5_encoder": "text_encoder_2", "clip_encoder": "text_encoder", "t5_tokenizer": "tokenizer_2",
         "clip_tokenizer": "tokenizer"}  # fmt: skip
FLUX2 = {"llm_encoder": "text_encoder", "llm_tokenizer": "tokenizer"}


@pytest.mark.parametrize(
    ("flavor", "parts"), [("flux-dev", FLUX1), ("flux2-dev", FLUX2), ("flux2-klein-4b", FLUX2)]
)
def test_what_lies_beside_published_files(tmp_path, flavor, parts):
    for part in {*FLUX1.values()}:
        (tmp_path / part).mkdir()
    (tmp_path / "vae").mkdir()
    write_header(tmp_path / "model.safetensors", shapes_of(flavor, "bfl"))
    expected = {f"encoder.{key}": str(tmp_path / part) for key, part in parts.items()}
    expected["model.flavor"] = flavor
    if parts is FLUX1:
        expected["encoder.max_t5_encoding_len"] = 512
    assert settings(tmp_path / "model.safetensors") == expected | {
        "encoder.autoencoder_path": str(tmp_path / "vae")
    }
    (tmp_path / "ae.safetensors").write_text("")
    found = settings(tmp_path / "model.safetensors")
    assert found["encoder.autoencoder_path"] == str(tmp_path / "ae.safetensors")


@pytest.mark.parametrize(
    ("flavor", "values"),
    [
        ("flux-dev", {"guidance_embeds": True}),
        ("flux-schnell", {}),
        ("flux2-dev", {}),
        (
            "flux2-klein-4b",
            {
                "num_layers": 5,
                "num_single_layers": 20,
                "num_attention_heads": 24,
                "joint_attention_dim": 7680,
                "guidance_embeds": False,
            },
        ),
    ],
)
def test_what_diffusers_writes_is_known(tmp_path, flavor, values):
    """Its own models, with config.json and without."""
    diffusers = pytest.importorskip("diffusers")
    name = "Flux2Transformer2DModel" if flavor.startswith("flux2") else "FluxTransformer2DModel"
    with torch.device("meta"):
        model = getattr(diffusers, name)(**values)
    folder = tmp_path / "pipeline"
    shapes = {key: tuple(x.shape) for key, x in model.state_dict().items()}
    write_header(folder / "transformer/diffusion_pytorch_model.safetensors", shapes)
    config = folder / "transformer/config.json"
    config.write_text(model.to_json_string())
    (folder / "model_index.json").write_text("{}")
    assert find_weights(str(folder)).flavors == [flavor]
    stated = json.loads(config.read_text())
    config.write_text(json.dumps(stated | {"axes_dims_rope": [2, *stated["axes_dims_rope"][1:]]}))
    with pytest.raises(ConfigError, match=r"this is FLUX\.[12] with hidden_size .*, which is no flavor"):
        find_weights(str(folder))
    config.unlink()
    assert find_weights(str(folder)).flavors == [flavor]


def test_what_is_no_transformer_is_refused(tmp_path):
    write_header(
        tmp_path / "vae/diffusion_pytorch_model.safetensors", {"encoder.conv_in.weight": (128, 3, 3, 3)}
    )
    (tmp_path / "vae/config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="these are not the weights of a FLUX transformer"):
        find_weights(str(tmp_path / "vae"))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match="has no weights of a transformer"):
        find_weights(str(tmp_path))


@pytest.mark.parametrize(
    ("flavor", "channels", "told"),
    [
        (
            "flux-dev",
            384,
            r"\(384, not 64\), as FLUX\.1-Fill does, which is not supported; there are ",
        ),
        ("flux-dev", 128, r"\(128, not 64\), as FLUX\.1-Depth or FLUX\.1-Canny does"),
        ("flux2-klein-4b", 256, r"\(256, not 128\); there are flux-dev,"),
    ],
)
def test_what_tells_a_variant_from_the_nearest_flavor(tmp_path, flavor, channels, told):
    shapes = shapes_of(flavor, "bfl")
    shapes["img_in.weight"] = (shapes["img_in.weight"][0], channels)
    write_header(tmp_path / "a.safetensors", shapes)
    with pytest.raises(ConfigError, match=rf"differs from {flavor} in in_channels {told}"):
        find_weights(str(tmp_path / "a.safetensors"))


def test_flux1s_blocks_without_its_vector_are_no_flux2(tmp_path):
    """As Chroma has them."""
    shapes = {n: x for n, x in shapes_of("flux-tiny", "bfl").items() if "vector_in" not in n}
    write_header(tmp_path / "a.safetensors", shapes)
    with pytest.raises(ConfigError, match="these are not the weights of a FLUX transformer"):
        find_weights(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["a.sft", "A.SAFETENSORS", "blob"])
def test_safetensors_files_of_any_name(tmp_path, name):
    write_header(tmp_path / name, shapes_of("flux-tiny", "bfl"))
    assert find_weights(str(tmp_path / name)).flavors == ["flux-tiny"]


def test_damage_is_a_sentence(tmp_path):
    for name, data in {
        "cut": b"\xff" * 20,
        "short": b"\xff",
        "list": (2).to_bytes(8, "little") + b"[]",
        "text": (2).to_bytes(8, "little") + b"{x",
    }.items():
        (tmp_path / f"{name}.safetensors").write_bytes(data)
        with pytest.raises(WeightsError, match=rf"{name}\.safetensors is not a readable safetensors file"):
            find_weights(str(tmp_path / f"{name}.safetensors"))
    write_header(tmp_path / "note.safetensors", shapes_of("flux-tiny", "bfl"), flux_trainer="x")
    assert find_weights(str(tmp_path / "note.safetensors")).flavors == ["flux-tiny"]
    (tmp_path / "a.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(WeightsError, match=r"files that are not beside it: gone\.safetensors"):
        find_weights(str(tmp_path / "a.safetensors.index.json"))


def test_a_config_of_something_else_beside_a_file_is_none_of_its_own(tmp_path):
    write_header(tmp_path / "a.safetensors", shapes_of("flux-tiny", "bfl"))
    (tmp_path / "config.json").write_text('{"model_type": "t5", "d_model": 4096}')
    assert find_weights(str(tmp_path / "a.safetensors")).flavors == ["flux-tiny"]


def test_folders_with_several_files_want_one_named(tmp_path):
    for name in ("a", "b"):
        write_header(tmp_path / f"{name}.safetensors", shapes_of("flux-tiny", "bfl"))
    with pytest.raises(WeightsError, match=r"has a\.safetensors, b\.safetensors: name one of them"):
        find_weights(str(tmp_path))
    with pytest.raises(WeightsError, match="name one of them"):
        locate(tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "a.fp16.safetensors")
    assert locate(find_weights(str(tmp_path)).path) == locate(tmp_path)


def test_the_loader_fills_what_was_found(tmp_path, golden_flavor):
    weights = find_weights(str(weights_files.comfy(tmp_path)))
    parameters = {name: torch.empty_like(value) for name, value in weights_files.native().items()}
    load_weights(weights.path, parameters, config=FLAVORS[weights.flavors[0]])
    assert asdict(FLAVORS[weights.flavors[0]]) == asdict(weights_files.CONFIG)
    assert all(torch.equal(parameters[name], value) for name, value in weights_files.native().items())
