"""The trainer's blocks attend as `[attention] backend` says, and a backend that cannot run stops it early."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.ranks import run_ranks
from helpers.tiny_run import TinyTrainer, tiny_config

from flux_trainer.models.backends import attention_by


def asked_for(folder: Path) -> tuple[set[bool], str]:
    """Whether each block attends by plain products; and the sentence that refuses cuDNN."""
    trainer = TinyTrainer(tiny_config(folder, "--attention.backend=math"))
    blocks = [block for _, block in trainer.parallel.parts[0].blocks()]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        TinyTrainer(tiny_config(folder, "--attention.backend=efficient"))
    return {block.attention is attention_by("math") for block in blocks}, str(refusal.value)


@pytest.mark.distributed
def test_a_run_attends_as_asked_for(tmp_path):
    attends, refusal = run_ranks(1, asked_for, tmp_path)[0]
    assert attends == {True}
    assert refusal == (
        'attention.backend = "efficient" runs on CUDA alone, not on cpu; take "auto", "flash" or "math"'
    )
