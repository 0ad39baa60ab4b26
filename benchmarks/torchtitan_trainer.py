"""torchtitan's own FLUX trainer beside ours, in one process: what `end_to_end.py` compares with.

Its code runs as it is installed: data set, tokenizers, encoders, step. Here is only what gets it to run in
this process, on the same weights and files, and what lets one see what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from peers import take_weights
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.overrides import TorchFunctionMode
from torch.utils.data import default_collate

from flux_trainer.encoders.text import TextEncoders
from flux_trainer.flux import FluxTrainer
from flux_trainer.models.layers import NORM_EPS

HOW_TO_INSTALL = (
    "torchtitan 0.3.0 is not installed, so our trainer is timed alone; "
    "`pip install --no-deps torchtitan==0.3.0 triton spmd_types==0.2.3 && pip install tyro einops datasets` "
    "installs what its FLUX trainer needs."
)
FLUX = "torchtitan.models.flux"


def installed() -> bool:
    return find_spec("torchtitan") is not None


class TorchTitan:
    """torchtitan's trainer with the weights and settings of ours, whose process group it joins."""

    def __init__(self, ours: FluxTrainer, samples: dict[str, Path], fsdp: bool) -> None:
        """`samples`: the image file of each caption. `fsdp`: False leaves out its `fully_shard`."""
        self.config, self.samples = ours.config, samples
        dump_folder = ours.dump_folder.with_name("torchtitan")
        text, device = ours.encoders.text, ours.device.type
        assert isinstance(text, TextEncoders)
        text.t5.save_pretrained(dump_folder / "t5")
        text.clip.save_pretrained(dump_folder / "clip")
        with mock.patch("torch._utils._get_available_device_type", return_value=device):
            utils: Any = import_module("torchtitan.tools.utils")
        utils.get_local_device = lambda: ours.device
        trainer: Any = import_module(f"{FLUX}.trainer")
        job = self.job(dump_folder, asdict(ours.encoders.autoencoder.config))
        if device == "cpu":
            metrics: Any = import_module("torchtitan.components.metrics")
            metrics.build_device_memory_monitor = lambda: no_memory_monitor(metrics)
        if not fsdp:
            job.model_spec = replace(job.model_spec, parallelize_fn=compile_only)
            trainer.parallelize_encoders = lambda t5_model, clip_model, **_: (t5_model, clip_model)
        self.trainer = trainer.FluxTrainer(job)
        self.module = trainer
        (self.model,) = self.trainer.model_parts
        narrow = ours.compute_dtype
        self.trainer.clip_encoder.to(narrow)
        if not fsdp:
            self.trainer.t5_encoder.to(narrow)
            if narrow != torch.float32:
                self.trainer.train_context = with_autocast(self.trainer.train_context, device, narrow)
        for module in self.model.modules():
            if isinstance(module, torch.nn.RMSNorm):
                module.eps = NORM_EPS  # torchtitan's is 1e-5, BFL's 1e-6
        plain = job.model_spec.model.build()
        self.entries = take_weights(plain, ours.parallel.parts[0], "torchtitan", torch.float32)
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.model, plain.state_dict(), options=options)
        self.batches = self.trainer.batch_generator(self.trainer.dataloader)

    def job(self, dump_folder: Path, autoencoder: dict[str, Any]) -> Any:
        """Its debug settings, changed to be ours."""
        ours, flux = self.config, import_module(FLUX)
        job = import_module(f"{FLUX}.config_registry").flux_debugmodel()
        images = import_module(f"{FLUX}.flux_datasets")
        images.DATASETS["ours"] = replace(
            images.DATASETS["coco-validation"], path="", loader=lambda _: self.table()
        )
        job.dump_folder = str(dump_folder)
        job.model_spec = flux.model_registry(ours.model.flavor)
        model = job.model_spec.model
        model.autoencoder = type(model.autoencoder)(**autoencoder)
        job.encoder.autoencoder_path = ours.encoder.autoencoder_path
        job.encoder.t5_encoder = str(dump_folder / "t5")
        job.encoder.clip_encoder = str(dump_folder / "clip")
        job.tokenizer.t5_tokenizer_path = ours.encoder.t5_tokenizer
        job.tokenizer.clip_tokenizer_path = ours.encoder.clip_tokenizer
        job.tokenizer.max_t5_encoding_len = ours.encoder.max_t5_encoding_len
        job.dataloader.dataset, job.dataloader.img_size = "ours", ours.training.img_size
        job.dataloader.prompt_dropout_prob = ours.training.classifier_free_guidance_prob
        job.training.local_batch_size = ours.training.local_batch_size
        job.training.max_norm, job.training.steps = ours.training.max_norm, ours.training.steps
        job.training.mixed_precision_param = ours.training.mixed_precision_param
        adam = ours.optimizer
        (group,) = job.optimizer.param_groups
        group.optimizer_kwargs.update(
            lr=adam.lr, betas=(adam.beta1, adam.beta2), eps=adam.eps, weight_decay=adam.weight_decay
        )
        job.compile.enable, job.compile.components = ours.compile.enable, [*ours.compile.components]
        job.metrics.log_freq = ours.metrics.log_freq
        job.activation_checkpoint, job.validator.enable = None, False
        return job

    def table(self) -> Any:
        """The samples as a Hugging Face data set with the columns of its COCO-Text."""
        datasets = import_module("datasets")
        columns = {"image": [str(path) for path in self.samples.values()], "caption": [*self.samples]}
        return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())

    def train(self, batch: tuple[dict[str, Any], Tensor]) -> None:
        """One step, as its `train` calls it."""
        self.trainer.step += 1
        self.trainer.train_step(iter([batch]))

    def batch(self, captions: list[str]) -> tuple[dict[str, Any], Tensor]:
        """The samples with these captions, as its data loader would give them."""
        images = import_module(f"{FLUX}.flux_datasets")
        process = images.DATASETS["ours"].sample_processor
        wanted = [list(self.samples).index(caption) for caption in captions]
        rows = self.table().select(wanted)
        found = [process(row, self.trainer.tokenizer, self.config.training.img_size) for row in rows]
        pixels = torch.stack([sample.pop("image") for sample in found])
        return default_collate(found), pixels

    def forward_backward(
        self, batch: tuple[dict[str, Any], Tensor], posterior: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What it makes of a batch, given its random numbers; and gradients by native names.

        Args:
            posterior: the autoencoder's noise [B, C, h, w]; `noise`: the flow's.
            t: [B].
        """
        values, pixels = batch
        with Given(iter([posterior, noise]), iter([t])):
            loss = self.trainer.forward_backward_step(input_dict=values, labels=pixels)
        theirs = {name: whole(p.grad) for name, p in self.model.named_parameters()}
        gradients = {}
        for name, entry in self.entries.items():
            parts = [theirs[run.name][run.start : run.start + run.length] for run in entry.runs]
            gradients[name] = torch.cat(parts).view(entry.shape)
        self.trainer.optimizers.zero_grad()
        found = {
            "T5's tokens": values["t5"].squeeze(1),
            "CLIP's tokens": values["clip"].squeeze(1),
            "images": pixels,
            "T5": values["t5_encodings"],
            "CLIP": values["clip_encodings"],
            "latents": values["img_encodings"],
            "loss": loss.detach(),
        }
        return found, gradients


class Given(TorchFunctionMode):
    """Answers `torch.randn_like` and `torch.rand` with what lies ready, in the order of the calls."""

    def __init__(self, normal: Iterator[Tensor], uniform: Iterator[Tensor]) -> None:
        super().__init__()
        self.ready = {torch.randn_like: normal, torch.rand: uniform}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.ready:
            return next(self.ready[func])
        return func(*args, **(kwargs or {}))


def whole(x: Tensor) -> Tensor:
    """The tensor that a DTensor on one rank stands for."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def compile_only(model: Any, *, compile_config: Any, **_: Any) -> Any:
    """In place of its `parallelize_flux`: compiled blocks, where the settings want them, and no FSDP."""
    if compile_config.enable:
        import_module(f"{FLUX}.parallelize").apply_compile(model, compile_config)
    return model


def with_autocast(
    context: Callable[[], AbstractContextManager[None]], device: str, dtype: torch.dtype
) -> Callable[[], AbstractContextManager[None]]:
    """Its context for forward and backward, and autocast within."""

    @contextmanager
    def both() -> Iterator[None]:
        with context(), torch.autocast(device, dtype):
            yield

    return both


def no_memory_monitor(metrics: Any) -> Any:
    """In place of its monitor, which asks an accelerator for its memory."""
    zeros = metrics.DeviceMemStats(*[0] * len(metrics.DeviceMemStats._fields))
    return SimpleNamespace(device_name="cpu", get_peak_stats=lambda: zeros, reset_peak_stats=lambda: None)
