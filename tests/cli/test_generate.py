"""`flux-trainer generate`: what it refuses, what it writes, and that the mesh does not matter."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.headers import shapes_of, write_header
from helpers.ranks import run_ranks
from helpers.tiny_run import MODEL, ROOT, TinyTrainer, tiny_config, write_assets
from PIL import Image

from flux_trainer import __version__
from flux_trainer.cli.generate import ALIASES, plan
from flux_trainer.cli.main import main
from flux_trainer.config.load import ConfigError
from flux_trainer.hub.convert import convert
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.configs import Flux1Config
from flux_trainer.models.registry import FLAVORS

GOLDEN = ROOT / "tests/golden/flux1_A"
PROMPTS = ["a red apple", "a dog, asleep", "überall"]


def train(folder: Path) -> list[np.ndarray]:
    """A run of two steps with its checkpoint; returns what it draws of the prompts then."""
    flags = [
        "--training.steps=2",
        "--lr_scheduler.warmup_steps=0",
        "--checkpoint.enable",
        "--flow.guidance=2",
    ]
    drawing = ["--validation.enable", "--validation.denoising_steps=3", "--validation.prompts=x"]
    trainer = TinyTrainer(tiny_config(folder, *flags, *drawing))
    trainer.train()
    return [pixels.permute(1, 2, 0).numpy() for pixels in trainer.draw(PROMPTS[:1])]


def generate(folder: Path, *words: str) -> list[str]:
    """Draw from the run in `folder`; returns what the console shows."""
    FLAVORS["flux-tiny"] = MODEL
    sys.stderr = io.StringIO()
    try:
        assert main(["generate", str(folder / "run"), *words]) == 0, sys.stderr.getvalue()
        return sys.stderr.getvalue().splitlines()
    finally:
        sys.stderr = sys.__stderr__


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("generate")
    return folder, run_ranks(1, train, folder)[0]


@pytest.fixture(scope="module")
def one_process(run) -> Path:
    """Three prompts in two sizes, all of a size in one batch."""
    out = run[0] / "one"
    words = ["--out", str(out), "--size", "16,32x16", "--count", "2", "--batch=8"]
    run_ranks(1, generate, run[0], *PROMPTS, *words)
    return out


@pytest.fixture(autouse=True)
def _flavor_of_the_run(monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-tiny", MODEL)


def pictures(folder: Path) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in sorted(folder.glob("0*.png"))}


def words_of(path: Path) -> dict[str, Any]:
    return json.loads(Image.open(path).text["flux_trainer"])


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
@pytest.mark.parametrize("mesh", MESHES)
def test_a_picture_depends_neither_on_batch_nor_on_mesh(run, one_process, tmp_path, mesh):
    """In float64; three prompts do not divide among two groups."""
    ranks, flags = MESHES[mesh]
    words = ["--out", str(tmp_path), "--size", "16,32x16", "--count=2", "--batch=2"]
    run_ranks(ranks, generate, run[0], *PROMPTS, *words, *flags)
    got, want = pictures(tmp_path), pictures(one_process)
    assert got.keys() == want.keys()
    for name in want:
        assert np.array_equal(got[name], want[name]), name


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


def test_prompts_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch):
    folder = str(run[0] / "run")
    (tmp_path / "prompts.txt").write_text("a cat, asleep\n\n  a dog \n", encoding="utf-8")
    order, config, _ = plan([folder, "--inference.prompts_path", str(tmp_path / "prompts.txt")], 1)
    assert [r.prompt for r in order.requests] == ["a cat, asleep", "a dog"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    order, _, _ = plan([folder, "-"], 1)
    assert [r.prompt for r in order.requests] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    order, _, _ = plan([folder, "zero", "-", "three", "--count=1"], 1)
    assert [r.prompt for r in order.requests] == ["zero", "one", "two", "three"]
    order, _, _ = plan([folder, "a", "--", "--strange", "-", "-n"], 1)
    assert [r.prompt for r in order.requests] == ["a", "--strange", "-", "-n"]
    order, _, _ = plan(["--", folder, "a"], 1)
    assert [r.prompt for r in order.requests] == ["a"]
    assert config.parallelism.data_parallel_shard_degree == -1


def test_short_flags_and_where_pictures_go(run, tmp_path, monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-tiny", MODEL)
    monkeypatch.chdir(tmp_path)
    folder = run[0] / "run"
    words = {
        "--out": "here",
        "--size": "48",
        "--steps": "7",
        "--seed": "3",
        "--guidance": "1.5",
        "--cfg": "2",
        "--negative": "ugly, blurred",
        "--batch": "9",
        "--count": "1",
        "--overwrite": "true",
    }
    assert words.keys() == ALIASES.keys()
    for argv in ([w for pair in words.items() for w in pair], [f"{k}={v}" for k, v in words.items()]):
        order, config, _ = plan([str(folder), "a", *argv], 1)
        assert order.paths == [tmp_path / "here/001_a_48x48_seed3.png"]
        [r] = order.requests
        assert (r.steps, r.guidance, r.cfg_scale, r.negative_prompt) == (7, 1.5, 2.0, "ugly, blurred")
        assert config.inference.local_batch_size == 9
        assert config.inference.overwrite
    order, _, _ = plan([str(folder), "a"], 1)
    assert order.paths == [folder / "inference_results/001_a_16x16_seed0.png"]
    order, _, _ = plan([str(folder / "checkpoint/step-2"), "a"], 1)
    assert order.paths == [folder / "inference_results/001_a_16x16_seed0.png"]


def test_guidance_that_a_model_has_no_use_for_is_not_in_its_pictures(run, monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-tiny", replace(MODEL, guidance_embed=False))
    order, _, notices = plan([str(run[0] / "run"), "a", "--guidance", "3"], 1)
    assert order.requests[0].guidance is None
    assert notices == ["flux-tiny has no embedding of guidance, so --guidance does nothing"]
    order, _, notices = plan([str(run[0] / "run"), "a"], 1)
    assert order.requests[0].guidance is None
    assert notices == []


def test_an_impossible_mesh_is_refused(run):
    with pytest.raises(ConfigError, match="attention heads cannot be shared out evenly"):
        plan([str(run[0] / "run"), "a", "--parallelism.tensor_parallel_degree=3"], 3)
    # What a pipeline's steps of training need does not matter.
    plan([str(run[0] / "run"), "a", "--parallelism.pipeline_parallel_degree=2"], 2)


def test_torchrun_hands_the_short_flags_on():
    from torch.distributed.run import get_args_parser

    words = [word for flag in ALIASES for word in (flag, "1")]
    arguments = get_args_parser().parse_args(["-m", "flux_trainer", "generate", "run", *words])
    assert arguments.training_script_args == ["generate", "run", *words]


REFUSALS = {
    "": "WEIGHTS is missing: flux-trainer generate WEIGHTS PROMPT...; --help says more",
    "RUN": "nothing to draw: give prompts as arguments",
    "RUN a --size 60": 'inference.sizes.0 = "60" is no size of a picture; expected WIDTHxHEIGHT',
    "RUN a --size 0x16": 'inference.sizes.0 = "0x16" is no size of a picture',
    "RUN a --cfg much": 'inference.cfg_scale = "much": wrong type; expected a number >= 0 or none',
    "RUN a --seed 72057594037927936": "inference.seed = 72057594037927936 is too large",
    "RUN a --inference.promts b": "inference.promts: unknown key; did you mean inference.prompts or ",
    "RUN a -n 3": "-n: not a flag; prompts that begin with a dash come after --",
    "RUN a bad\udcff": r"'bad\udcff' is not UTF-8 text",
    "RUN a --negative bad\udcff": r"'bad\udcff' is not UTF-8 text",
    "RUN a --out README.md/here": "README.md is a file; name a folder",
    "RUN a --encoder.clip_encoder assets/encoders/clip-tiny": "gives 256 features, but flux-tiny takes 16",
    "RUN --inference.prompts_path nowhere.txt": 'inference.prompts_path = "nowhere.txt" is not there',
    "RUN --inference.prompts_path README.md --inference.prompts a": "are both given; give one of the two",
    "RUN a --parallelism.tensor_parallel_degree 2": "does not divide the 1 ranks of this run; possible: 1",
    "RUN/img a": "this folder is neither a run (config.toml), nor a checkpoint (step-N)",
    "nowhere a": "nowhere: there is no such file or folder (looked in ",
    "README.md a": "README.md: weights are read from .safetensors files; a pickle could run code",
    "RUN a --out ONE --size 16": "001_a_16x16_seed0.png would be replaced: take another --seed ",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals_are_sentences(run, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "001_a_16x16_seed0.png").write_text("precious")
    words_ = words.replace("RUN", str(run[0] / "run")).replace("ONE", str(tmp_path)).split()
    assert main(["generate", *words_]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert REFUSALS[words] in printed.err
    assert len(printed.err.splitlines()) == 1
    assert (tmp_path / "001_a_16x16_seed0.png").read_text() == "precious"


def test_standard_input_is_for_one_process(run):
    with pytest.raises(ConfigError, match="standard input reaches one process only"):
        plan([str(run[0] / "run"), "-"], 2)


def test_refusals_import_no_torch(run):
    code = (
        "import sys\nfrom flux_trainer.cli.main import main\n"
        f"assert main(['generate', {str(run[0] / 'run')!r}, 'a', '--size', '60']) == 2\n"
        "assert main(['generate', '--help']) == 0\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'PIL'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_published_weights_are_drawn_as_they_were_distilled(tmp_path):
    """FLUX.1's folders as they are published; which of the two it is shows in the files."""
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "transformer"):
        (tmp_path / part).mkdir()
    (tmp_path / "ae.safetensors").write_text("")
    (tmp_path / "model_index.json").write_text("{}")
    write_header(tmp_path / "flux1-dev.safetensors", shapes_of("flux-dev", "bfl"))
    write_header(tmp_path / "transformer/model.safetensors", shapes_of("flux-schnell", "diffusers"))

    order, config, _ = plan([str(tmp_path / "flux1-dev.safetensors"), "a"], 1)
    [r] = order.requests
    assert config.model.flavor == "flux-dev"
    assert (r.steps, r.guidance, r.cfg_scale, r.width, r.height) == (50, 3.5, 1.0, 1024, 1024)
    assert config.encoder.max_t5_encoding_len == 512

    order, config, _ = plan([str(tmp_path), "a", "--encoder.max_t5_encoding_len=128"], 1)
    [r] = order.requests
    assert config.model.flavor == "flux-schnell"
    assert (r.steps, r.guidance, r.cfg_scale) == (4, None, 1.0)
    assert config.encoder.max_t5_encoding_len == 128
    order, _, _ = plan([str(tmp_path), "a", "--training.img_size=256"], 1)
    assert order.requests[0].width == 256

    with pytest.raises(ConfigError, match=r'model.flavor = "flux-dev", but .* holds flux-schnell: leave'):
        plan([str(tmp_path), "a", "--model.flavor=flux-dev"], 1)
    (tmp_path / "text_encoder_2/config.json").write_text('{"d_model": 64}')
    with pytest.raises(ConfigError, match="gives 64 features, but flux-schnell takes 4096"):
        plan([str(tmp_path), "a"], 1)


@pytest.mark.parametrize(
    ("flavor", "scales", "notes"),
    [
        ("flux2-dev", (50, 4.0, 1.0), []),
        (
            "flux2-klein-9b",
            (4, None, 1.0),
            [
                "flux2-klein-9b is drawn as the distilled klein was made for, in 4 steps without guidance; "
                "its base model wants --steps 50 --cfg 4"
            ],
        ),
    ],
)
def test_flux2_is_drawn_as_it_was_distilled(tmp_path, flavor, scales, notes):
    for part in ("text_encoder", "tokenizer", "vae"):
        (tmp_path / part).mkdir()
    (tmp_path / "vae/model.safetensors").write_text("")
    write_header(tmp_path / "flux2.safetensors", shapes_of(flavor, "bfl"))
    order, config, notices = plan([str(tmp_path / "flux2.safetensors"), "a"], 1)
    [r] = order.requests
    assert (r.steps, r.guidance, r.cfg_scale) == scales
    assert (config.model.name, config.model.flavor) == ("flux2", flavor)
    assert notices == notes
    _, _, notices = plan([str(tmp_path / "flux2.safetensors"), "a", "--steps=50", "--cfg=4"], 1)
    assert notices == []


def test_a_checkpoint_that_does_not_say_its_model_wants_a_flavor(tmp_path):
    (tmp_path / ".metadata").write_text("")
    with pytest.raises(ConfigError, match=r"does not say which model it holds: add --model\.flavor"):
        plan([str(tmp_path), "a"], 1)


def test_what_is_asked_for_twice_is_drawn_once(run):
    order, _, notices = plan([str(run[0] / "run"), "a", "b", "a", "--size=16,16", "--count=2"], 1)
    assert [(r.prompt, r.seed) for r in order.requests] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert len(set(order.paths)) == 4
    assert notices == ["what is asked for twice is drawn once; --count 2 draws each with two seeds"]


def test_settings_of_training_in_a_file_do_not_compile_pictures(run, tmp_path):
    """A run's own settings file, beside weights of the same flavor."""
    text = (run[0] / "run/config.toml").read_text()
    (tmp_path / "mine.toml").write_text(re.sub(r"(\[compile\]\nenable = )false", r"\1true", text))
    write_header(tmp_path / "a.safetensors", shapes_of("flux-tiny", "bfl"))
    words = [str(tmp_path / "a.safetensors"), "a", "--job.config_file", str(tmp_path / "mine.toml")]
    order, config, [notice] = plan(words, 1)
    assert not config.compile.enable
    assert notice.endswith("mine.toml is for training; add --compile.enable to compile here")
    assert order.requests[0].width == 16
    _, config, notices = plan([*words, "--compile.enable"], 1)
    assert config.compile.enable
    assert notices == []


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
    (tmp_path / "bad.safetensors").write_bytes(b"\xff" * 20)
    assert "bad.safetensors" in run_ranks(1, refused_before_encoding, run[0], *bad)[0]


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
