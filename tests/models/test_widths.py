"""Text encoders that do not fit the transformer are refused by their config.json, without torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flux_trainer.config.load import load_config
from flux_trainer.config.problems import ConfigError
from flux_trainer.encoders.chat import CHATS
from flux_trainer.models.widths import STATES, check_widths


def problems(*flags: str) -> list[str]:
    try:
        check_widths(load_config(flags))
    except ConfigError as error:
        return error.problems
    return []


@pytest.fixture
def folder(tmp_path):
    """Writes config.json files; returns the flags that name them."""

    def write(**values: object) -> list[str]:
        for name, content in values.items():
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / "config.json").write_text(json.dumps(content))
        return [f"--encoder.{name}_encoder={tmp_path / name}" for name in values]

    return write


def test_flux1(folder):
    flags = ["--model.flavor=flux-dev"]
    assert problems(*flags, *folder(t5={"d_model": 4096}, clip={"hidden_size": 768})) == []
    wrong = folder(t5={"d_model": 256}, clip={"hidden_size": 1024, "text_config": {"hidden_size": 512}})
    first, second = problems(*flags, *wrong)
    assert "gives 256 features, but flux-dev takes 4096, T5 XXL's: choose the encoder" in first
    assert "gives 512 features, but flux-dev takes 768" in second


def test_flux2_takes_three_states(folder):
    assert {len(chat.states) for chat in CHATS.values()} == {STATES}
    mistral = folder(llm={"text_config": {"hidden_size": 5120}})
    assert problems("--model.flavor=flux2-dev", *mistral) == []
    [line] = problems("--model.flavor=flux2-klein-9b", *mistral)
    assert "gives 15360 features, as Mistral-Small-3.2 does, but flux2-klein-9b takes 12288" in line
    [line] = problems("--model.flavor=flux2-klein-9b", *folder(llm={"hidden_size": 2560}))
    assert "gives 7680 features, as Qwen3-4B does, but flux2-klein-9b takes 12288, Qwen3-8B's" in line


def test_what_is_not_here_or_broken_is_for_later(folder, tmp_path):
    assert problems("--model.flavor=flux-dev", "--encoder.t5_encoder=google/t5-v1_1-xxl") == []
    assert problems("--model.flavor=flux-dev", f"--encoder.t5_encoder={tmp_path}", *folder(clip=[1])) == []


def test_a_run_of_flux_dev_with_the_small_encoders_is_refused_before_torch(tmp_path):
    code = (
        "import sys\nfrom flux_trainer.cli.main import main\n"
        "words = ['--job.config_file', 'train_configs/emoji_tiny.toml', '--model.flavor', 'flux-dev']\n"
        "assert main(['config', '--quiet', *words]) == 2\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "gives 256 features, but flux-dev takes 4096" in done.stderr
