"""Validation: a figure that depends on weights and samples only, and leaves training as it was."""

import pytest
import torch
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config, train
from PIL import Image

from flux_trainer.data.bad import DataError

VALIDATION = [
    "--validation.enable",
    "--validation.freq=3",
    "--validation.timesteps=2",
    "--validation.denoising_steps=2",
    "--validation.prompts=a,b,c",
    "--validation.sources.0.type=synthetic",
    "--validation.sources.0.size=5",
]


def figures(run):
    return [line for line in run["lines"] if "validation_loss" in line]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    return train(folder, *VALIDATION, "--validation.local_batch_size=5"), folder


def test_it_runs_before_during_and_after_and_draws(one_rank):
    run, folder = one_rank
    assert [line["step"] for line in figures(run)] == [0, 3, 6]
    assert figures(run)[0]["validation_loss"] != figures(run)[2]["validation_loss"]
    assert figures(run)[2]["ema_validation_loss"] != figures(run)[2]["validation_loss"]
    pictures = sorted(path.name for path in (folder / "run/img").iterdir())
    assert pictures == ["ema_step-3.png", "ema_step-6.png", "step-0.png", "step-3.png", "step-6.png"]
    assert Image.open(folder / "run/img/step-6.png").width > 300


def test_it_leaves_no_trace_in_training(one_rank, tmp_path):
    plain = train(tmp_path)
    assert all(torch.equal(plain["tensors"][k], v) for k, v in one_rank[0]["tensors"].items())
    losses = [[line["loss"] for line in run["lines"] if "loss" in line] for run in (plain, one_rank[0])]
    assert losses[0] == losses[1]


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "batch"), [(1, 2), *slow((2, 2))])
def test_it_does_not_depend_on_ranks_and_batch(one_rank, tmp_path, ranks, batch):
    """Also where samples (5) and prompts (3) do not divide."""
    sizes = [f"--validation.local_batch_size={batch}", f"--training.local_batch_size={4 // ranks}"]
    flags = [*VALIDATION, *sizes]
    run = train(tmp_path, *flags) if ranks == 1 else run_ranks(ranks, train, tmp_path, *flags)[0]
    for got, want in zip(figures(run), figures(one_rank[0]), strict=True):
        for key, value in want.items():
            assert got[key] == pytest.approx(value, rel=1e-9), key
    for name in ("step-0.png", "ema_step-6.png"):
        got, want = (Image.open(folder / "run/img" / name) for folder in (tmp_path, one_rank[1]))
        assert got.tobytes() == want.tobytes()


def test_the_loss_is_the_mean_over_samples_times_and_elements(tmp_path):
    """Against a direct computation, sample by sample."""
    from flux_trainer.encoders.bundle import Encoded
    from flux_trainer.flow import rng
    from flux_trainer.flow.path import interpolate, velocity

    trainer = TinyTrainer(tiny_config(tmp_path, *VALIDATION))
    got = trainer.measure("")["validation_loss"]
    errors = []
    for i in range(5):
        sample = trainer.held_out.samples.get(i)
        text = trainer.encoders.text.encode(trainer.encoders.text.tokenize([sample.caption]))
        x_0 = trainer.encoders.encode_images(sample.image[None])
        encoded = Encoded(x_0, text.txt, text.vec)
        for k, t in enumerate([0.25, 0.75]):
            noise = rng.normal(
                0, rng.Purpose.VAL_NOISE, torch.tensor([2 * i + k]), trainer.latent_shape, torch.float64
            )
            t = torch.tensor([t], dtype=torch.float64)
            with torch.no_grad():
                v = trainer.predict(interpolate(x_0, noise, t), t, encoded)
            errors.append((v - velocity(x_0, noise)).square().mean().item())
    assert got == pytest.approx(sum(errors) / len(errors), rel=1e-12)


def test_without_one_usable_sample_it_says_so(tmp_path):
    folder = tmp_path / "held_out"
    folder.mkdir()
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a caption")
    source = ["--validation.sources.0.type=folder", f"--validation.sources.0.path={folder}"]
    with pytest.raises(DataError, match=r"Not one validation sample .*bad_samples\.jsonl says why"):
        TinyTrainer(tiny_config(tmp_path, "--validation.enable", *source)).measure("")
    assert "broken.png" in (tmp_path / "run/bad_samples.jsonl").read_text()
