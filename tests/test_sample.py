"""The sampler: BFL's trajectory, diffusers' pipeline, and an even and complete division of the work."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from flux_trainer.config.pictures import Request
from flux_trainer.encoders.text import TextFeatures
from flux_trainer.flow import rng
from flux_trainer.flow.euler import euler
from flux_trainer.flow.latents import FLUX1
from flux_trainer.flow.timesteps import MU, schedule
from flux_trainer.models.configs import Flux1Config, Flux2Config
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.apply import Parallel
from flux_trainer.parallel.mesh import DataGroup
from flux_trainer.runtime.dist import World
from flux_trainer.sample import denoise, encode_prompts, guided, prompts_of, share_out
from flux_trainer.velocity import Velocity

GOLDEN = Path(__file__).parent / "golden"
CPU = torch.device("cpu")
BASE = Request("a", width=96, height=64, steps=8, guidance=3.5, cfg_scale=1.0, seed=5)


def golden_velocity(case: str, kind) -> Velocity:
    config = kind(**json.loads((GOLDEN / case / "config.json").read_text())["bfl"])
    model = model_class(config)(config)
    model.load_state_dict(load_file(GOLDEN / case / "weights_bfl.safetensors"), strict=True)
    return Velocity(Parallel([model], {}, None, None), config, CPU)


@pytest.fixture(scope="module")
def velocity() -> Velocity:
    return golden_velocity("flux1_A", Flux1Config)


@pytest.mark.usefixtures("recorded_frequencies")
@pytest.mark.parametrize(("case", "kind"), [("flux1_A", Flux1Config), ("flux2_C", Flux2Config)])
def test_golden_trajectory(case, kind):
    """Each step's input, time and prediction, and where it ends, as BFL's."""
    velocity, golden = golden_velocity(case, kind), load_file(GOLDEN / f"sampling/{case}.safetensors")
    noise, pooled, space = golden["in.noise_latents"], golden.get("in.y"), velocity.space
    features = {
        text: TextFeatures(golden["in.txt"][i], None if pooled is None else pooled[i])
        for i, text in enumerate(["a", "b"])
    }
    batch = [replace(BASE, prompt=text, guidance=golden["guidance"].item()) for text in features]
    seen = []

    def predict(x, t, *others):
        v = velocity(x, t, *others)
        seen.append({"model_in": space.pack(x), "t": t, "pred": space.pack(v)})
        return v

    times = golden["timesteps"].tolist()
    ours = schedule(4, MU[velocity.config.family](space.pack(noise).shape[1], 4))
    assert ours == pytest.approx(times, abs=2e-7)  # which moves a prediction by up to 1e-4
    out = euler(guided(batch, features, predict, CPU, torch.float32), noise, times)
    for step, ours in enumerate(seen):
        for key, value in ours.items():
            torch.testing.assert_close(value, golden[f"plain.step{step}.{key}"], atol=2e-5, rtol=0)
    torch.testing.assert_close(out, golden["out_unpacked"], atol=2e-5, rtol=0)


@pytest.mark.usefixtures("recorded_frequencies")
@pytest.mark.parametrize(
    ("case", "kind", "names", "sizes"),
    [
        ("flux1_A", Flux1Config, ("in.cond_seq", "out_with_cond_seq"), [(4, 6)]),
        ("flux2_C", Flux2Config, ("in.ref_tokens", "out_ref"), [(2, 3), (1, 4)]),
    ],
)
def test_golden_trajectory_with_references(case, kind, names, sizes):
    """BFL's end point, given the latents whose tokens BFL's model had."""
    velocity, golden = golden_velocity(case, kind), load_file(GOLDEN / f"sampling/{case}.safetensors")
    space, (tokens, end) = velocity.space, names
    counts = [(h // space.patch) * (w // space.patch) for h, w in sizes]
    shown = {}
    for i, text in enumerate("ab"):
        parts = golden[tokens][i : i + 1].split(counts, dim=1)
        shown[(text,)] = [space.unpack(x, *hw)[0] for x, hw in zip(parts, sizes, strict=True)]
    pooled = golden.get("in.y")
    features = {
        text: TextFeatures(golden["in.txt"][i], None if pooled is None else pooled[i])
        for i, text in enumerate("ab")
    }
    guidance = golden["guidance"].item()
    batch = [replace(BASE, prompt=text, guidance=guidance, references=(text,)) for text in features]
    noise = golden["in.noise_latents"]
    with torch.no_grad():
        references = replace_channels(space, noise).references([shown[r.references] for r in batch], noise)
        step = guided(batch, features, velocity, CPU, torch.float32, references)
        out = euler(step, noise, golden["timesteps"].tolist())
    torch.testing.assert_close(space.pack(out), golden[end], atol=2e-5, rtol=0)


def replace_channels(space, latents):
    """The family's space, with as many channels as the small model's latents have."""
    return replace(space, channels=latents.shape[1])


@pytest.fixture(scope="module")
def pipeline():
    """diffusers' own, with the same weights by its own names."""
    diffusers = pytest.importorskip("diffusers")
    config = json.loads((GOLDEN / "flux1_A/config.json").read_text())["diffusers"]
    transformer = diffusers.FluxTransformer2DModel(**config)
    transformer.load_state_dict(load_file(GOLDEN / "flux1_A/weights_diffusers.safetensors"), strict=True)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15,
        num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True,
    )  # fmt: skip
    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.FluxPipeline(transformer=transformer, scheduler=scheduler, **empty)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def conditions(seed: int) -> dict[str, TextFeatures]:
    draws = torch.Generator().manual_seed(seed)
    names = ("a", "b", "", "ugly")
    return {
        name: TextFeatures(*(torch.randn(s, generator=draws) for s in ((7, 40), (32,)))) for name in names
    }


@pytest.mark.usefixtures("float32_frequencies")
@pytest.mark.parametrize(("size", "cfg_scale"), [((96, 64), 1.0), ((96, 64), 4.0), ((160, 256), 1.0)])
def test_final_latents_are_those_of_the_flux_pipeline(velocity, pipeline, size, cfg_scale):
    """8 steps in float32, with distilled guidance, and true classifier-free guidance beside it."""
    width, height = size
    features = conditions(0)
    batch = [
        replace(
            BASE, prompt=p, seed=s, width=width, height=height, cfg_scale=cfg_scale, negative_prompt="ugly"
        )
        for p, s in [("a", 5), ("b", 6)]
    ]
    ours = denoise(batch, features, velocity, FLUX1, MU["flux1"], CPU, torch.float32)

    shape = (16, height // 8, width // 8)
    noise = [rng.normal(r.seed, rng.Purpose.PICTURE, torch.tensor([0]), shape) for r in batch]
    negative = {}
    if cfg_scale != 1:
        negative = {
            "true_cfg_scale": cfg_scale,
            "negative_prompt_embeds": features["ugly"].txt.expand(2, -1, -1),
            "negative_pooled_prompt_embeds": features["ugly"].vec.expand(2, -1),
        }
    theirs = pipeline(
        prompt_embeds=torch.stack([features[r.prompt].txt for r in batch]),
        pooled_prompt_embeds=torch.stack([features[r.prompt].vec for r in batch]),
        latents=FLUX1.pack(torch.cat(noise)),
        width=width,
        height=height,
        num_inference_steps=8,
        guidance_scale=3.5,
        output_type="latent",
        **negative,
    ).images
    difference = (ours - FLUX1.unpack(theirs, *shape[1:])).abs().max().item()
    print(f"largest difference {difference:.1e} of {ours.abs().max():.1f}")
    assert difference <= 1e-4


@pytest.mark.usefixtures("float32_frequencies")
@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
def test_a_reference_acts_as_in_the_kontext_pipeline(velocity, pipeline, cfg_scale):
    """One for each sample, all of one size, which is not the picture's: the pipeline takes no others."""
    import diffusers

    features, draws = conditions(0), torch.Generator().manual_seed(1)
    seen = torch.randn(2, 16, 10, 4, generator=draws)
    base = replace(BASE, cfg_scale=cfg_scale, negative_prompt="ugly")
    batch = [replace(base, prompt=p, seed=s, references=(p,)) for p, s in [("a", 5), ("b", 6)]]
    shown = {(r.prompt,): [latents] for r, latents in zip(batch, seen, strict=True)}
    ours = denoise(batch, features, velocity, FLUX1, MU["flux1"], CPU, torch.float32, shown)

    empty = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    kontext = diffusers.FluxKontextPipeline(
        transformer=pipeline.transformer, scheduler=pipeline.scheduler, **empty
    )
    kontext.set_progress_bar_config(disable=True)
    shape = FLUX1.shape(base.height, base.width)
    noise = [rng.normal(r.seed, rng.Purpose.PICTURE, torch.tensor([0]), shape) for r in batch]
    negative, prompts = features["ugly"], [features[r.prompt] for r in batch]
    theirs = kontext(
        image=seen,  # as latents: no autoencoder, no change of size
        prompt_embeds=torch.stack([p.txt for p in prompts]),
        pooled_prompt_embeds=torch.stack([p.vec for p in prompts]),
        negative_prompt_embeds=negative.txt.expand(2, -1, -1),
        negative_pooled_prompt_embeds=negative.vec.expand(2, -1),
        true_cfg_scale=cfg_scale,
        latents=FLUX1.pack(torch.cat(noise)),
        width=base.width,
        height=base.height,
        max_area=base.width * base.height,
        num_inference_steps=base.steps,
        guidance_scale=base.guidance,
        output_type="latent",
    ).images
    difference = (ours - FLUX1.unpack(theirs, *shape[1:])).abs().max().item()
    print(f"largest difference {difference:.1e} of {ours.abs().max():.1f}")
    assert difference <= 1e-4


def test_times_follow_the_size_and_schnells_are_not_shifted(velocity):
    times: list[float] = []

    def predict(x, t, *others):
        times.append(t[0].item())
        return torch.zeros_like(x)

    for case in json.loads((GOLDEN / "schedules.json").read_text())["flux1"]:
        if "base_shift" in case:  # not FLUX.1's line
            continue
        width, steps = case["image_seq_len"] * 16, case["num_steps"]
        request = replace(BASE, width=width, height=16, steps=steps)
        mu = MU["flux1"] if case["shift"] else None
        denoise([request], conditions(0), predict, FLUX1, mu, CPU, torch.float64)
        assert times == pytest.approx(case["timesteps"][:-1], abs=2e-7)
        times.clear()
    denoise([replace(BASE, steps=4)], conditions(0), predict, FLUX1, None, CPU, torch.float64)
    assert times == [1, 0.75, 0.5, 0.25]


def test_guidance_leads_from_the_negative_prompt_and_each_has_its_scale():
    """u + scale (c - u), against a model that returns its condition."""
    features = {name: TextFeatures(torch.zeros(1, 1), torch.tensor([v])) for name, v in
                {"a": 1.0, "b": 2.0, "": 5.0, "ugly": 7.0}.items()}  # fmt: skip
    calls = []

    def predict(x, t, txt, vec, guidance, references):
        calls.append((len(x), guidance.tolist()))
        return vec[:, :, None, None].expand_as(x)

    batch = [
        replace(BASE, prompt="a", cfg_scale=3.0),
        replace(BASE, prompt="b", cfg_scale=0.5, guidance=2.0, negative_prompt="ugly"),
    ]
    v = guided(batch, features, predict, CPU, torch.float32)(torch.zeros(2, 1, 1, 1), torch.ones(2))
    assert v.flatten().tolist() == [5 + 3 * (1 - 5), 7 + 0.5 * (2 - 7)]
    assert calls == [(4, [3.5, 2, 3.5, 2])]
    plain = [replace(r, cfg_scale=1.0) for r in batch]
    v = guided(plain, features, predict, CPU, torch.float32)(torch.zeros(2, 1, 1, 1), torch.ones(2))
    assert v.flatten().tolist() == [1, 2]
    assert prompts_of(plain) == ["a", "b"]
    assert prompts_of(batch) == ["a", "", "b", "ugly"]


KINDS = st.builds(
    replace,
    st.just(BASE),
    width=st.sampled_from([64, 96]),
    steps=st.sampled_from([4, 8]),
    cfg_scale=st.sampled_from([1.0, 2.0, 3.0]),
    seed=st.integers(0, 3),
)


@settings(max_examples=100, deadline=None)
@given(st.lists(KINDS, min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 4))
def test_every_request_is_drawn_once_in_batches_of_its_kind(requests, groups, size):
    rounds = share_out(requests, groups, size)
    assert Counter(n for batches in rounds for batch in batches for n in batch) == Counter(
        range(len(requests))
    )
    for batches in rounds:
        assert 1 <= len(batches) <= groups
        assert len({requests[n].steps for batch in batches for n in batch}) == 1
        for batch in batches:
            assert 1 <= len(batch) <= size
            assert len({(requests[n].width, requests[n].guided) for n in batch}) == 1


def test_texts_are_encoded_one_at_a_time():
    """In a batch they would be rounded by what lies beside them."""
    seen: list[list[str]] = []

    class Encoder:
        def tokenize(self, texts: list[str]) -> list[str]:
            seen.append(texts)
            return texts

        def encode(self, texts: list[str]) -> TextFeatures:
            values = torch.tensor([float(ord((text or "0")[0])) for text in texts])
            return TextFeatures(values[:, None, None], values[:, None])

    requests = [replace(BASE, prompt=text) for text in "abcab"]
    alone = DataGroup(0, 1, True, World(0, 0, 1, CPU, None, None))
    features = encode_prompts(requests, share_out(requests, 1, 4), Encoder(), alone)
    assert seen == [["a"], ["b"], ["c"]]
    assert {text: f.txt.item() for text, f in features.items()} == {text: ord(text) for text in "abc"}
    assert features["a"].vec.shape == (1,)
    # The second of two groups has less to do, and calls as often.
    seen.clear()
    second = replace(alone, number=1, count=2)
    encode_prompts(requests[:3], [[[0, 1], [2]]], Encoder(), second)
    assert seen == [["c"], [""]]


def test_the_groups_get_even_shares():
    assert share_out([BASE] * 3, 2, 8) == [[[0], [1, 2]]]
    assert share_out([BASE] * 5, 2, 2) == [[[0], [1]], [[2], [3, 4]]]
    assert share_out([BASE, replace(BASE, width=64)], 2, 4) == [[[0], [1]]]  # sizes side by side
