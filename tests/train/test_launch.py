"""Runs as a user starts them: run_train.sh, real processes, real signals."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_run import ROOT, lines

SMALL = [
    "--training.img_size=16",
    "--training.local_batch_size=2",
    "--metrics.log_freq=1",
    "--data.num_workers=1",
    "--validation.enable=false",
    "--checkpoint.interval=1000",
]


def start(folder: Path, *flags: str, ranks: int = 1, **variables: str) -> subprocess.Popen:
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "NGPU": str(ranks),
        "CONFIG_FILE": "train_configs/emoji_tiny.toml",
        **variables,
    }
    return subprocess.Popen(
        ["./run_train.sh", f"--job.dump_folder={folder}", *SMALL, *flags],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(launcher: int) -> list[int]:
    """Process ids of the ranks that torchrun has started."""
    found = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]


def start_two_ranks(folder: Path, *flags: str) -> subprocess.Popen:
    """An endless run of two ranks that has made its first steps."""
    run = start(folder, "--training.steps=100000", *flags, ranks=2)
    deadline = time.monotonic() + 200
    while len(lines(folder)) < 3 and time.monotonic() < deadline:
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.2)
    return run


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_rank_saves_and_stops_all_and_the_run_goes_on(tmp_path, number):
    run = start_two_ranks(tmp_path)
    os.kill(ranks_of(run.pid)[1], number)
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 0, output
    assert "Stopped by a signal" in output
    saved = [int(path.name.removeprefix("step-")) for path in (tmp_path / "checkpoint").glob("step-*")]
    assert saved == [lines(tmp_path)[-1]["step"]], "the last step is saved, nothing else"

    goal = saved[0] + 2
    again = start(tmp_path, f"--training.steps={goal}", "--training.global_batch_size=4")
    output, _ = again.communicate(timeout=200)
    assert f"Resumed from step {saved[0]}" in output
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, goal + 1))


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGKILL])
def test_what_ends_the_launcher_stops_the_ranks_and_they_save(tmp_path, number):
    """A closed terminal, whose SIGHUP it hands on, and its own death, which its ranks notice."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    run = start_two_ranks(tmp_path)
    signal.signal(signal.SIGHUP, before)
    ranks = ranks_of(run.pid)
    assert len(ranks) == 2
    run.send_signal(number)
    run.communicate(timeout=120)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.1)
    saved = [path.name for path in (tmp_path / "checkpoint").iterdir()]
    assert saved == [f"step-{lines(tmp_path)[-1]['step']}"]
    assert run.returncode == (128 + number if number == signal.SIGHUP else -number)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "seconds", "how"),
    [(signal.SIGKILL, 10, "is gone: its process died"), (signal.SIGSTOP, 4 + 10, "stands still")],
    ids=("killed", "stopped"),
)
def test_a_lost_rank_is_named_by_the_other_and_the_job_ends_without_saving(tmp_path, number, seconds, how):
    """Though torchrun would wait for ten minutes until it kills."""
    run = start_two_ranks(tmp_path, "--comm.train_timeout_seconds=4")
    began = time.monotonic()
    os.kill(ranks_of(run.pid)[1], number)
    output, _ = run.communicate(timeout=120)
    assert time.monotonic() - began < seconds
    assert run.returncode != 0
    assert f"Rank 1 (dp_shard 1; machine {socket.gethostname()}) {how}" in output
    assert "Stopped by a signal" not in output
    assert list((tmp_path / "checkpoint").iterdir()) == []


@pytest.mark.slow
def test_the_default_run_leaves_what_it_says(tmp_path):
    """Two steps of it, with pictures; the same command again has nothing left to do."""
    flags = ["--training.steps=2", "--training.img_size=64", "--validation.enable", "--validation.samples=4"]
    flags += ["--validation.denoising_steps=2", "--training.local_batch_size=4"]
    output, _ = start(tmp_path, *flags).communicate(timeout=280)
    for what in ("pictures", "figures", "TensorBoard", "checkpoint"):
        path = next(line.split()[-1] for line in output.splitlines() if f"  {what}:" in line)
        assert Path(path).exists(), output
    assert (tmp_path / "img" / "ema_step-2.png").is_file()
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = next(record for record in records if record["step"] == 2 and "loss" in record)
    assert {"step", "loss", "grad_norm", "lr", "samples_seen", "images_per_second"} <= training.keys()
    assert training["samples_seen"] == 8
    output, _ = start(tmp_path, *flags).communicate(timeout=100)
    assert "Nothing left to do" in output


@pytest.mark.slow
@pytest.mark.distributed
def test_two_machines_train_together(tmp_path):
    """Two launchers that meet at a port, as on two machines; their tensor-parallel group spans both."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    meet = {"NNODES": "2", "RDZV_ENDPOINT": f"localhost:{port}"}
    flags = ["--training.steps=3", "--parallelism.tensor_parallel_degree=2"]
    launchers = [start(tmp_path, *flags, **meet) for _ in range(2)]
    outputs = [launcher.communicate(timeout=300)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    assert "on 2 x cpu" in "".join(outputs)
    alone = tmp_path / "alone"
    start(alone, "--training.steps=3").communicate(timeout=300)
    for got, want in zip(lines(tmp_path), lines(alone), strict=True):
        assert got["loss"] == pytest.approx(want["loss"], rel=0.01), "bfloat16 sums in another order"
