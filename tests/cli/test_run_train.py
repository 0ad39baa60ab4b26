"""`run_train.sh`: what it checks first, and what it hands to torchrun (a stand-in that prints its call)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.headers import write_header

ROOT = Path(__file__).parents[2]
SHOWN = (
    "PYTORCH_ALLOC_CONF",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE",
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
    "OMP_NUM_THREADS",
)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Call the script with environment and arguments, from a folder that holds a sound a.toml."""
    write_header(tmp_path / "ae.safetensors", {})
    text = '[encoder]\nautoencoder_path = "ae.safetensors"\n[[data.sources]]\ntype = "synthetic"\n'
    (tmp_path / "a.toml").write_text(text)
    stub = tmp_path / "python"
    shown = "".join(f'echo "{name}=${{{name}-}}"\n' for name in SHOWN)
    stub.write_text(
        '#!/bin/sh\nif [ "$2" = flux_trainer.launch ]; then\npwd\nprintf "%s\\n" "$*"\n'
        f'{shown}exit 0; fi\nexec "{sys.executable}" "$@"\n'
    )
    stub.chmod(0o755)
    for name in (
        *SHOWN,
        "NGPU",
        "NNODES",
        "LOG_RANK",
        "CONFIG_FILE",
        "RDZV_ENDPOINT",
        "CUDA_VISIBLE_DEVICES",
    ):
        monkeypatch.delenv(name, raising=False)

    def _run(
        *words: str, script: Path = ROOT / "run_train.sh", **env: str
    ) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHON": str(stub), "PYTHONPATH": str(ROOT), **env}
        return subprocess.run(
            [str(script), *words], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )

    return _run


def test_one_process_keeps_the_terminal_and_all_threads(run, tmp_path):
    done = run("--training.steps", "10", CONFIG_FILE="a.toml", NGPU="1")
    assert done.returncode == 0, done.stderr
    folder, call, *environment = done.stdout.splitlines()
    assert folder == str(tmp_path)
    assert call == (
        "-m flux_trainer.launch --nnodes 1 --nproc_per_node 1 --rdzv_backend c10d --rdzv_id flux_trainer "
        "--rdzv_endpoint localhost:0 -m flux_trainer.train --job.config_file a.toml --training.steps 10"
    )
    assert environment == [
        "PYTORCH_ALLOC_CONF=expandable_segments:True",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1",
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT=600",
        "OMP_NUM_THREADS=",
    ]


def test_several_processes_are_filtered_and_share_the_cores(run):
    done = run("--job.description=a b", CONFIG_FILE="a.toml", NGPU="2", LOG_RANK="0,1")
    _, call, *environment = done.stdout.splitlines()
    assert "--nproc_per_node 2 " in call
    assert " --local-ranks-filter 0,1 --role rank --tee 3 -m flux_trainer.train " in call
    assert call.endswith("--job.config_file a.toml --job.description=a b")
    assert environment[-1] == f"OMP_NUM_THREADS={max(os.cpu_count() // 2, 1)}"
    kept = run(CONFIG_FILE="a.toml", NGPU="2", OMP_NUM_THREADS="7", TORCH_ELASTIC_SHUTDOWN_TIMEOUT="9")
    assert kept.stdout.splitlines()[-2:] == ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT=9", "OMP_NUM_THREADS=7"]


def test_several_machines_count_in_the_check(run):
    words = ["--parallelism.data_parallel_shard_degree", "4"]
    done = run(*words, CONFIG_FILE="a.toml", NGPU="2", NNODES="2", RDZV_ENDPOINT="host0:29500")
    assert done.returncode == 0, done.stderr
    assert "--nnodes 2 --nproc_per_node 2" in done.stdout
    assert "--rdzv_endpoint host0:29500" in done.stdout
    assert run(*words, CONFIG_FILE="a.toml", NGPU="2").returncode == 2


def test_a_mistake_stops_it_before_anything_starts(run):
    done = run("--training.stepz", "10", CONFIG_FILE="a.toml", NGPU="1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "command line: training.stepz: unknown key; did you mean training.steps?\n"


def test_help_starts_nothing(run):
    done = run("--help", "ema")
    assert done.returncode == 0
    assert "[ema]" in done.stdout
    assert "flux_trainer.launch" not in done.stdout


@pytest.mark.parametrize(("devices", "processes"), [("0,3,5", 3), ("2", 1), ("", 1)])
def test_visible_devices_count(run, devices, processes):
    done = run(CONFIG_FILE="a.toml", CUDA_VISIBLE_DEVICES=devices)
    assert f"--nproc_per_node {processes} " in done.stdout


def test_the_default_run_moves_to_the_repository(run, tmp_path):
    repository = tmp_path / "somewhere" / "repo"
    (repository / "train_configs").mkdir(parents=True)
    shutil.copy(ROOT / "run_train.sh", repository)
    write_header(repository / "ae.safetensors", {})
    (repository / "train_configs" / "emoji_tiny.toml").write_text((tmp_path / "a.toml").read_text())
    done = run(script=repository / "run_train.sh", NGPU="1")
    assert done.returncode == 0, done.stderr
    folder, call, *_ = done.stdout.splitlines()
    assert folder == str(repository)
    assert call.endswith("--job.config_file ./train_configs/emoji_tiny.toml")


def test_a_file_given_as_a_setting_replaces_the_default(run):
    for words in (["--job.config_file", "a.toml"], ["--job.config_file=a.toml"]):
        done = run(*words, NGPU="1")
        assert done.returncode == 0, done.stderr
        assert "emoji_tiny" not in done.stdout
    assert (
        "a.toml --training.steps 3"
        in run("--job.config_file", "a.toml", "--training.steps", "3", NGPU="1").stdout
    )


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(
            (name, value, "an integer >= 1")
            for name in ("NGPU", "NNODES")
            for value in ("abc", "0", "1:2", "08")
        ),
        ("NGPU", "auto", "an integer >= 1"),
        ("LOG_RANK", "first", "ranks such as 0 or 0,1"),
        ("LOG_RANK", "0,", "ranks such as 0 or 0,1"),
    ],
)
def test_what_is_no_number_is_refused(run, name, value, expected):
    done = run(CONFIG_FILE="a.toml", **{"NGPU": "2", name: value})
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"{name}={value}: expected {expected}\n"


def test_ranks_that_are_not_there_cannot_be_shown(run):
    done = run(CONFIG_FILE="a.toml", NGPU="2", LOG_RANK="0,2")
    assert (done.returncode, done.stderr) == (2, "LOG_RANK=0,2: this machine has the ranks 0 to 1\n")
    assert run(CONFIG_FILE="a.toml", NGPU="", NNODES="", LOG_RANK="").returncode == 0, (
        "empty: as if not given"
    )


def test_several_machines_need_a_place_to_meet(run):
    done = run(CONFIG_FILE="a.toml", NGPU="1", NNODES="2")
    assert done.returncode == 2
    assert "RDZV_ENDPOINT=HOST:PORT" in done.stderr
