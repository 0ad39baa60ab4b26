"""A reading as one aligned line of text, in torchtitan's manner."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

RESET = "\033[0m"
COLORS = {
    "step": "\033[31m",  # red
    "loss": "\033[32m",  # green
    "grad_norm": "\033[38;5;208m",  # orange
    "lr": "\033[33m",  # yellow
    "images_per_second": "\033[34m",  # blue
    "tokens_per_second": "\033[34m",
    "tflops": "\033[36m",  # cyan
    "mfu_percent": "\033[35m",  # magenta
    "memory": "\033[38;5;80m",  # turquoise
}

Number = float | int | None


def training_line(reading: Mapping[str, Number], total_steps: int, color: bool = False) -> str:
    """The console line of a `Meter` reading with loss, grad_norm, lr and skipped_steps."""
    step = f"{reading['step']:>{len(str(total_steps))}}/{total_steps}"
    fields = [
        ("step", "step", step),
        ("loss", "loss", _number(reading["loss"], "8.5f")),
        ("grad_norm", "grad_norm", _number(reading["grad_norm"], "8.4f")),
        ("lr", "lr", _number(reading["lr"], "8.2e")),
        ("images_per_second", "img/s", _rate(reading["images_per_second"])),
        ("tokens_per_second", "tok/s", _number(reading["tokens_per_second"], "9,.0f")),
        ("tflops", "tflops", _number(reading["tflops"], "6.2f")),
        ("mfu_percent", "mfu", _number(reading["mfu_percent"], "5.1f", "%")),
        ("memory", "memory", _memory(reading)),
        ("data_percent", "data", _number(reading["data_percent"], "4.1f", "%")),
        ("skipped_steps", "skipped", f"{reading['skipped_steps']}"),
        ("seconds_left", "left", duration(reading["seconds_left"])),
    ]
    return _join(fields, color)


def validation_line(
    step: int, total_steps: int, losses: Mapping[str, Number], seconds: float, color: bool = False
) -> str:
    """The console line of a validation: `losses` by name (`loss`, `ema_loss`), and the time it took."""
    fields = [("step", "validate step", f"{step:>{len(str(total_steps))}}/{total_steps}")]
    fields += [("loss", name, _number(value, "8.5f")) for name, value in losses.items()]
    return _join([*fields, ("time", "time", duration(seconds))], color)


def ending(step: int, total_steps: int, seconds: float, resumable: bool, cause: str = "a signal") -> str:
    """What is said after the last step: that the run is complete, or what stopped it, and how to go on."""
    if step == total_steps:
        return f"Training completed: step {step} of {total_steps}, {duration(seconds).strip()}"
    again = " The same command goes on from here." if resumable else ""
    return f"Stopped by {cause} after step {step} of {total_steps}.{again}"


def nothing_left(dump_folder: Path, step: int, total_steps: int) -> str:
    """What is said of a run that is complete already."""
    return (
        f"Nothing left to do: {dump_folder} is at step {step} of {total_steps}. Raise --training.steps, or "
        "choose another --job.dump_folder for a fresh run."
    )


def duration(seconds: Number) -> str:
    """`3:12`, `1:02:03` or `2d 01:02:03`, rounded to seconds and padded to eight characters."""
    if seconds is None:
        return f"{'n/a':>8}"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    if days:
        return f"{days}d {h:02}:{m:02}:{s:02}"
    return f"{f'{h}:{m:02}:{s:02}' if h else f'{m}:{s:02}':>8}"


def _number(value: Number, form: str, unit: str = "") -> str:
    width = int(form.split(".")[0].rstrip(","))
    return f"{'n/a':>{width + len(unit)}}" if value is None else f"{value:{form}}{unit}"


def _rate(value: Number) -> str:
    """Slow runs need the decimals."""
    return _number(value, "7.1f" if value is None or value >= 10 else "7.3f")


def _memory(reading: Mapping[str, Number]) -> str:
    if "memory_reserved_gib" in reading:
        percent = _number(reading["memory_reserved_percent"], "4.1f", "%")
        return f"{_number(reading['memory_reserved_gib'], '5.2f', 'GiB')}({percent})"
    return _number(reading["memory_rss_gib"], "5.2f", "GiB")


def _join(fields: list[tuple[str, str, str]], color: bool) -> str:
    """`name: text` pairs; the third of a field's triple is its text, the first picks its colour."""
    parts = (f"{name}: {text}" for _, name, text in fields)
    if color:
        parts = (f"{COLORS.get(key, '')}{name}: {text}{RESET}" for key, name, text in fields)
    return "  ".join(parts)
