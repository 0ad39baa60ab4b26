"""`flux-trainer generate`: what it draws and writes, and that the mesh does not matter."""

from __future__ import annotations

import gc
import io
import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.drawing import PROMPTS, generate, pictures, words_of
from helpers.headers import write_header
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.tiny_run import MODEL, ROOT, write_assets
from PIL import Image

from flux_trainer import __version__
from flux_trainer.cli.main import main
from flux_trainer.hub.convert import convert
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.registry import FLAVORS

GOLDEN = ROOT / "tests/golden/flux1_A"

pytestmark = pytest.mark.usefixtures("flavor_of_the_run")


@pytest.fixture(scope="module")
def one_process(run) -> Path:
    """Three prompts in two sizes, all of a size in one batch."""
    out = run[0] / "one"
    words = ["--out", str(out), "--size", "16,32x16", "--count", "2", "--batch=8"]
    run_ranks(1, generate, run[0], *PROMPTS, *words)
    return out


def test_a_file_for_each_picture_and_a_sheet(one_process):
    assert [(name, p.shape) for name, p in pictures(one_process).items()] == [
        (f"00{i}_{slug}_{size}_seed{seed}.png", shape)
        for i, slug in enumerate(["a-red-apple", "a-dog-asleep", "überall"], 1)
        for size, shape in (("16x16", (16, 16, 3)), ("32x16", (16, 32, 3)))
        for seed in (0, 1)
    ]
    assert sorted(p.name for p in one_process.iterdir() if not p.name.startswith("0")) == [
        "contact-sheet-1.png"
    ]
    assert Image.open(one_process / "contact-sheet-1.png").width > 3 * 160


def test_settings_are_inside(one_process, run):
    path = one_process / "003_überall_32x16_seed1.png"
    assert words_of(path) == {
        "prompt": "überall",
        "negative_prompt": "",
        "references": None,
        "seed": 1,
        "width": 32,
        "height": 16,
        "steps": 3,
        "guidance": 2.0,
        "cfg_scale": 5.0,
        "weights": str(run[0] / "run/checkpoint/step-2"),
        "ema": False,
        "version": __version__,
    }
    assert Image.open(path).text["parameters"] == (
        "überall\nSteps: 3, Sampler: Euler, CFG scale: 5.0, Distilled CFG Scale: 2.0, Seed: 1, Size: 32x16, "
        f"Model: step-2, Version: flux_trainer {__version__}"
    )


def test_it_draws_what_the_run_draws_while_it_validates(one_process, run):
    """The run's default settings, with the same seed."""
    assert np.array_equal(pictures(one_process)["001_a-red-apple_16x16_seed0.png"], run[1][0])


def test_each_seed_prompt_and_size_has_its_picture(one_process):
    seen = pictures(one_process)
    assert len({picture.tobytes() for picture in seen.values()}) == len(seen)


MESHES = {
    "batches of two": (1, []),
    "shard": (2, []),
    "replicate": (2, ["--parallelism.data_parallel_replicate_degree=2"]),
    **{
        kind: (2, [f"--parallelism.{kind}_parallel_degree=2"])
        for kind in ("context", "tensor", "pipeline")
    },
}  # fmt: skip


@pytest.mark.distributed
@pytest.mark.parametrize(
    "mesh", ["batches of two", "context", "pipeline", *slow("shard", "replicate", "tensor")]
)
def test_a_picture_depends_neither_on_batch_nor_on_mesh(run, one_process, tmp_path, mesh):
    """In float64; three prompts do not divide among two groups."""
    ranks, flags = MESHES[mesh]
    words = ["--out", str(tmp_path), "--size", "16,32x16", "--count=2", "--batch=2"]
    run_ranks(ranks, generate, run[0], *PROMPTS, *words, *flags)
    got, want = pictures(tmp_path), pictures(one_process)
    assert got.keys() == want.keys()
    for name in want:
        assert np.array_equal(got[name], want[name]), name


def disagreeing(folder: Path, out: Path) -> tuple[int, str]:
    """Exit status and console where each rank was given another seed and another batch."""
    rank = int(os.environ["RANK"])
    FLAVORS["flux-tiny"] = MODEL
    sys.stderr = io.StringIO()
    try:
        words = ["a", "--out", str(out), "--seed", str(rank), "--batch", str(rank + 1)]
        return main(["generate", str(folder / "run"), *words]), sys.stderr.getvalue()
    finally:
        sys.stderr = sys.__stderr__


@pytest.mark.distributed
def test_ranks_that_were_told_different_things_draw_nothing(run, tmp_path):
    (first, said), (second, _) = run_ranks(2, disagreeing, run[0], tmp_path)
    assert (first, second) == (1, 1)
    assert "The ranks were started with different settings: inference.local_batch_size is 1 on rank 0" in said
    assert "picture 1.seed is 0 on rank 0, 1 on rank 1" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_other_weights_and_settings_give_other_pictures(run, one_process, tmp_path):
    name = "001_a-red-apple_16x16_seed0.png"
    plain = pictures(one_process)[name]
    changes = {
        "ema": ["--inference.ema"],
        "steps": ["--steps=2"],
        "guidance": ["--guidance=7"],
        "cfg": ["--cfg=1"],
        "negative": ["--negative", "ugly"],
    }
    for change, flags in changes.items():
        out = tmp_path / change
        lines = run_ranks(1, generate, run[0], PROMPTS[0], "--out", str(out), *flags)[0]
        assert not np.array_equal(pictures(out)[name], plain), change
        assert list(out.iterdir()) == [out / name]  # one picture needs no sheet
        assert any(str(out) in line for line in lines)
    assert words_of(tmp_path / "cfg" / name)["negative_prompt"] is None
    assert "\nNegative prompt: ugly\n" in Image.open(tmp_path / "negative" / name).text["parameters"]


def without_encoders(folder: Path, out: Path) -> list[str]:
    """The classes of encoders that are alive when the transformer gets its memory."""
    from transformers import CLIPTextModel, T5EncoderModel

    from flux_trainer import generate as module

    alive, transformer = [], module._transformer

    def watched(*args: Any) -> Any:
        alive.extend(
            type(o).__name__ for o in gc.get_objects() if isinstance(o, (T5EncoderModel, CLIPTextModel))
        )
        return transformer(*args)

    module._transformer = watched
    generate(folder, "a", "--out", str(out))
    return alive


@pytest.mark.distributed
def test_the_text_encoders_are_gone_when_the_transformer_comes(run, tmp_path):
    """Also where T5 is sharded, and tied to itself by FSDP's hooks."""
    assert run_ranks(2, without_encoders, run[0], tmp_path) == [[], []]


def refused_before_encoding(folder: Path, *words: str) -> str:
    """The sentence with which drawing is refused; fails where a text encoder was built."""
    from flux_trainer import generate as module

    FLAVORS["flux-tiny"] = MODEL
    module.text_encoders = lambda *_: pytest.fail("text encoders were built")
    sys.stderr = io.StringIO()
    try:
        assert main(["generate", str(folder / "run"), "a", *words]) == 1, sys.stderr.getvalue()
        return sys.stderr.getvalue()
    finally:
        sys.stderr = sys.__stderr__


def test_bad_weights_and_folders_are_known_before_prompts_are_encoded(run, tmp_path):
    shutil.copytree(run[0] / "run", tmp_path / "run")
    step = tmp_path / "run/checkpoint/step-2"
    data = next(step.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:1000])
    assert "cut off" in run_ranks(1, refused_before_encoding, tmp_path)[0]
    bad = ["--encoder.autoencoder_path", str(tmp_path / "bad.safetensors")]
    write_header(tmp_path / "bad.safetensors", {"encoder.conv_in.weight": (1, 3, 3, 3)})
    assert "bad.safetensors" in run_ranks(1, refused_before_encoding, run[0], *bad)[0]
    cudnn = ["--attention.backend=cudnn", "--training.mixed_precision_param=bfloat16"]
    assert "runs on CUDA alone, not on cpu" in run_ranks(1, refused_before_encoding, run[0], *cudnn)[0]


def backends_of_attention(folder: Path, out: Path) -> list[str]:
    from flux_trainer.parallel import apply

    asked, attention_by = [], apply.attention_by
    apply.attention_by = lambda name: asked.append(name) or attention_by(name)
    generate(folder, "a", "--steps=1", "--out", str(out), "--attention.backend=math")
    return asked


def test_the_backend_of_attention_is_what_was_asked_for(run, tmp_path):
    assert run_ranks(1, backends_of_attention, run[0], tmp_path) == [["math"]]


def interrupted(folder: Path, out: Path) -> tuple[int, list[str]]:
    """Exit status and console of drawing that Ctrl-C ends after the first call of the model."""
    from flux_trainer import generate as module

    class Interrupted(module.Velocity):
        def __call__(self, *_: Any) -> Any:
            raise KeyboardInterrupt

    FLAVORS["flux-tiny"] = MODEL
    module.Velocity = Interrupted
    sys.stderr = io.StringIO()
    try:
        return main(
            ["generate", str(folder / "run"), "a", "--out", str(out)]
        ), sys.stderr.getvalue().splitlines()
    finally:
        sys.stderr = sys.__stderr__


def test_ctrl_c_is_one_line(run, tmp_path):
    [(status, lines)] = run_ranks(1, interrupted, run[0], tmp_path)
    assert status == 130
    assert lines[-1].endswith(" ERROR    Interrupted.")  # by `exit_status`, which tells the other ranks
    assert not any("Traceback" in line for line in lines)
    assert list(tmp_path.iterdir()) == []


def shown_progress(folder: Path, out: Path) -> list[str]:
    """Every line of progress of two pictures, one after another."""
    from flux_trainer.metrics import progress

    progress.IN_FILE = 0.0
    lines = generate(folder, "a", "b", "--batch=1", "--steps=2", "--out", str(out))
    return [line.split(", ")[0] + ", " + line.split(", ")[1] for line in lines if "pictures, " in line]


def test_all_is_done_when_all_pictures_are(run, tmp_path):
    shown = run_ranks(1, shown_progress, run[0], tmp_path)[0]
    assert shown[0].startswith("0 of 2 pictures, ")
    assert [line for line in shown if line.endswith("100 %")] == ["2 of 2 pictures, 100 %"]


def from_published(words: list[str]) -> list[str]:
    """Draw with the golden model in FLUX.1-dev's place; returns what the console shows."""
    config = json.loads((GOLDEN / "config.json").read_text())["bfl"]
    FLAVORS["flux-dev"] = Flux1Config(**config)
    sys.stderr = io.StringIO()
    try:
        assert main(["generate", *words]) == 0, sys.stderr.getvalue()
        return sys.stderr.getvalue().splitlines()
    finally:
        sys.stderr = sys.__stderr__


def test_published_layouts_draw_the_same(tmp_path):
    """The same weights as BFL's file and as diffusers' folder, with the encoders that lie beside them."""
    write_assets(tmp_path)
    folder = tmp_path / "FLUX.1-dev"
    (folder / "transformer").mkdir(parents=True)
    for part, name, width in (
        ("text_encoder_2", "t5", {"d_model": 40}),
        ("text_encoder", "clip", {"hidden_size": 32}),
    ):
        config = json.loads((tmp_path / name / "config.json").read_text())
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config | width))
    for file in ("ae.safetensors", "ae.json"):
        shutil.copy(tmp_path / file, folder)
    config = json.loads((GOLDEN / "config.json").read_text())["diffusers"]
    (folder / "model_index.json").write_text("{}")
    (folder / "transformer/config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel", **config})
    )
    shutil.copy(
        GOLDEN / "weights_diffusers.safetensors", folder / "transformer/diffusion_pytorch_model.safetensors"
    )
    shutil.copy(GOLDEN / "weights_bfl.safetensors", folder / "flux1-dev.safetensors")

    flags = ["--size=32x16", "--steps=2", "--encoder.random_init", "--encoder.dtype=float32"]
    flags += ["--training.mixed_precision_param=float32"]
    flags += [f"--encoder.{name}_tokenizer={ROOT / 'assets/tokenizers' / name}" for name in ("t5", "clip")]
    drawn = {}
    for kind, weights in (("bfl", folder / "flux1-dev.safetensors"), ("diffusers", folder)):
        if kind == "diffusers":  # with its own autoencoder too
            config = AutoEncoderConfig(**json.loads((folder / "ae.json").read_text()))
            convert(open_weights(folder / "ae.safetensors", "vae", config), folder / "vae", "diffusers")
            (folder / "ae.safetensors").unlink()
        out = tmp_path / kind
        lines = run_ranks(1, from_published, [str(weights), "a", "--out", str(out), *flags])[0]
        assert any("Drawing with FLUX.1" in line for line in lines), lines
        [drawn[kind]] = pictures(out).values()
    assert np.array_equal(drawn["bfl"], drawn["diffusers"])
    assert drawn["bfl"].std() > 5


def test_the_readme_command_draws_from_the_readme_run(run, tmp_path, monkeypatch):
    """Its words, on a smaller run of the same settings file's kind."""
    import tomllib

    commands = [
        shlex.split(line, comments=True)
        for line in (ROOT / "README.md").read_text().splitlines()
        if line.startswith("    flux-trainer generate ")
    ]
    assert commands
    default = tomllib.loads((ROOT / "train_configs/emoji_tiny.toml").read_text())["job"]["dump_folder"]
    assert os.path.normpath(commands[0][2]) == os.path.normpath(default)
    run_ranks(1, generate, run[0], *commands[0][3:], "--out", str(tmp_path))
    assert len(pictures(tmp_path)) >= 2
