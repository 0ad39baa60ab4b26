"""FLUX.2's text encoders against transformers' whole models and diffusers' pipelines; every way to fail."""

import json
import pickle
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers.ranks import run_ranks
from helpers.small_llm import load, store
from safetensors.torch import load_file, save_file

from flux_trainer.config.schema import Encoder
from flux_trainer.encoders.bundle import Encoded
from flux_trainer.encoders.chat import CHATS, SYSTEM_MESSAGE, ChatTokenizer
from flux_trainer.encoders.choose import kind_of, text_encoders
from flux_trainer.encoders.llm import LLMEncoder
from flux_trainer.encoders.text import TextEncoders
from flux_trainer.models.configs import Flux2Config
from flux_trainer.models.registry import FLAVORS

ASSETS = Path(__file__).parents[2] / "assets"
CAPTIONS = ["a photo of a red apple [IMG]on a wooden table", "", " two\n\nlines<|im_end|>", "pear " * 200]
CPU = torch.device("cpu")
KINDS = ["flux2-dev", "flux2-klein"]
LENGTH = 160


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> dict[str, Path]:
    """Kind -> folder of its encoder, with the tokenizer beside it."""
    folder = tmp_path_factory.mktemp("llm")
    return {kind: store(folder / kind, kind) for kind in KINDS}


def section(encoder: Path | str, **overrides) -> Encoder:
    settings = {"llm_encoder": str(encoder), "max_llm_encoding_len": LENGTH, "dtype": "float32"}
    return Encoder(**{**settings, **overrides})


@pytest.fixture(scope="module")
def encoders(stored) -> dict[str, LLMEncoder]:
    return {kind: text_encoders(section(stored[kind]), kind, CPU, seed=0) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_hidden_states_of_the_whole_model(encoders, stored, kind):
    encoder = encoders[kind]
    ids = encoder.tokenize(CAPTIONS)
    features = encoder.encode(ids)
    with torch.no_grad():
        whole = load(stored[kind], kind)(
            input_ids=ids["llm"], attention_mask=ids["llm_mask"].long(), output_hidden_states=True
        )
    states = [whole.hidden_states[n] for n in ((10, 20, 30) if kind == "flux2-dev" else (9, 18, 27))]
    expected = torch.stack(states, dim=2).flatten(2)  # [B, L, 3, D] -> [B, L, 3D]
    assert features.txt.shape == (4, LENGTH, 48)
    assert features.vec is None
    torch.testing.assert_close(features.txt, expected, rtol=0, atol=1e-6)
    assert (encoder.txt_dim, encoder.vec_dim) == (48, None)
    assert 0.1 < features.txt.std() < 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_the_pipelines_of_diffusers(encoders, stored, kind):
    from diffusers import Flux2KleinPipeline, Flux2Pipeline
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(stored[kind].parent / "tokenizer")
    model = load(stored[kind], kind)
    embed = {
        "flux2-dev": Flux2Pipeline._get_mistral_3_small_prompt_embeds,
        "flux2-klein": Flux2KleinPipeline._get_qwen3_prompt_embeds,
    }
    with torch.no_grad():
        expected = embed[kind](model, tokenizer, CAPTIONS, max_sequence_length=LENGTH)
    features = encoders[kind].encode(encoders[kind].tokenize(CAPTIONS))
    torch.testing.assert_close(features.txt, expected, rtol=0, atol=1e-6)


def test_chats_in_full():
    """BFL's, to the letter."""
    dev, klein = (CHATS[kind] for kind in KINDS)
    assert dev.before + "CAPTION" + dev.after == (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured "
        "responses focusing on object relationships, object\nattribution and actions without speculation."
        "[/SYSTEM_PROMPT][INST]CAPTION[/INST]"
    )
    assert klein.before + "CAPTION" + klein.after == (
        "<|im_start|>user\nCAPTION<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_chat_template(encoders, stored, kind):
    """Padded at the model's side; a caption that is too long loses its end, and the chat's."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(stored[kind].parent / "tokenizer")
    ids = encoders[kind].tokenize(CAPTIONS)
    pickled = pickle.loads(pickle.dumps(encoders[kind].tokenizers)).tokenize(CAPTIONS)
    assert all(torch.equal(ids[name], pickled[name]) for name in ids)
    assert (ids["llm"].dtype, ids["llm_mask"].dtype) == (torch.int64, torch.bool)
    for i, caption in enumerate(CAPTIONS):
        if kind == "flux2-dev":
            caption = caption.replace("[IMG]", "")
            roles = {"system": SYSTEM_MESSAGE, "user": caption}
            chat = [{"role": r, "content": [{"type": "text", "text": text}]} for r, text in roles.items()]
            options = {"add_generation_prompt": False}
        else:
            chat = [{"role": "user", "content": caption}]
            options = {"add_generation_prompt": True, "enable_thinking": False}
        expected = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options)[
            "input_ids"
        ]
        got, mask = ids["llm"][i], ids["llm_mask"][i]
        assert got[mask].tolist() == expected[:LENGTH]
        assert mask.sum() == min(LENGTH, len(expected))
        assert set(got[~mask].tolist()) <= {tokenizer.pad_token_id}
        if not mask.all():
            assert mask[0 if kind == "flux2-klein" else -1]
            assert not mask[-1 if kind == "flux2-klein" else 0]
    assert ids["llm_mask"][3].all()
    assert len(tokenizer.tokenize(CHATS[kind].before)) < 100  # specials are single tokens


@pytest.mark.parametrize("kind", KINDS)
def test_padding_leaves_the_tokens_alone(encoders, stored, kind):
    """Neither more of it nor other ids in it."""
    encoder = encoders[kind]
    ids = encoder.tokenize(CAPTIONS[:3])
    long = ChatTokenizer(section(stored[kind], max_llm_encoding_len=LENGTH + 40), CHATS[kind])
    longer = long.tokenize(CAPTIONS[:3])
    other = {**ids, "llm": torch.where(ids["llm_mask"], ids["llm"], 77)}
    features = encoder.encode(ids).txt[ids["llm_mask"]]
    torch.testing.assert_close(encoder.encode(longer).txt[longer["llm_mask"]], features, rtol=0, atol=1e-4)
    torch.testing.assert_close(encoder.encode(other).txt[ids["llm_mask"]], features, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_captions_are_the_empty_prompt(encoders, kind):
    encoder = encoders[kind]
    features = encoder.encode(encoder.tokenize(["an apple", "a pear"]))
    empty = encoder.encode(encoder.tokenize([""]))
    dropped = encoder.drop(features, torch.tensor([True, False]), torch.tensor([False, True]))
    torch.testing.assert_close(dropped.txt[0], empty.txt[0])
    torch.testing.assert_close(dropped.txt[1], features.txt[1])
    assert not torch.allclose(features.txt[0], empty.txt[0])
    assert dropped.vec is None


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_built_that_is_not_read(stored, kind):
    encoder = text_encoders(section(stored[kind], dtype="bfloat16"), kind, CPU, seed=0)
    parameters = dict(encoder.model.named_parameters())
    assert len(encoder.model.layers) == (30 if kind == "flux2-dev" else 27)
    assert [name for name in parameters if not name.startswith("layers.")] == ["embed_tokens.weight"]
    assert {p.dtype for p in parameters.values()} == {torch.bfloat16}
    assert {b.dtype for b in encoder.model.buffers()} == {torch.float32}  # frequencies of the rotation
    assert not any(p.requires_grad for p in parameters.values())
    assert not encoder.model.training
    features = encoder.encode(encoder.tokenize(CAPTIONS))
    assert features.txt.dtype == torch.bfloat16
    assert not features.txt.requires_grad


@pytest.mark.parametrize(
    "prefix", ["", "model.", "language_model.", "language_model.model.", "model.language_model."]
)
def test_names_of_all_styles(encoders, stored, tmp_path, prefix):
    """And a file that ends with the last layer that is read, as some have it."""
    config = json.loads((stored["flux2-dev"] / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 30
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {}
    for path in stored["flux2-dev"].glob("*.safetensors"):
        for name, tensor in load_file(path).items():
            if ("layers." in name or "embed_tokens" in name) and "vision" not in name:
                bare = name[name.index("layers." if "layers." in name else "embed_tokens") :]
                if not bare.startswith("layers.30."):
                    weights[prefix + bare] = tensor
    assert len(weights) == 1 + 30 * 9
    save_file(weights, tmp_path / "model.safetensors")
    tokenizer = str(stored["flux2-dev"].parent / "tokenizer")
    encoder = text_encoders(section(tmp_path, llm_tokenizer=tokenizer), "flux2-dev", CPU, seed=0)
    assert torch.equal(encoder.empty.txt, encoders["flux2-dev"].empty.txt)


@pytest.mark.parametrize("kind", KINDS)
def test_random_init_needs_the_config_only_and_is_keyed(stored, tmp_path, kind):
    shutil.copy(stored[kind] / "config.json", tmp_path)
    settings = section(tmp_path, llm_tokenizer=str(stored[kind].parent / "tokenizer"), random_init=True)
    state = torch.get_rng_state()
    first = text_encoders(settings, kind, CPU, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    again, other = (text_encoders(settings, kind, CPU, seed=seed) for seed in (0, 1))
    features, same, different = (e.encode(e.tokenize(CAPTIONS[:2])).txt for e in (first, again, other))
    assert torch.equal(features, same)
    assert not torch.allclose(features, different)
    assert first.model.embed_tokens.weight.std().item() == pytest.approx(1, rel=0.05)
    assert features[0].sub(features[1]).std() > 0.2  # captions are told apart


def test_another_models_encoder_is_refused(stored):
    with pytest.raises(ValueError, match=r"is of type 'qwen3', but this FLUX\.2 reads Mistral-Small-3\.2"):
        text_encoders(section(stored["flux2-klein"]), "flux2-dev", CPU, seed=0)
    with pytest.raises(ValueError, match=r"is of type 'mistral3', but this FLUX\.2 reads Qwen3"):
        text_encoders(section(stored["flux2-dev"]), "flux2-klein", CPU, seed=0)
    other = str(stored["flux2-klein"].parent / "tokenizer")
    with pytest.raises(
        ValueError, match=r"is not Mistral-Small-3\.2's: it has no token <s> \[SYSTEM_PROMPT\]"
    ):
        text_encoders(section(stored["flux2-dev"], llm_tokenizer=other), "flux2-dev", CPU, seed=0)


def test_another_width_is_refused(stored):
    settings = section(stored["flux2-klein"])
    encoder = text_encoders(settings, "flux2-klein", CPU, 0, context_in_dim=48)
    assert encoder.txt_dim == 48
    with pytest.raises(ValueError, match=r"gives 3 x 16 = 48 features, but the transformer takes 7680"):
        text_encoders(settings, "flux2-klein", CPU, 0, context_in_dim=7680)


def test_kinds_of_the_flavors():
    dev = Flux2Config(128, 15_360, 6144, 48, 8, 48, (32, 32, 32, 32), 2000, 3.0, use_guidance_embed=True)
    assert kind_of(dev) == "flux2-dev"
    assert kind_of(replace(dev, use_guidance_embed=False)) == "flux2-klein"
    assert kind_of(FLAVORS["flux-dev"]) == "flux1"


def test_committed_random_encoders_tell_captions_apart():
    """With the committed tokenizer; the features are those of flux2-tiny and of Qwen3-4B in number."""
    for name, features in (("qwen3-tiny", 768), ("qwen3-flux2-debug", 7680)):
        settings = section(
            ASSETS / "encoders" / name,
            llm_tokenizer=str(ASSETS / "tokenizers" / "qwen3-tiny"),
            max_llm_encoding_len=24,
            random_init=True,
        )
        encoder = text_encoders(settings, "flux2-klein", CPU, 0, context_in_dim=features)
        encoded = encoder.encode(encoder.tokenize(["red apple", "green pear", "locomotive", "two dogs"]))
        for state in encoded.txt[:, :16].chunk(3, dim=-1):
            assert 1 < state.std() < 10
            assert state.var(dim=0).sum() / state.pow(2).mean(dim=0).sum() > 0.2  # over captions


def test_encoders_that_do_not_fit_are_refused(stored, tmp_path):
    folder = Path(shutil.copytree(stored["flux2-klein"], tmp_path / "text_encoder"))
    settings = section(folder, llm_tokenizer=str(stored["flux2-klein"].parent / "tokenizer"))
    values = json.loads((folder / "config.json").read_text())
    for change, sentence in (
        (
            {"num_hidden_layers": 26, "layer_types": ["full_attention"] * 26},
            r"has 26 layers, but .* 9, 18, 27",
        ),
        ({"intermediate_size": 32}, r"gate_proj.* is \[24, 16\], but by config\.json beside it \[32, 16\]"),
        ({"vocab_size": 100}, "do not belong together"),
    ):
        (folder / "config.json").write_text(json.dumps({**values, **change}))
        with pytest.raises(ValueError, match=sentence):
            text_encoders(settings, "flux2-klein", CPU, seed=0)


def test_missing_files_are_named(stored, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"encoder\.llm_encoder is empty.*hf download .*FLUX\.2-klein"
    ):
        text_encoders(section(""), "flux2-klein", CPU, seed=0)
    (tmp_path / "tekken.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"No tokenizer\.json of the LLM.*tekken\.json is not read"):
        text_encoders(section(stored["flux2-dev"], llm_tokenizer=str(tmp_path)), "flux2-dev", CPU, seed=0)


def test_flux1_keeps_its_encoders():
    settings = Encoder(
        **{f"{name}_encoder": str(ASSETS / "encoders" / f"{name}-tiny") for name in ("t5", "clip")},
        **{f"{name}_tokenizer": str(ASSETS / "tokenizers" / name) for name in ("t5", "clip")},
        random_init=True,
    )
    assert isinstance(text_encoders(settings, "flux1", CPU, seed=0), TextEncoders)


def test_samples_without_a_vector():
    one, two = (Encoded(torch.full((1, 2), n), torch.full((1, 3), n), None) for n in (1.0, 2.0))
    both = Encoded.cat([one, two])
    assert both.latents.tolist() == [[1, 1], [2, 2]]
    assert both.txt.shape == (2, 3)
    assert both.vec is both.rows(slice(1)).vec is None
    assert torch.equal(both.rows(slice(1, 2)).txt, two.txt)


def sharded_features(kind: str, settings: dict) -> dict:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor

    from flux_trainer.parallel.fsdp import shard

    mesh = init_device_mesh("cpu", (2,))
    encoder = text_encoders(Encoder(**settings), kind, CPU, 0, partial(shard, mesh=mesh))
    features = encoder.encode(encoder.tokenize(CAPTIONS))
    parameters = list(encoder.model.parameters())
    return {
        "txt": features.txt,
        "sharded after a forward": all(isinstance(p, DTensor) for p in parameters),
        "share": sum(p.to_local().numel() for p in parameters) / sum(p.numel() for p in parameters),
    }


def sharded_all(cases: list[tuple[str, dict]]) -> list[dict]:
    return [sharded_features(*case) for case in cases]


@pytest.mark.distributed
def test_sharded_equals_whole(stored):
    """Loaded and random weights; in one start of the processes, which costs most."""
    cases = [
        ("flux2-dev", section(stored["flux2-dev"])),
        ("flux2-klein", section(stored["flux2-klein"], random_init=True)),
    ]
    packed = [(kind, settings.model_dump()) for kind, settings in cases]
    for results in run_ranks(2, sharded_all, packed):
        for (kind, settings), result in zip(cases, results, strict=True):
            whole = text_encoders(settings, kind, CPU, seed=0)
            features = whole.encode(whole.tokenize(CAPTIONS))
            torch.testing.assert_close(result["txt"], features.txt, rtol=0, atol=1e-6)
            assert result["sharded after a forward"]
            assert result["share"] == pytest.approx(0.5, abs=0.01)
