"""Published weights that were distilled: what full training on the flow matching loss makes of them."""

from __future__ import annotations

from pathlib import Path

from flux_trainer.hub.detect import locate

_GUIDANCE = (
    "{name} was distilled to draw with a guidance value in place of classifier-free guidance. Training all "
    "weights undoes that. With flow.guidance = 1, the default, it becomes an undistilled model: draw from it "
    "with --guidance 1 and --cfg above 1. With any other value it learns to take no notice of guidance."
)
_STEPS = (
    "{name} was distilled to draw in four steps without guidance. Training all weights undoes that: it "
    "becomes an undistilled model, to be drawn from with some 50 steps and --cfg above 1. {instead}"
)
_BASE = "The weights to train are {0}'s, which are not distilled; if these are they, all is well."

_WARNINGS = {
    "flux-dev": _GUIDANCE.format(name="FLUX.1-dev"),
    "flux-schnell": _STEPS.format(name="FLUX.1-schnell", instead="FLUX.1-dev's steps were not distilled."),
    "flux2-dev": _GUIDANCE.format(name="FLUX.2-dev"),
    "flux2-klein-4b": _STEPS.format(name="FLUX.2-klein-4B", instead=_BASE.format("FLUX.2-klein-base-4B")),
    "flux2-klein-9b": _STEPS.format(name="FLUX.2-klein-9B", instead=_BASE.format("FLUX.2-klein-base-9B")),
}


def warning(flavor: str, path: str | Path) -> str | None:
    """What to tell who trains all of a flavor's weights from `path`; None if they are not distilled ones.

    Shapes do not tell klein's distilled weights from those of its base; a run's own are what it made of them.
    """
    return None if locate(path).kind == "checkpoint" else _WARNINGS.get(flavor)
