"""`flux-trainer generate`: what its words order, what it refuses, and with which sentence."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.headers import shapes_of, write_header
from helpers.tiny_run import MODEL, ROOT

from flux_trainer.cli.generate import ALIASES, plan
from flux_trainer.cli.main import main
from flux_trainer.config.load import ConfigError
from flux_trainer.models.registry import FLAVORS

pytestmark = pytest.mark.usefixtures("flavor_of_the_run")


def test_prompts_come_from_a_file_or_from_standard_input(run, tmp_path, monkeypatch):
    folder = str(run[0] / "run")
    (tmp_path / "prompts.txt").write_text("a cat, asleep\n\n  a dog \n", encoding="utf-8")
    order, config, _ = plan([folder, "--inference.prompts_path", str(tmp_path / "prompts.txt")], 1)
    assert [r.prompt for r in order.requests] == ["a cat, asleep", "a dog"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo\n")))
    order, _, _ = plan([folder, "-"], 1)
    assert [r.prompt for r in order.requests] == ["one", "two"]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfone\r\ntwo\n")))
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


def test_the_home_folder_in_words(run, tmp_path, monkeypatch):
    """A shell does not expand what follows an equals sign, nor what is quoted."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "weights").symlink_to(run[0] / "run")
    (tmp_path / "a.png").touch()
    for out in (["--out=~/b"], ["--out", "~/b"], ["--inference.save_img_folder=~/b"]):
        order, _, _ = plan(["~/weights", "a", *out, "--reference", "~/a.png"], 1)
        assert order.paths == [tmp_path / "b/001_a_16x16_seed0.png"]
        assert order.requests[0].references == (str(tmp_path / "a.png"),)
    with pytest.raises(ValueError, match="~stranger is no known home folder"):
        plan(["~stranger/run", "a"], 1)


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
    "RUN a --out ONE/away/here": "is a link to unmounted, which is not there; mount its disk",
    "RUN a --encoder.clip_encoder assets/encoders/clip-tiny": "gives 256 features, but flux-tiny takes 16",
    "RUN --inference.prompts_path nowhere.txt": 'inference.prompts_path = "nowhere.txt" is not there',
    "RUN --inference.prompts_path README.md --inference.prompts a": "are both given; give one of the two",
    "RUN a --parallelism.tensor_parallel_degree 2": "does not divide the 1 ranks of this run; possible: 1",
    "RUN/img a": "has no weights of a transformer: no safetensors file",
    "nowhere a": "There is no file or folder ",
    "README.md a": "README.md is not a readable safetensors file: it is text that begins with",
    "RUN a --out ONE --size 16": "001_a_16x16_seed0.png would be replaced: take another --seed ",
}


@pytest.mark.parametrize("words", REFUSALS)
def test_refusals_are_sentences(run, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (tmp_path / "001_a_16x16_seed0.png").write_text("precious")
    (tmp_path / "away").symlink_to("unmounted")
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
    write_header(tmp_path / "ae.safetensors", {})
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
    write_header(tmp_path / "vae/model.safetensors", {})
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
