"""Weights that settings name are looked at before torch is imported, and only those that will be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from helpers.headers import shapes_of, write_header

from flux_trainer.config.load import load_config
from flux_trainer.config.problems import ConfigError
from flux_trainer.hub.local import check_weights

POINTER = "version https://git-lfs.github.com/spec/v1\n"
T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"


def problems(*flags: str, training: bool = True) -> list[str]:
    """All but that the default autoencoder is not of this test."""
    try:
        check_weights(load_config(flags), training=training)
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def encoder(tmp_path) -> Path:
    """The folder of a T5 whose weights are a pointer."""
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "t5"}')
    (folder / "model.safetensors").write_text(POINTER)
    return folder


def test_text_encoders(encoder):
    flags = ["--model.flavor=flux-tiny", f"--encoder.t5_encoder={encoder}"]
    [line] = problems(*flags)
    assert line.startswith(
        f'encoder.t5_encoder = "{encoder}": {encoder}/model.safetensors is a git-lfs pointer'
    )
    assert problems(*flags, "--encoder.random_init") == []
    assert problems(f"--encoder.llm_encoder={encoder}") == []  # FLUX.1 has none
    [line] = problems("--model.flavor=flux2-tiny", f"--encoder.llm_encoder={encoder}")
    assert line.startswith("encoder.llm_encoder = ")
    write_header(encoder / "model.safetensors", {T5: (2, 2)})
    assert problems(*flags) == []
    [line] = problems(f"--encoder.clip_encoder={encoder}")
    assert "holds a T5 text encoder, not a CLIP text encoder" in line
    (encoder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    [line] = problems(*flags)
    assert "quantised weights (quantization_config fp8 in config.json)" in line
    (encoder / "config.json").unlink()  # for who reads the folder, with advice how to get one
    assert problems(*flags) == []


def test_the_autoencoder_and_the_weights_to_start_from(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_text(POINTER)
    flags = [
        f"--encoder.autoencoder_path={file}",
        f"--checkpoint.initial_load_path={file}",
        f"--job.dump_folder={tmp_path}",
        "--checkpoint.enable",
    ]
    autoencoder, start = problems(*flags)
    assert autoencoder.startswith(f'encoder.autoencoder_path = "{file}": {file} is a git-lfs pointer')
    assert start.startswith(f'checkpoint.initial_load_path = "{file}": {file} is a git-lfs pointer')
    assert problems(*flags, training=False) == [autoencoder]
    (tmp_path / "checkpoint" / "step-1").mkdir(parents=True)  # a resume does not read what the run began with
    assert problems(*flags) == [autoencoder]
    write_header(file, shapes_of("flux-tiny", "bfl"))
    [line] = problems(*flags)
    assert "holds a FLUX transformer, not an autoencoder" in line


def test_a_folder_of_an_autoencoder(tmp_path):
    [line] = problems(f"--encoder.autoencoder_path={tmp_path}")
    assert line.startswith(f'encoder.autoencoder_path = "{tmp_path}": {tmp_path} has no weights of a vae')
    write_header(tmp_path / "vae" / "ae.SFT", {"decoder.conv_in.weight": (4, 4, 3, 3)})
    assert problems(f"--encoder.autoencoder_path={tmp_path}") == []  # a pipeline of which no more was fetched
    assert problems(f"--encoder.autoencoder_path={tmp_path / 'vae'}") == []


def test_before_torch(encoder):
    code = (
        "import sys\nfrom flux_trainer.cli.main import main\n"
        "words = ['--job.config_file', 'train_configs/emoji_tiny.toml', '--encoder.no-random_init']\n"
        f"assert main(['config', '--quiet', *words, '--encoder.t5_encoder', {str(encoder)!r}]) == 2\n"
        f"assert main(['generate', {str(encoder / 'model.safetensors')!r}, 'a']) == 2\n"
        "assert not {'torch', 'transformers', 'safetensors'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is a git-lfs pointer") == 2
