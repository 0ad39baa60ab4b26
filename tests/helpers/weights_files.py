"""The same small weights in every layout that others write, made without this project's converter.

`family` says of which model, FLUX.1 or FLUX.2.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Literal

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_trainer.checkpoint.manager import CheckpointManager
from flux_trainer.config.schema import Checkpoint
from flux_trainer.hub.convert import convert
from flux_trainer.hub.families import family_of
from flux_trainer.hub.weights import open_weights
from flux_trainer.models.autoencoder import AutoEncoderConfig
from flux_trainer.models.autoencoder2 import AutoEncoder2Config
from flux_trainer.models.configs import Flux1Config, Flux2Config

Name = Literal["flux1", "flux2"]

GOLDEN = Path(__file__).parents[1] / "golden"
EPS = GOLDEN / "flux1_eps"
CONFIG = Flux1Config(**json.loads((EPS / "config.json").read_text())["bfl"])
CONFIG2 = Flux2Config(**json.loads((GOLDEN / "flux2_eps" / "config.json").read_text())["bfl"])
CONFIGS = {"flux1": CONFIG, "flux2": CONFIG2}
SMALL = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 2}
SMALL_AE, SMALL_AE2 = AutoEncoderConfig(**SMALL), AutoEncoder2Config(**SMALL)


def go(source, target, to, dtype=None, config=None, **options):
    convert(open_weights(source, config=config, ahead=True), target, to, dtype, **options)
    return target


def same_files(left: Path, right: Path) -> bool:
    """Whether two safetensors files hold the same bytes under the same names."""
    a, b = load_file(left), load_file(right)
    return a.keys() == b.keys() and all(
        (a[n].dtype, a[n].shape) == (b[n].dtype, b[n].shape)
        and torch.equal(a[n].reshape(-1).view(torch.uint8), b[n].reshape(-1).view(torch.uint8))
        for n in a
    )


def random_file(config, path: Path, dtype) -> Path:
    """A BFL file of a model with random weights, written by the safetensors library."""
    save_file(random_weights(config, dtype), path)
    return path


def random_weights(config, dtype=torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    family = family_of(config)
    shapes = family.shapes(config)
    weights = {
        name: (0.1 * torch.randn(shape, generator=generator)).to(dtype) for name, shape in shapes.items()
    }
    weights |= {name: torch.tensor(1001) for name in family.counters}
    weights |= {name: x.abs() + 0.1 for name, x in weights.items() if name.endswith("running_var")}
    return weights


def native(family: Name = "flux1") -> dict[str, Tensor]:
    """The golden weights by native name."""
    return load_file(GOLDEN / f"{family}_eps" / "weights_bfl.safetensors")


def bfl(folder: Path, family: Name = "flux1") -> Path:
    return Path(shutil.copy(GOLDEN / f"{family}_eps" / "weights_bfl.safetensors", folder / "bfl.safetensors"))


def diffusers(folder: Path, family: Name = "flux1") -> Path:
    """A pipeline's folder with a transformer of one file."""
    part = folder / "pipeline" / "transformer"
    part.mkdir(parents=True)
    golden = GOLDEN / f"{family}_eps"
    shutil.copy(golden / "weights_diffusers.safetensors", part / "diffusion_pytorch_model.safetensors")
    config = json.loads((golden / "config.json").read_text())["diffusers"]
    name = {"flux1": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel"}[family]
    (part / "config.json").write_text(json.dumps({"_class_name": name, **config}))
    (part.parent / "model_index.json").write_text("{}")
    return part.parent


def sharded(folder: Path, family: Name = "flux1") -> Path:
    """A transformer's folder with two files and an index."""
    part = diffusers(folder / "sharded", family) / "transformer"
    file = part / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    file.unlink()
    names = sorted(weights)
    index = {}
    for i, chosen in enumerate((names[::2], names[1::2]), start=1):
        shard = f"diffusion_pytorch_model-{i:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in chosen}, part / shard, metadata={"format": "pt"})
        index |= dict.fromkeys(chosen, shard)
    text = json.dumps({"metadata": {}, "weight_map": index})
    (part / "diffusion_pytorch_model.safetensors.index.json").write_text(text)
    return part


def comfy(folder: Path, family: Name = "flux1") -> Path:
    """All of a pipeline in one file, norms as `.weight`."""
    weights = {f"model.diffusion_model.{torchtitan_name(name)}": x for name, x in native(family).items()}
    weights |= {
        "vae.encoder.conv_in.weight": torch.zeros(1),
        "text_encoders.clip_l.position_ids": torch.arange(3),
    }
    save_file(weights, folder / "comfy.safetensors")
    return folder / "comfy.safetensors"


def torchtitan_name(name: str) -> str:
    return name.removesuffix(".scale") + ".weight" if name.endswith(".scale") else name


def torchtitan(folder: Path, family: Name = "flux1") -> Path:
    """A DCP step with an optimizer and entries that are no tensors. It has this model's guidance embedding,
    which torchtitan's own does not."""
    state = {torchtitan_name(name): x for name, x in native(family).items()}
    state |= {"optimizer.state.img_in.weight.exp_avg": torch.zeros(2), "train_state": {"step": 5}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder / "titan" / "step-5", no_dist=True)
    return folder / "titan"


def own(folder: Path, family: Name = "flux1") -> Path:
    """The dump folder of a run with two checkpoints; the average is the negative of the weights."""
    from flux_trainer.runtime.dist import World

    alone = World(0, 0, 1, torch.device("cpu"), None, None)
    manager = CheckpointManager(Checkpoint(enable=True), folder / "run", alone)
    weights = native(family)
    for step, scale in ((9, 0.0), (10, 1.0)):
        tensors = {name: x * scale for name, x in weights.items()}
        tensors |= {f"ema.{name}": -x for name, x in weights.items()} | {"guard.skipped": torch.zeros(())}
        tensors |= {f"optimizer.state.{name}.exp_avg": x for name, x in weights.items()}
        manager.save(step, tensors, {"step": step})
    manager.close()
    return folder / "run"


ALL = {f.__name__: f for f in (bfl, diffusers, sharded, comfy, torchtitan, own)}
