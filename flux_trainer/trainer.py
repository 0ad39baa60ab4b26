"""The training loop, once: accumulate, clip, guard, step, average, log, save, validate, stop.

`Trainer` knows nothing of FLUX: a subclass builds the model and the data, says what a batch becomes and what
its loss is. All randomness is a function of the position in the run, so the position is the only state here.
"""

from __future__ import annotations

import gc
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flux_trainer.checkpoint.commit import step_folder
from flux_trainer.checkpoint.identity import identity
from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.schema import JobConfig
from flux_trainer.config.shared import of_a_run
from flux_trainer.config.toml import to_toml
from flux_trainer.data.bad import BadSamples
from flux_trainer.data.loader import TrainLoader
from flux_trainer.data.samples import Batch
from flux_trainer.hub import distilled
from flux_trainer.hub.export import check_export, export
from flux_trainer.hub.load import load_weights
from flux_trainer.hub.weights import note
from flux_trainer.metrics.console import ending, nothing_left, training_line
from flux_trainer.metrics.memory import memory_readings
from flux_trainer.metrics.meter import Meter
from flux_trainer.metrics.peak import device_peak_flops
from flux_trainer.metrics.profiler import Profiler
from flux_trainer.metrics.writers import Writers
from flux_trainer.models.backends import check_backend
from flux_trainer.models.init import Distribution
from flux_trainer.models.model import Arguments, FluxModel
from flux_trainer.optim.build import build_optimizer, optimizer_tensors, set_lr
from flux_trainer.optim.build import step as optimizer_step
from flux_trainer.optim.ema import EMA
from flux_trainer.optim.guard import NONE, Guard, clip_grad_norm, raise_if_skipped_too_often
from flux_trainer.optim.in_backward import StepInBackward
from flux_trainer.optim.schedule import lr_factor
from flux_trainer.parallel.apply import parallelize
from flux_trainer.parallel.arithmetic import encodes_ahead, global_batch_size, micro_batches
from flux_trainer.parallel.fsdp import defer_all_reduce, reshard
from flux_trainer.parallel.init import default_dtype, init_weights
from flux_trainer.parallel.mesh import DATA, SHARED, build_mesh
from flux_trainer.parallel.stages import STAGES_PER_RANK, check_micro_batches
from flux_trainer.runtime import peers
from flux_trainer.runtime.agree import check_agreement
from flux_trainer.runtime.ahead import one_ahead
from flux_trainer.runtime.dist import init_distributed, set_deterministic
from flux_trainer.runtime.files import write_text
from flux_trainer.runtime.log import logger
from flux_trainer.runtime.signals import StopFlag


class Trainer(ABC):
    """Builds the parts of a run from its settings, trains, and leaves everything below `job.dump_folder`.

    A subclass gives the model (`build_model`), the data (`build_loader`), the meaning of a batch
    (`micro_batches`, `loss`) and, if it likes, `validate`.
    """

    def __init__(self, config: JobConfig) -> None:
        self.config = config
        self.dump_folder = Path(config.job.dump_folder)
        set_deterministic(config.debug.seed, config.debug.deterministic)
        patience = config.comm.init_timeout_seconds
        self.world = init_distributed(patience, config.comm.machine_timeout_seconds)
        check_agreement({**of_a_run(config), "torch's version": torch.__version__}, self.world)
        self.device = self.world.device
        self.mesh = build_mesh(config.parallelism, self.world.size, self.device.type, patience)
        self.world.set_timeout(patience)  # of FSDP's groups, too
        peers.introduce(self.mesh.place(STAGES_PER_RANK[config.parallelism.pipeline_parallel_schedule]))
        self.step = self.samples_seen = 0  # the latter is the position in the run's sample order

        training, groups = config.training, self.mesh.size(*DATA)
        self.compute_dtype: torch.dtype = getattr(torch, training.mixed_precision_param)
        self.global_batch_size = global_batch_size(training, groups)
        if self.mesh.pp:
            count = micro_batches(training, groups)
            check_micro_batches(config.parallelism.pipeline_parallel_schedule, self.mesh.size("pp"), count)

        # The model: on the meta device, then sharded, and only then given memory.
        with torch.device("meta"), default_dtype(getattr(torch, training.dtype)):
            model, distributions = self.build_model()
        self.architecture = model.config
        check_export(config.checkpoint.export, self.architecture)
        backend, head_dim = config.attention.backend, model.config.head_dim
        check_backend(backend, self.device, self.compute_dtype, head_dim, training=True)
        size = sum(p.numel() for p in model.parameters())
        self.parallel = parallelize(
            model,
            self.mesh,
            tokens=self.tokens_per_sample(),
            parallelism=config.parallelism,
            activation_checkpoint=config.activation_checkpoint,
            compile=config.compile,
            param_dtype=self.compute_dtype,
            reduce_dtype=getattr(torch, training.mixed_precision_reduce),
            attention=config.attention,
            quantize=config.quantize,
        )
        self.layouts = self.parallel.layouts
        for part in self.parallel.parts:
            part.to_empty(device=self.device)
        self.parameters = {n: p for part in self.parallel.parts for n, p in part.named_parameters()}
        logger.info(
            f"{config.job.description}: model {config.model.name} {config.model.flavor}: {size:,} parameters "
            f"on {self.world.size} x {self.device.type}"
        )

        # What changes the weights, and what is kept of them.
        self.optimizer = build_optimizer(
            self.parameters.items(), config.optimizer, seed=config.debug.seed, layouts=self.layouts
        )
        at_once = config.optimizer.in_backward
        self.in_backward = StepInBackward(self.optimizer, self.parameters.items()) if at_once else None
        self.guard = Guard(training.spike_factor, self.device)
        ema = config.ema
        self.ema = EMA(self.parameters.items(), ema.half_life, ema.rampup_ratio) if ema.enable else None
        self.checkpoints = CheckpointManager(config.checkpoint, self.dump_folder, self.world, self.layouts)
        self.restore(distributions)

        # What people see.
        self.bad_samples = BadSamples(self.dump_folder)
        self.meter = Meter(
            total_steps=training.steps,
            devices=self.world.size,
            peak_flops=device_peak_flops(self.device),
        )
        self.writers = Writers(
            config.metrics,
            self.dump_folder,
            rank=self.world.rank,
            resumed_step=self.step,
            config=config.model_dump(),
        )
        self.profiler = Profiler(
            config.profiling, self.dump_folder, rank=self.world.rank, device=self.device, step=self.step
        )
        self.color = sys.stderr.isatty() and not config.metrics.disable_color_printing
        if self.world.rank == 0:
            write_text(self.dump_folder / "config.toml", to_toml(config))

    # What a subclass says.

    @abstractmethod
    def build_model(self) -> tuple[FluxModel, Mapping[str, Distribution]]:
        """The plain model, and the distribution of each weight. Runs on the meta device."""

    @abstractmethod
    def build_loader(self, start_draw: int) -> TrainLoader:
        """This rank's share of each global batch, beginning at sample `start_draw` of the run."""

    @abstractmethod
    def micro_batches(self, batch: Batch) -> list[Any]:
        """Cut a rank's batch into what one forward pass takes."""

    @abstractmethod
    def inputs(self, micro_batch: Any) -> Arguments:
        """The model's arguments by name, or this rank's part of them."""

    @abstractmethod
    def loss(self, output: Tensor, micro_batch: Any) -> Tensor:
        """The loss of what the model made of a micro-batch: all ranks' add up to the global batch's."""

    @abstractmethod
    def work(self, micro_batch: Any) -> tuple[int, int]:
        """Tokens of a micro-batch, and floating-point operations of its forward and backward."""

    @abstractmethod
    def tokens_per_sample(self) -> tuple[int, int]:
        """Image and text tokens of one sample, by which a pipeline is cut."""

    def validate(self) -> None:  # noqa: B027  # optional
        """Measure and draw, without touching the state of training."""

    # The run.

    def train(self) -> None:
        """Train to the last step or until a signal asks to stop; with checkpoints on, save that state."""
        training = self.config.training
        if self.step >= training.steps:
            logger.info(nothing_left(self.dump_folder, self.step, training.steps))
            self.finish()
            return
        self.loader = self.build_loader(self.samples_seen)
        batches = self.batches()
        if self.device.type == "cuda" and encodes_ahead(training, self.mesh.sizes):
            batches = one_ahead(batches, self.device)
        first_step = self.step + 1
        gc.disable()  # a collection stalls one rank, and with it all others: collect on all at the same step
        if self.step == 0:
            self.run_validation()
        logger.info(f"Training starts at step {first_step}")
        with StopFlag(self.world) as stop:  # until all is closed: a late signal must not lose figures
            with self.profiler:
                stopped = False
                while self.step < training.steps and not stopped:
                    peers.mark(self.step + 1)
                    batch, micro_batches = next(batches)
                    self.bad_samples.count(len(batch.draws), batch.bad_draws, batch.bad)
                    self.train_step(micro_batches)
                    del micro_batches  # or they would lie beside the next ones
                    self.profiler.step()
                    stopped = stop.poll()
                    self.after_step(stopped)
                    if self.step == first_step:
                        self.world.set_timeout(self.config.comm.train_timeout_seconds)
            gc.enable()
            self.loader.close()
            resumable = self.config.checkpoint.enable
            logger.info(ending(self.step, training.steps, self.meter.elapsed, resumable, stop.cause))
            self.finish()

    def batches(self) -> Iterator[tuple[Batch, list[Any]]]:
        """This rank's part of each global batch that is left, and its micro-batches."""
        for _ in range(self.step, self.config.training.steps):
            with self.meter.data_wait():
                batch = next(self.loader)
            peers.mark()
            yield batch, self.micro_batches(batch)

    def train_step(self, micro_batches: list[Any]) -> None:
        """One optimizer step on the global batch of which `micro_batches` are this rank's part."""
        config = self.config
        lr = config.optimizer.lr * lr_factor(self.step + 1, config.lr_scheduler, config.training.steps)
        set_lr(self.optimizer, lr)
        loss = self.forward_backward(micro_batches)
        peers.mark()
        grad_norm = clip_grad_norm(
            self.parameters,
            config.training.max_norm,
            group=dist.group.WORLD,
            copies=self.mesh.size("dp_replicate"),
            layouts=self.layouts,
            tp_rank=self.mesh.coordinates["tp"],
            freed=self.in_backward.norms if self.in_backward else NONE,
        )
        skip = self.guard(grad_norm)
        self.step += 1
        self.samples_seen += self.global_batch_size
        optimizer_step(self.optimizer, skip)
        self.optimizer.zero_grad()
        if self.ema:
            self.ema.update(self.samples_seen, self.global_batch_size, skip)
        self.meter.update(self.global_batch_size, map(self.work, micro_batches))
        if self.step == 1 or self.step % config.metrics.log_freq == 0 or self.step == config.training.steps:
            self.log(loss, grad_norm, lr)

    def forward_backward(self, micro_batches: list[Any]) -> Tensor:
        """Add up gradients over the micro-batches; returns this rank's share of the loss, on the device."""
        if self.parallel.pipeline:
            return self.parallel.pipeline.forward_backward(
                [self.inputs(micro_batch) for micro_batch in micro_batches],
                lambda output, number: self.loss(output, micro_batches[number]),
            )
        (model,) = self.parallel.parts
        total = torch.zeros((), device=self.device)
        for index, micro_batch in enumerate(micro_batches):
            defer_all_reduce(model, is_last=index == len(micro_batches) - 1)
            loss = self.loss(model(**self.inputs(micro_batch)), micro_batch)
            peers.mark()
            loss.backward()
            peers.mark()
            total = total + loss.detach()
        return total

    def after_step(self, stopped: bool) -> None:
        """What is due between this step and the next."""
        peers.mark()
        done = self.step == self.config.training.steps
        ends, section = done or stopped, self.config.checkpoint
        due = ends or (section.enable and self.step % section.interval == 0)
        if due and self.guard.has_learned(self.step, ends=ends, in_part=self._has_stepped_in_backward):
            self.save(wait=ends)
        if done or (not stopped and self.step % self.config.validation.freq == 0):
            self.run_validation()
        if self.step % self.config.training.gc_freq == 0:
            gc.collect(1)

    def _has_stepped_in_backward(self) -> bool:
        """Whether any parameter of any rank has."""
        return bool(self.in_backward and self.world.sum([float(self.in_backward.has_stepped())])[0])

    # Figures.

    def log(self, loss: Tensor, grad_norm: Tensor, lr: float) -> None:
        """One line of figures. The only place in a step that waits for the device."""
        bad = self.bad_samples
        share = loss.item() if self.mesh.coordinates["tp"] == 0 else 0.0  # tp ranks compute the same loss
        work = self.meter.work if self.mesh.rank(*SHARED) == 0 else (0, 0)
        loss_of_all, bad_draws, draws, *work_of_all = self.world.sum([share, bad.bad_draws, bad.draws, *work])
        reading = self.meter.read(
            self.step,
            {
                "loss": loss_of_all,
                "grad_norm": grad_norm,
                "lr": lr,
                "samples_seen": self.samples_seen,
                "skipped_steps": self.guard.skipped.int(),
                "longest_skip": self.guard.longest_skip.int(),
                "bad_samples": int(bad_draws),
                **memory_readings(self.device),
            },
            work_of_all,
        )
        self.guard.longest_skip.zero_()  # each line tells of the steps since the one before
        logger.info(training_line(reading, self.config.training.steps, self.color))
        self.writers.scalars(self.step, reading)
        bad.raise_if_too_many(int(bad_draws), int(draws), self.config.data.max_bad_fraction)
        skips, most = int(reading["longest_skip"] or 0), self.config.training.max_skipped_steps
        raise_if_skipped_too_often(skips, self.step, most, in_backward=bool(self.in_backward))

    def run_validation(self) -> None:
        """Validate, and keep the time it takes out of the training speed."""
        if self.config.validation.enable:
            with self.meter.pause():
                self.validate()

    def reshard(self) -> None:
        """Free the weights that FSDP has gathered."""
        for part in self.parallel.parts:
            reshard(part)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the context the model computes with the EMA's weights."""
        assert self.ema
        self.reshard()  # gathered copies hold the other weights
        with self.ema.swapped_in():
            yield
            self.reshard()

    # Checkpoints.

    def identity(self) -> dict[str, Any]:
        """What a resumed run must share with the one that wrote the checkpoint."""
        return identity(self.config, self.global_batch_size)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of a checkpoint, live and by native name."""
        tensors: dict[str, Tensor] = {name: p.detach() for name, p in self.parameters.items()}
        tensors |= optimizer_tensors(self.optimizer, self.parameters.items())
        tensors |= self.guard.tensors()
        return tensors | (self.ema.tensors() if self.ema else {})

    def save(self, wait: bool) -> None:
        """Write a checkpoint of this step, of the last also for others; `wait`: until it is on disk."""
        if self.config.checkpoint.enable:
            with self.meter.pause():
                state = {"step": self.step, "samples_seen": self.samples_seen, "identity": self.identity()}
                self.checkpoints.save(self.step, self.tensors(), {**state, "model": note(self.architecture)})
                if wait:
                    self.checkpoints.wait()
                if self.step == self.config.training.steps:
                    step = step_folder(self.checkpoints.folder, self.step)
                    folder = self.dump_folder / "export" / step.name
                    export(self.config.checkpoint, step, folder, self.architecture, self.world.checkpoint)

    def restore(self, distributions: Mapping[str, Distribution]) -> None:
        """Go on from the newest checkpoint, else start from `initial_load_path`, else from random weights."""
        section = self.config.checkpoint
        state = self.checkpoints.resume(self.tensors(), self.identity()) if section.enable else None
        if state is not None:
            self.step, self.samples_seen = state["step"], state["samples_seen"]
            self.guard.longest_skip.zero_()  # or a run saved amid skips would stop at its first line
            logger.info(f"Resumed from step {self.step}")
            return
        if path := section.initial_load_path:
            parameters, group = {n: p.detach() for n, p in self.parameters.items()}, self.world.checkpoint
            what = load_weights(path, parameters, group, self.layouts, config=self.architecture)
            logger.info(f"Started from weights: {what}")
            if self.world.rank == 0 and (told := distilled.warning(self.config.model.flavor, path)):
                logger.warning(told)
        else:
            for part in self.parallel.parts:
                init_weights(part, distributions, self.config.debug.seed, self.layouts)
        if self.ema:
            self.ema.reset()

    def finish(self) -> None:
        """Close everything, and say where things are."""
        self.checkpoints.close()
        self.writers.close()
        for what, path in self.outputs().items():
            logger.info(f"  {what + ':':<12} {path}")

    def outputs(self) -> dict[str, Path]:
        """What the run has left, and where."""
        config, outputs = self.config, {"figures": self.dump_folder / "metrics.jsonl"}
        if config.metrics.enable_tensorboard:
            outputs["TensorBoard"] = self.dump_folder / config.metrics.save_tb_folder
        if config.checkpoint.enable:
            outputs["checkpoint"] = self.dump_folder / config.checkpoint.folder / f"step-{self.step}"
        return outputs

    def close(self) -> None:
        """Leave the process group, together with all other ranks."""
        self.world.close()
