"""`flux-trainer estimate`: what it prints and returns."""

import json
import subprocess
import sys

import pytest

from flux_trainer.cli.main import main


@pytest.fixture
def toml(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('[model]\nflavor = "flux-debug"\n[[data.sources]]\ntype = "synthetic"\n')
    return str(path)


def test_table_and_json_say_the_same(toml, capsys):
    words = ["estimate", toml, "--gpus", "16", "--parallelism.tensor_parallel_degree=2"]
    words += ["--parallelism.pipeline_parallel_degree", "2", "--training.global_batch_size=128"]
    words += ["--training.local_batch_size=4", "--parallelism.data_parallel_replicate_degree=2"]
    assert main(words) == 0
    page = capsys.readouterr().out
    assert main([*words, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert "pp 2 x dp_replicate 2 x dp_shard 2 x cp 1 x tp 2 = 16 ranks" in page
    assert f"{figures['peak'] / 2**30:.2f} GiB" in page
    assert "selective op" in page
    assert "<- configured" in page
    assert figures["peak"] == max(figures["phases"].values())
    assert figures["sent_per_step"]["pipeline"] > 0
    assert figures["modes"]["full"]["activations"] < figures["modes"]["none"]["activations"]


@pytest.mark.slow
def test_encoders_that_work_ahead_lie_beside_every_part_of_a_step(toml, capsys):
    def figures(ranks: int, *words: str) -> dict:
        words = ("--training.local_batch_size=2", "--training.global_batch_size=16", *words)
        assert main(["estimate", toml, f"--gpus={ranks}", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    without, ahead = figures(1), figures(1, "--training.encode_ahead")
    encoding = without["phases"]["encoding"] - without["phases"]["average"] + without["memory"]["ema"]
    samples = without["memory"]["samples"]
    beside = encoding + 3 * samples
    assert ahead["memory"]["ahead"] == beside
    assert ahead["phases"].pop("encoding") == without["phases"].pop("encoding") + beside - encoding
    without["phases"]["forward and backward"] -= samples  # they are among those beside
    assert ahead["phases"] == {name: size + beside for name, size in without["phases"].items()}
    assert figures(2, "--training.encode_ahead")["memory"]["ahead"] == 0, "two ranks share the encoders"
    assert main(["estimate", toml, "--gpus=1", "--training.encode_ahead"]) == 0
    assert "the next ones, and encoding them" in capsys.readouterr().out


def test_flux2_at_full_size(toml, capsys):
    words = ["estimate", toml, "--gpus", "64", "--json", "--model.flavor=flux2-dev"]
    words += ["--parallelism.tensor_parallel_degree=4", "--training.img_size=1024"]
    assert main(words) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["model_parameters"] == 32_223_281_152
    assert (figures["image_tokens"], figures["text_tokens"]) == (4096, 512)
    assert 4 * 32.2e9 / 64 < figures["memory"]["parameters"] < 1.1 * 4 * 32.2e9 / 64


def test_refusals_are_those_of_the_run(toml, capsys):
    assert main(["estimate", toml, "--gpus", "8", "--parallelism.tensor_parallel_degree=3"]) == 2
    assert "does not divide the 8 ranks of this run" in capsys.readouterr().err
    assert main(["estimate", toml, "--gpus", "5", "--parallelism.tensor_parallel_degree=5"]) == 2
    assert "12 attention heads cannot be shared out evenly" in capsys.readouterr().err
    assert main(["estimate", toml]) == 2
    assert "--gpus is missing" in capsys.readouterr().err


def test_files_that_do_not_say_how_large_the_encoders_are(toml, tmp_path, capsys):
    (tmp_path / "pointer.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    words = ["--encoder.autoencoder_path", str(tmp_path / "pointer.safetensors")]
    assert main(["estimate", toml, "--gpus", "1", *words]) == 2
    assert "pointer.safetensors is a git-lfs pointer" in capsys.readouterr().err


def test_help_imports_no_torch():
    code = """
import sys
from flux_trainer.cli.main import main
assert main(["estimate", "--help"]) == 0
print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
