"""TensorBoard and Weights & Biases, each imported only when it is switched on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flux_trainer.metrics.meter import Reading

# Names under which trackers show a reading's fields: torchtitan's, where the meaning is the same.
TAGS = {
    "loss": "loss_metrics/global_avg_loss",
    "mfu_percent": "mfu(%)",
    "seconds_per_step": "time_metrics/end_to_end(s)",
    "data_seconds_per_step": "time_metrics/data_loading(s)",
    "data_percent": "time_metrics/data_loading(%)",
    "memory_reserved_gib": "memory/max_reserved(GiB)",
    "memory_reserved_percent": "memory/max_reserved(%)",
    "memory_active_gib": "memory/max_active(GiB)",
    "memory_active_percent": "memory/max_active(%)",
    "memory_rss_gib": "memory/max_rss(GiB)",
    "alloc_retries": "memory/num_alloc_retries",
    "ooms": "memory/num_ooms",
    "images_per_second": "throughput/images_per_second",
    "tokens_per_second": "throughput/tokens_per_second",
    "validation_loss": "validation_metrics/loss",
    "ema_validation_loss": "validation_metrics/ema_loss",
}


def one_line(error: Exception) -> str:
    """What another package's error says, without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def tagged(values: Reading) -> dict[str, float]:
    """`values` under their tracker names, without the step and without what is unknown."""
    return {TAGS.get(name, name): v for name, v in values.items() if name != "step" and v is not None}


class TensorBoard:
    """Event files in a folder; on a resume, what lies after the resumed step is hidden."""

    def __init__(self, folder: Path, resumed_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        purge_step = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def scalars(self, step: int, values: Reading) -> None:
        for tag, value in tagged(values).items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        self._writer.add_image(tag, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A W&B run, named by torchtitan's environment variables (WANDB_TEAM, WANDB_PROJECT, WANDB_RUN_NAME ...).

    The run's id is kept in the dump folder, so that a resumed run continues the same W&B run.
    """

    def __init__(self, dump_folder: Path, resumed_step: int, config: Mapping[str, Any]) -> None:
        """Begin or continue the run.

        Raises:
            ValueError: the package is not installed, or W&B refuses: there is no key, no connection, ...
        """
        try:
            import wandb
        except ImportError as error:
            raise ValueError(
                'metrics.enable_wandb needs the package wandb: pip install "flux_trainer[wandb]" '
                f"({one_line(error)})"
            ) from error

        id_file = dump_folder / "wandb_run_id.txt"
        known_id = id_file.read_text().strip() if resumed_step and id_file.exists() else None
        env = os.environ
        dump_folder.mkdir(parents=True, exist_ok=True)
        self._wandb: Any = wandb
        words = {
            "dir": str(dump_folder),
            "entity": env.get("WANDB_TEAM"),
            "project": env.get("WANDB_PROJECT", "flux_trainer"),
            "name": env.get("WANDB_RUN_NAME"),
            "id": env.get("WANDB_RUN_ID", known_id),
            "notes": env.get("WANDB_RUN_NOTES"),
            "tags": env["WANDB_RUN_TAGS"].split(",") if "WANDB_RUN_TAGS" in env else None,
            "group": env.get("WANDB_RUN_GROUP"),
            "job_type": env.get("WANDB_RUN_JOB_TYPE"),
            "resume_from": env.get("WANDB_RESUME_FROM"),
            "fork_from": env.get("WANDB_FORK_FROM"),
            "resume": "allow" if known_id else None,
            "config": dict(config),
        }
        try:
            self._run: Any = wandb.init(**words)
        except Exception as error:  # of its own classes, of its connections, of other packages
            raise ValueError(
                f"Weights & Biases cannot be used: {one_line(error)} (`wandb login` stores a key, "
                "WANDB_MODE=offline keeps the figures on this disk, --metrics.no-enable_wandb does without)"
            ) from error
        id_file.write_text(self._run.id + "\n")

    def scalars(self, step: int, values: Reading) -> None:
        self._run.log(tagged(values), step=step)

    def images(self, step: int, tag: str, picture: Image.Image, captions: Sequence[str]) -> None:
        self._run.log({tag: self._wandb.Image(picture, caption="\n".join(captions))}, step=step)

    def close(self) -> None:
        self._run.finish()
