"""metrics.jsonl, TensorBoard and W&B: what arrives where, and what a resume does to it."""

import builtins
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from flux_trainer.config.schema import Metrics
from flux_trainer.metrics.pictures import grid
from flux_trainer.metrics.writers import Writers


def lines(folder):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def test_lines_are_valid_json_even_for_nan(tmp_path):
    writers = Writers(Metrics(), tmp_path, rank=0)
    writers.scalars(1, {"step": 1, "loss": math.nan, "grad_norm": math.inf, "lr": 1e-4, "mfu_percent": None})
    writers.scalars(2, {"validation_loss": 0.5})
    assert lines(tmp_path) == [  # readable before close()
        {"step": 1, "loss": None, "grad_norm": None, "lr": 1e-4, "mfu_percent": None},
        {"step": 2, "validation_loss": 0.5},
    ]
    writers.close()


def test_other_ranks_write_nothing(tmp_path):
    writers = Writers(Metrics(enable_tensorboard=True, enable_wandb=True), tmp_path, rank=1)
    writers.scalars(1, {"loss": 1.0})
    writers.close()
    assert list(tmp_path.iterdir()) == []


def test_resume_drops_the_lines_after_the_checkpoint(tmp_path):
    writers = Writers(Metrics(), tmp_path, rank=0)
    for step in range(1, 8):
        writers.scalars(step, {"loss": float(step)})
    writers.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the crash tore the last line

    writers = Writers(Metrics(), tmp_path, rank=0, resumed_step=5)
    for step in range(6, 9):
        writers.scalars(step, {"loss": -float(step)})
    writers.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *((step, float(step)) for step in range(1, 6)),
        *((step, -float(step)) for step in range(6, 9)),
    ]


def test_resume_keeps_a_complete_file(tmp_path):
    writers = Writers(Metrics(), tmp_path, rank=0)
    writers.scalars(5, {"loss": 1.0})
    writers.scalars(5, {"validation_loss": 2.0})  # two lines of the same step
    writers.close()
    Writers(Metrics(), tmp_path, rank=0, resumed_step=5).close()
    assert len(lines(tmp_path)) == 2


def test_new_run_keeps_the_old_file_aside(tmp_path):
    for loss in (1.0, 2.0):
        writers = Writers(Metrics(), tmp_path, rank=0)
        writers.scalars(0, {"loss": loss})
        writers.close()
    assert lines(tmp_path) == [{"step": 0, "loss": 2.0}]
    assert json.loads((tmp_path / "metrics.previous.jsonl").read_text()) == {"step": 0, "loss": 1.0}


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writers = Writers(Metrics(enable_tensorboard=True), tmp_path, rank=0)
    writers.scalars(3, {"step": 3, "loss": 0.5, "validation_loss": 0.25, "lr": 1e-4, "mfu_percent": None})
    writers.scalars(6, {"loss": 9.0})
    picture = grid(torch.zeros(2, 3, 16, 16, dtype=torch.uint8), ["one", "two"])
    writers.images(3, "validation/pictures", picture, ["one", "two"])
    writers.close()
    writers = Writers(Metrics(enable_tensorboard=True), tmp_path, rank=0, resumed_step=5)
    writers.scalars(6, {"loss": 0.4})
    writers.close()

    events = EventAccumulator(str(tmp_path / "tb"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {"loss_metrics/global_avg_loss", "validation_metrics/loss", "lr"}
    losses = [(e.step, e.value) for e in events.Scalars("loss_metrics/global_avg_loss")]
    assert losses == [(3, 0.5), (6, pytest.approx(0.4))]  # the first life's step 6 is hidden
    image = events.Images("validation/pictures")[0]
    assert (image.step, image.width, image.height) == (3, *picture.size)


class FakeRun:
    id = "abc123"

    def __init__(self) -> None:
        self.logged: list = []
        self.finished = False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb(tmp_path, monkeypatch):
    runs, arguments = [], []

    def init(**kwargs):
        arguments.append(kwargs)
        runs.append(FakeRun())
        return runs[-1]

    fake = SimpleNamespace(init=init, Image=lambda picture, caption: ("image", caption))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setenv("WANDB_TEAM", "team")
    monkeypatch.setenv("WANDB_RUN_TAGS", "a,b")
    section = Metrics(enable_wandb=True)
    for resumed_step in (0, 5):
        writers = Writers(section, tmp_path, rank=0, resumed_step=resumed_step, config={"seed": 1})
        writers.scalars(6, {"loss": 0.5})
        writers.images(6, "pictures", grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["one"]), ["one"])
        writers.close()
    first, second = arguments
    assert (first["entity"], first["project"], first["tags"]) == ("team", "flux_trainer", ["a", "b"])
    assert first["config"] == {"seed": 1}
    assert (first["id"], first["resume"]) == (None, None)
    assert (second["id"], second["resume"]) == ("abc123", "allow")  # the same run goes on
    assert runs[0].logged == [(6, {"loss_metrics/global_avg_loss": 0.5}), (6, {"pictures": ("image", "one")})]
    assert runs[0].finished


def test_missing_wandb_names_the_command(tmp_path, monkeypatch):
    real_import = builtins.__import__

    def without_wandb(name, *args, **kwargs):
        if name == "wandb":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_wandb)
    with pytest.raises(ValueError, match=r'pip install "flux_trainer\[wandb\]"'):
        Writers(Metrics(enable_wandb=True), tmp_path, rank=0)


class Refusal(Exception):
    """As packages have of their own."""


def without_key(**words):
    raise Refusal("No API key configured.\n Use `wandb login`.")


def test_wandb_refuses_before_anything_is_changed(tmp_path, monkeypatch):
    writers = Writers(Metrics(), tmp_path, rank=0)
    writers.scalars(1, {"loss": 1.0})
    writers.close()
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=without_key))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"Weights & Biases cannot be used: No API .* Use .* \(`wandb lo"
        ):
            Writers(Metrics(enable_wandb=True), tmp_path, rank=0)
    assert lines(tmp_path) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("fails", ["log", "finish"])
def test_a_tracker_that_fails_later_is_left_out(tmp_path, monkeypatch, caplog, fails):
    run = FakeRun()

    def fail(*args, **words):
        raise Refusal("The service has ended.")

    monkeypatch.setattr(run, fails, fail)
    monkeypatch.setitem(
        sys.modules, "wandb", SimpleNamespace(init=lambda **words: run, Image=lambda *_, **__: 0)
    )
    writers = Writers(Metrics(enable_wandb=True, enable_tensorboard=True), tmp_path, rank=0)
    for step in (1, 2):
        writers.scalars(step, {"loss": 1.0})
    writers.images(2, "pictures", grid(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), ["one"]), ["one"])
    writers.close()
    assert len(lines(tmp_path)) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "Weights & Biases has failed and gets no more figures; metrics.jsonl has all of them: "
        "The service has ended."
    ]
    assert (run.logged == []) == (fails == "log")
    [events] = (tmp_path / "tb").iterdir()
    assert events.stat().st_size > 100


def test_starts_that_fail_do_not_replace_the_figures_of_the_last_run(tmp_path):
    writers = Writers(Metrics(), tmp_path, rank=0)
    writers.scalars(1, {"loss": 1.0})
    writers.close()
    for _ in range(3):
        Writers(Metrics(), tmp_path, rank=0).close()
    assert json.loads((tmp_path / "metrics.previous.jsonl").read_text()) == {"step": 1, "loss": 1.0}
