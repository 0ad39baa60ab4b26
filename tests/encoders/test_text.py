"""The text encoders against plain transformers (and diffusers) on the same weights, and every way to fail."""

import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from safetensors.torch import load_file, save_file

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.text import TextEncoders
from flux_trainer.flow.rng import Purpose, uniform

ASSETS = Path(__file__).parents[2] / "assets"
CAPTIONS = ["a photo of a red apple on a wooden table", "", "syringe; doctor, flu, medicine"]
CPU = torch.device("cpu")


def section(stored: Path, **overrides) -> Encoder:
    settings = {
        "t5_encoder": str(stored / "t5"),
        "clip_encoder": str(stored / "clip"),
        "t5_tokenizer": str(ASSETS / "tokenizers" / "t5"),
        "clip_tokenizer": str(ASSETS / "tokenizers" / "clip"),
        "max_t5_encoding_len": 24,
        "dtype": "float32",
    }
    return Encoder(**{**settings, **overrides})


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    """Encoders as transformers saves them: T5 in several files, CLIP as a whole model with its image half."""
    from transformers import CLIPConfig, CLIPModel, T5Config, T5EncoderModel

    folder = tmp_path_factory.mktemp("stored")
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=32128,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    clip = CLIPModel(
        CLIPConfig(
            text_config={**small, "vocab_size": 49408, "eos_token_id": 49407},
            vision_config={**small, "image_size": 8, "patch_size": 4},
        )
    )
    for parameter in [*t5.parameters(), *clip.parameters()]:
        torch.nn.init.normal_(parameter, std=0.5)
    t5.save_pretrained(folder / "t5", max_shard_size="1MB")
    clip.save_pretrained(folder / "clip")
    assert len(list((folder / "t5").glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def encoders(stored) -> TextEncoders:
    return TextEncoders(section(stored), CPU, seed=0)


def test_features_are_those_of_transformers(encoders, stored):
    from transformers import CLIPTextModel, T5EncoderModel

    ids = encoders.tokenize(CAPTIONS)
    features = encoders.encode(ids)
    t5 = T5EncoderModel.from_pretrained(stored / "t5").eval()
    clip = CLIPTextModel.from_pretrained(stored / "clip").eval()
    with torch.no_grad():
        txt = t5(ids["t5"], attention_mask=None).last_hidden_state
        vec = clip(ids["clip"], attention_mask=None).pooler_output
    assert features.txt.shape == (3, 24, 16)
    assert features.vec.shape == (3, 16)
    torch.testing.assert_close(features.txt, txt, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.vec, vec, rtol=0, atol=1e-6)
    assert (encoders.txt_dim, encoders.vec_dim) == (16, 16)


def test_frozen_and_in_the_wanted_dtype(stored):
    encoders = TextEncoders(section(stored, dtype="bfloat16"), CPU, seed=0)
    parameters = [*encoders.t5.parameters(), *encoders.clip.parameters()]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert not any(p.requires_grad for p in parameters)
    assert not encoders.t5.training
    assert not encoders.clip.training
    assert encoders.t5.shared.weight is encoders.t5.encoder.embed_tokens.weight  # one copy, not two
    features = encoders.encode(encoders.tokenize(CAPTIONS))
    assert features.txt.dtype == features.vec.dtype == torch.bfloat16
    assert not features.txt.requires_grad


def test_dropped_captions_are_the_empty_prompt(encoders):
    features = encoders.encode(encoders.tokenize(["an apple", "a pear", "a plum"]))
    empty = encoders.encode(encoders.tokenize([""]))
    drop_t5, drop_clip = torch.tensor([True, False, False]), torch.tensor([True, True, False])
    dropped = encoders.drop(features, drop_t5, drop_clip)
    assert empty.txt.abs().min() > 0  # nothing like zeros
    assert empty.vec.abs().min() > 0
    for i in range(3):
        torch.testing.assert_close(dropped.txt[i], empty.txt[0] if drop_t5[i] else features.txt[i])
        torch.testing.assert_close(dropped.vec[i], empty.vec[0] if drop_clip[i] else features.vec[i])
    assert not torch.allclose(features.txt[0], empty.txt[0])


@pytest.fixture
def configs(stored, tmp_path) -> Path:
    """The same encoders without their weights."""
    for name in ("t5", "clip"):
        (tmp_path / name).mkdir()
        shutil.copy(stored / name / "config.json", tmp_path / name)
    return tmp_path


def test_random_init_needs_configs_only_and_is_keyed(configs):
    state = torch.get_rng_state()
    first = TextEncoders(section(configs, random_init=True), CPU, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    features = first.encode(first.tokenize(CAPTIONS))
    torch.manual_seed(1)
    again = TextEncoders(section(configs, random_init=True), CPU, seed=0)
    other = TextEncoders(section(configs, random_init=True), CPU, seed=1)
    same, different = (e.encode(e.tokenize(CAPTIONS)) for e in (again, other))
    assert torch.equal(features.txt, same.txt)
    assert torch.equal(features.vec, same.vec)
    assert not torch.allclose(features.txt, different.txt)
    assert not torch.allclose(features.vec, different.vec)


def test_random_weights_are_pinned(configs):
    """They are part of every run on random encoders: no release, here or of transformers, may move them."""
    encoders = TextEncoders(section(configs, random_init=True), CPU, seed=0)
    key = 0x2E2A8CEA  # crc32 of "shared.weight"
    unit = uniform(0, Purpose.ENCODER, torch.tensor([key]), (32128, 16), torch.float64)[0]
    torch.testing.assert_close(encoders.t5.shared.weight.double(), (unit - 0.5) * 12**0.5, rtol=0, atol=1e-6)
    weights = dict(encoders.t5.named_parameters())
    assert weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"].std() == pytest.approx(
        24**-0.5, rel=0.1
    )
    assert weights["encoder.block.1.layer.0.SelfAttention.q.weight"].std() == pytest.approx(
        128**-0.5, rel=0.1
    )
    assert weights["encoder.final_layer_norm.weight"].unique().tolist() == [1.0]


def test_committed_random_encoders_tell_captions_apart():
    settings = section(ASSETS / "encoders", random_init=True).model_copy(
        update={
            "t5_encoder": str(ASSETS / "encoders" / "t5-tiny"),
            "clip_encoder": str(ASSETS / "encoders" / "clip-tiny"),
        }
    )
    encoders = TextEncoders(settings, CPU, seed=0)
    features = encoders.encode(encoders.tokenize(["red apple", "green pear", "locomotive", "two dogs"]))
    assert 0.5 < features.txt.std() < 2
    assert 0.5 < features.vec.std() < 2
    for feature in (features.txt[:, :4], features.vec):  # variance over captions, as a share of the whole
        assert feature.var(dim=0).sum() / feature.pow(2).mean(dim=0).sum() > 0.2


def test_a_pickle_is_refused(stored, tmp_path):
    shutil.copy(stored / "t5" / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'echo'\ntR.")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle") as error:
        TextEncoders(section(stored, t5_encoder=str(tmp_path)), CPU, seed=0)
    assert "encoder.t5_encoder" in str(error.value)
    assert "hf download" in str(error.value)


def test_quantised_weights_are_refused_and_a_cast_is_read(stored, tmp_path):
    folder = copied(stored, tmp_path, "clip")
    weights = load_file(folder / "model.safetensors")
    linear = next(name for name in weights if name.endswith("fc1.weight"))
    weights[linear] = weights[linear].to(torch.float8_e4m3fn)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    TextEncoders(section(stored, clip_encoder=str(folder)), CPU, seed=0)
    weights[linear.replace(".weight", ".scale_weight")] = torch.ones(())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    told = r"^encoder\.clip_encoder = .*quantised weights \(scaled float8: .*hf download"
    with pytest.raises(ValueError, match=told):
        TextEncoders(section(stored, clip_encoder=str(folder)), CPU, seed=0)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "clip.sft"])
def test_a_variant_is_read(name, stored, tmp_path):
    expected = TextEncoders(section(stored), CPU, seed=0).empty
    folder = copied(stored, tmp_path, "clip")
    (folder / "model.safetensors").rename(folder / name)
    empty = TextEncoders(section(stored, clip_encoder=str(folder)), CPU, seed=0).empty
    assert torch.equal(empty.vec, expected.vec)


def test_a_sharded_variant_is_read(stored, tmp_path):
    expected = TextEncoders(section(stored), CPU, seed=0).empty
    folder = copied(stored, tmp_path, "t5")
    index = folder / "model.safetensors.index.json"
    index.rename(folder / "model.safetensors.index.fp16.json")
    empty = TextEncoders(section(stored, t5_encoder=str(folder)), CPU, seed=0).empty
    assert torch.equal(empty.txt, expected.txt)


def copied(stored: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(stored / name, tmp_path / name))


def test_missing_files_are_named(stored, tmp_path):
    folder = copied(stored, tmp_path, "t5")
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    named = rf"model\.safetensors\.index\.json names files that are not beside it: {shard.name}"
    with pytest.raises(ValueError, match=named):
        TextEncoders(section(stored, t5_encoder=str(folder)), CPU, seed=0)
    folder = copied(stored, tmp_path, "clip")
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"No config\.json in .*encoder\.clip_encoder.*hf download"):
        TextEncoders(section(stored, clip_encoder=str(folder)), CPU, seed=0)


def test_weights_that_do_not_fit_are_refused(stored, tmp_path):
    folder = copied(stored, tmp_path, "t5")
    config = folder / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"d_ff": 24', '"d_ff": 32'))
    with pytest.raises(
        ValueError, match=r"wi_0\.weight.* is \[24, 16\], but by config\.json beside it \[32, 16\]"
    ):
        TextEncoders(section(stored, t5_encoder=str(folder)), CPU, seed=0)
    config.write_text(text.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(ValueError, match=r"has no tensor 'encoder\.block\.2\."):
        TextEncoders(section(stored, t5_encoder=str(folder)), CPU, seed=0)
    config.write_text(text.replace('"vocab_size": 32128', '"vocab_size": 1000'))
    with pytest.raises(ValueError, match="do not belong together"):
        TextEncoders(section(stored, t5_encoder=str(folder)), CPU, seed=0)


def test_hub_ids_are_fetched_and_failures_explained(stored, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = {}

    def fetch(repo, allow_patterns):
        asked[repo] = allow_patterns
        if repo == "owner/none":
            raise LocalEntryNotFoundError("no network")
        return str(stored / "t5")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    encoders = TextEncoders(section(stored).model_copy(update={"t5_encoder": "owner/t5"}), CPU, seed=0)
    assert encoders.txt_dim == 16
    assert "model.safetensors" in asked["owner/t5"]
    assert not any(".bin" in pattern or ".py" in pattern for pattern in asked["owner/t5"])
    with pytest.raises(FileNotFoundError) as error:
        TextEncoders(section(stored).model_copy(update={"t5_encoder": "owner/none"}), CPU, seed=0)
    for part in (
        "encoder.t5_encoder",
        "owner/none",
        str(Path.cwd() / "owner" / "none"),
        "no network",
        "hf download",
    ):
        assert part in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"no folder .*/assets/none/t5\. Give"):
        TextEncoders(section(stored).model_copy(update={"t5_encoder": "assets/none/t5"}), CPU, seed=0)


def test_a_file_in_place_of_a_folder_is_named(stored):
    file = stored / "clip" / "model.safetensors"
    with pytest.raises(FileNotFoundError, match=r"which is a file: name the folder that holds it"):
        TextEncoders(section(stored, clip_encoder=str(file)), CPU, seed=0)


def sharded_features(settings: dict) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from flux_trainer.parallel.fsdp import shard

    mesh = init_device_mesh("cpu", (2,))
    encoders = TextEncoders(Encoder(**settings), CPU, 0, partial(shard, mesh=mesh))
    features = encoders.encode(encoders.tokenize(CAPTIONS))
    parameters = list(encoders.t5.parameters())
    return {
        "txt": features.txt,
        "vec": features.vec,
        "sharded after a forward": all(isinstance(p, DTensor) for p in parameters),
        "elements": sum(p.to_local().numel() for p in parameters),
        "all elements": sum(p.numel() for p in parameters),
    }


def sharded_both(*settings: dict) -> list[dict]:
    return [sharded_features(one) for one in settings]


@pytest.mark.distributed
def test_sharded_t5_equals_whole_t5(stored):
    """Loaded and random weights; in one start of the processes, which costs most."""
    both = [section(stored, random_init=random_init) for random_init in (False, True)]
    for results in run_ranks(2, sharded_both, *(settings.model_dump() for settings in both)):
        for settings, result in zip(both, results, strict=True):
            whole = TextEncoders(settings, CPU, seed=0)
            features = whole.encode(whole.tokenize(CAPTIONS))
            torch.testing.assert_close(result["txt"], features.txt, rtol=0, atol=1e-6)
            torch.testing.assert_close(result["vec"], features.vec, rtol=0, atol=1e-6)
            assert result["sharded after a forward"]
            assert result["elements"] == result["all elements"] // 2


@pytest.mark.slow
def test_features_are_those_of_the_flux_pipeline_of_diffusers(encoders, stored):
    from diffusers import FluxPipeline
    from transformers import CLIPTextModel, T5EncoderModel

    pipeline = FluxPipeline(
        scheduler=None,
        vae=None,
        text_encoder=CLIPTextModel.from_pretrained(stored / "clip").eval(),
        tokenizer=encoders.tokenizers.clip,
        text_encoder_2=T5EncoderModel.from_pretrained(stored / "t5").eval(),
        tokenizer_2=encoders.tokenizers.t5,
        transformer=None,
    )
    with torch.no_grad():
        txt, vec, _ = pipeline.encode_prompt(CAPTIONS, None, device=CPU, max_sequence_length=24)
    features = encoders.encode(encoders.tokenize(CAPTIONS))
    torch.testing.assert_close(features.txt, txt, rtol=0, atol=1e-6)
    torch.testing.assert_close(features.vec, vec, rtol=0, atol=1e-6)
