"""One optimizer step of every flavor and every file of `train_configs/` at full size, without the memory.

Tensors are fake and so is the world (`helpers/fake_world.py`), of which this process is one rank. Settings,
trainer, parallel model, gradients, clipping, guard, optimizer and average are the real ones; stand-ins take
the place of data and encoders. Blocks are not compiled: the compiler would want to run what it has made.
"""

import gc
import re
from contextlib import ExitStack
from math import ceil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from helpers.fake_world import fake_world
from helpers.resident import needs_proc, peak, restart_peak
from helpers.tiny_run import ROOT
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from flux_trainer.config.load import load_config
from flux_trainer.config.schema import JobConfig
from flux_trainer.data.samples import Batch
from flux_trainer.encoders.bundle import Encoded
from flux_trainer.flow.latents import SPACES
from flux_trainer.flux import FluxTrainer
from flux_trainer.models import registry
from flux_trainer.models.model import FluxModel
from flux_trainer.parallel.arithmetic import tokens
from flux_trainer.parallel.mesh import DATA, SHARED
from flux_trainer.runtime.layout import local

FILES = {path.stem: path for path in sorted((ROOT / "train_configs").glob("*.toml"))}
UNNEEDED = ("compile", "checkpoint", "validation")


class NoEncoders:
    """Samples like those of the encoders: of the same shapes and dtypes."""

    def __init__(self, config: JobConfig) -> None:
        self.section, self.model = config.encoder, registry.FLAVORS[config.model.flavor]
        self.dtype = getattr(torch, config.encoder.autoencoder_dtype)
        self.text_length = tokens(config)[1]
        self.text = SimpleNamespace(txt_dim=self.model.context_in_dim, vec_dim=self.model.vec_in_dim)

    def encode_images(self, images):
        raise AssertionError("no prompt refers to an image")

    def encode(self, images, ids, drop_t5, drop_clip, noise=None, references=()) -> Encoded:
        size, _, height, width = images.shape
        dtype = getattr(torch, self.section.dtype)
        pooled = torch.empty(size, self.model.vec_in_dim, dtype=dtype) if self.model.vec_in_dim else None
        return Encoded(
            torch.empty(size, *SPACES[self.model.family].shape(height, width), dtype=self.dtype),
            torch.empty(size, self.text_length, self.model.context_in_dim, dtype=dtype),
            pooled,
        )


class FullSize(FluxTrainer):
    """Leaves out what needs a tensor's values."""

    def restore(self, distributions):
        """No initial weights: there is nothing to hold them."""

    def log(self, loss, grad_norm, lr):
        """No figures."""

    def forward_backward(self, micro_batches):
        """A pipeline's schedule would wait for its neighbours: run this rank's stages one by one."""
        pipeline = self.parallel.pipeline
        if not pipeline:
            return super().forward_backward(micro_batches)
        pipeline.inputs = [self.inputs(micro_batch) for micro_batch in micro_batches]
        like, _ = pipeline.shapes(pipeline.inputs[0])
        for index, micro_batch in enumerate(micro_batches):
            for stage, number in enumerate(pipeline.numbers):
                state = tuple(torch.empty_like(s, device="cpu", requires_grad=True) for s in like)
                output = pipeline._run(stage, state if number > 0 else (), index)
                if number == pipeline.last:
                    self.loss(output, micro_batch).backward()
                else:
                    assert [x.shape for x in output] == [s.shape for s in like]
                    torch.autograd.backward(output, [torch.empty_like(x) for x in output])
        return torch.zeros(())

    def batch(self) -> Batch:
        """Such as the loader gives this rank."""
        count = ceil(self.global_batch_size // self.mesh.size(*DATA) / self.mesh.size(*SHARED))
        size, flags = self.config.training.img_size, torch.zeros(count, dtype=torch.bool)
        return Batch(
            draws=torch.zeros(count, dtype=torch.int64),
            images=torch.zeros(count, 3, size, size, dtype=torch.uint8),
            captions=[""] * count,
            drop_t5=flags,
            drop_clip=flags,
            valid=~flags,
            bad=[],
            bad_draws=0,
        )


def one_step(folder: Path, ranks: int, *flags: str, rank: int = 0) -> int:
    """One step of a rank; returns how many bytes of parameters it holds, or would."""
    off = [f"--{section}.enable=false" for section in UNNEEDED]
    config = load_config([*flags, *off, "--metrics.enable_tensorboard=false", f"--job.dump_folder={folder}"])
    with ExitStack() as stack:
        fake = FakeTensorMode(allow_non_fake_inputs=True)  # meta tensors are there already

        def to_empty(part: nn.Module, *, device: torch.device) -> None:
            """From here on, where memory would be taken, tensors are fake."""
            stack.enter_context(fake)
            nn.Module.to_empty(part, device=device)

        stack.enter_context(fake_world(ranks, rank))
        stack.enter_context(patch("flux_trainer.flux.open_mixture", lambda *_: None))
        stack.enter_context(patch("flux_trainer.flux.Encoders", lambda *_: NoEncoders(config)))
        stack.enter_context(patch.object(FluxModel, "to_empty", to_empty))
        gc.disable()  # as `Trainer.train` does; it would take a third of the time
        stack.callback(gc.enable)
        trainer = FullSize(config)
        trainer.train_step(trainer.micro_batches(trainer.batch()))
    assert trainer.step == 1
    parameters = trainer.parameters.values()
    assert all(isinstance(local(p), FakeTensor) for p in parameters)
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in parameters]  # there is none without a gradient
    assert [x.shape for x in moments] == [p.shape for p in parameters]
    return sum(local(p).nbytes for p in parameters)


def world_of(path: Path) -> int:
    """The ranks that the command in the file's heading starts."""
    command = re.search(r"^# +((?:\w+=\S+ )*)\./run_train\.sh", path.read_text(), re.MULTILINE)
    assert command, f"{path} does not say how to start it"
    given = dict(word.split("=", 1) for word in command[1].split())
    return int(given.get("NGPU", 1)) * int(given.get("NNODES", 1))


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_file_runs_at_its_number_of_gpus(name, tmp_path):
    before = restart_peak()
    held = one_step(tmp_path, world_of(FILES[name]), f"--job.config_file={FILES[name]}")
    assert peak() - before < 1 << 28
    if name in ("flux_dev", "flux_schnell"):
        assert held > 5 << 30, "a world of 8 was meant, and float32"


def test_every_flavor_has_a_file():
    """Hence the test above runs every flavor."""
    flavors = {load_config([f"--job.config_file={path}"]).model.flavor for path in FILES.values()}
    assert flavors == registry.FLAVORS.keys()


HYBRID = {
    "parallelism.data_parallel_replicate_degree": 2,
    "parallelism.context_parallel_degree": 2,
    "parallelism.tensor_parallel_degree": 2,
    "activation_checkpoint.mode": "selective",
}
PIPELINE = {
    "parallelism.pipeline_parallel_degree": 4,
    "parallelism.pipeline_parallel_schedule": "Interleaved1F1B",
    "parallelism.tensor_parallel_degree": 2,
    "training.local_batch_size": 1,
    "training.global_batch_size": 16,
}
NO_ROWS = {"model.flavor": "flux-debug"}  # of its tensors with less than 256, for the last rank


@needs_proc
@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "rank", "settings"),
    [(64, 0, HYBRID), (64, 0, PIPELINE), (64, 63, PIPELINE), (256, 255, NO_ROWS)],
    ids=["hsdp2x8-cp2-tp2", "pp4-shard8-tp2-first", "pp4-shard8-tp2-last", "shard256-last"],
)
def test_larger_meshes(ranks, rank, settings, tmp_path):
    flags = [f"--job.config_file={FILES['flux_dev']}", *(f"--{k}={v}" for k, v in settings.items())]
    before = restart_peak()
    one_step(tmp_path, ranks, *flags, rank=rank)
    assert peak() - before < 1 << 28
