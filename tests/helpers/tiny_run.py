"""A whole training run in small: the real pipeline, with networks that take milliseconds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from helpers.small_model import small, small2
from safetensors.torch import save_file

from flux_trainer.config.load import load_config
from flux_trainer.config.schema import JobConfig
from flux_trainer.flux import FluxTrainer
from flux_trainer.models import registry
from flux_trainer.models.autoencoder import AutoEncoder, AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2, AutoEncoder2Config
from flux_trainer.models.init import Normal

ROOT = Path(__file__).parent.parent.parent
MODEL = small(vec_in_dim=16, context_in_dim=16)
MODEL2 = small2(in_channels=128, context_in_dim=3 * 16, use_guidance_embed=False)


def write_assets(folder: Path) -> None:
    """Config files of the text encoders and random autoencoders, of the smallest sizes that work."""
    t5 = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    clip = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    qwen3 = {"hidden_size": 16, "intermediate_size": 16, "head_dim": 8}
    for name, sizes in (("t5", t5), ("clip", clip), ("qwen3", qwen3)):
        config = json.loads((ROOT / f"assets/encoders/{name}-tiny/config.json").read_text())
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps({**config, **sizes}))
    torch.manual_seed(0)
    sizes = {"resolution": 16, "ch": 32, "ch_mult": (1, 1, 1, 1), "num_res_blocks": 1}
    for name, autoencoder in (
        ("ae", AutoEncoder(AutoEncoderConfig(**sizes, scale_factor=0.5, shift_factor=0.1))),
        ("flux2_ae", AutoEncoder2(AutoEncoder2Config(**sizes))),
    ):
        save_file(dict(autoencoder.state_dict()), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(asdict(autoencoder.config)))


def tiny_config(folder: Path, *flags: str) -> JobConfig:
    """Settings of a float64 run on synthetic 16-px images; assets and results lie in `folder`."""
    if not (folder / "flux2_ae.json").exists():
        write_assets(folder)
    autoencoder = "flux2_ae" if "--model.flavor=flux2-tiny" in flags else "ae"
    base = {
        "job.dump_folder": folder / "run",
        "model.flavor": "flux-tiny",
        "encoder.t5_encoder": folder / "t5",
        "encoder.clip_encoder": folder / "clip",
        "encoder.t5_tokenizer": ROOT / "assets/tokenizers/t5",
        "encoder.clip_tokenizer": ROOT / "assets/tokenizers/clip",
        "encoder.random_init": "true",
        "encoder.dtype": "float64",
        "encoder.autoencoder_dtype": "float64",
        "encoder.max_t5_encoding_len": 4,
        "encoder.llm_encoder": folder / "qwen3",
        "encoder.llm_tokenizer": ROOT / "assets/tokenizers/qwen3-tiny",
        "encoder.max_llm_encoding_len": 24,
        "encoder.autoencoder_path": folder / f"{autoencoder}.safetensors",
        "data.sources.0.type": "synthetic",
        "data.sources.0.size": 20,
        "data.num_workers": 0,
        "data.crop": "random",
        "data.flip_prob": 0.5,
        "training.img_size": 16,
        "training.local_batch_size": 4,
        "training.global_batch_size": 8,
        "training.steps": 6,
        "training.classifier_free_guidance_prob": 0.3,
        "training.max_norm": 0.01,
        "training.dtype": "float64",
        "training.mixed_precision_param": "float64",
        "training.mixed_precision_reduce": "float64",
        "optimizer.lr": 1e-2,
        "lr_scheduler.warmup_steps": 2,
        "ema.enable": "true",
        "ema.half_life": 20,
        "activation_checkpoint.mode": "none",
        "metrics.log_freq": 1,
    }
    return load_config([*(f"--{key}={value}" for key, value in base.items()), *flags])


class TinyTrainer(FluxTrainer):
    """FluxTrainer with a small network whose every weight is random: zero gates would hide mistakes."""

    def __init__(self, config: JobConfig) -> None:
        registry.FLAVORS.update({"flux-tiny": MODEL, "flux2-tiny": MODEL2})
        super().__init__(config)

    def build_model(self):
        model, distributions = super().build_model()
        return model, {name: Normal(0.2) for name in distributions}


def train(folder: Path, *flags: str) -> dict[str, Any]:
    """Run to the end; returns the lines of metrics.jsonl and all tensors of the last state, whole."""
    trainer = TinyTrainer(tiny_config(folder, *flags))
    trainer.train()
    tensors = {name: whole(tensor) for name, tensor in trainer.tensors().items()}
    return {"lines": lines(trainer.dump_folder), "tensors": tensors}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.clone()


def lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
