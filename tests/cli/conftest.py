"""The small run that the tests of `flux-trainer generate` draw from; trained once."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """The folder of a run of two steps, and what that run drew while it validated: (Path, [pixels])."""
    from helpers.drawing import train
    from helpers.ranks import run_ranks

    folder: Path = tmp_path_factory.mktemp("generate")
    return folder, run_ranks(1, train, folder)[0]


@pytest.fixture
def flavor_of_the_run(monkeypatch):
    from helpers.tiny_run import MODEL

    from flux_trainer.models.registry import FLAVORS

    monkeypatch.setitem(FLAVORS, "flux-tiny", MODEL)
