"""In a step that logs nothing the host reads no value of a tensor: on a GPU it would wait for it there."""

from __future__ import annotations

import pytest
import torch
from helpers.referring import referring_flags, write_referring
from helpers.tiny_run import TinyTrainer, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
}


class Reads(TorchDispatchMode):
    """Counts the operators whose result lies with the host, or has a shape that depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in READS:
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("refers", [False, True])
@pytest.mark.parametrize("flavor", ["flux-tiny", "flux2-tiny"])
def test_a_step_that_logs_nothing_reads_nothing(tmp_path, flavor, refers):
    flags = [f"--model.flavor={flavor}", "--metrics.log_freq=1000", "--training.local_batch_size=2"]
    if refers:
        write_referring(tmp_path / "data")
        flags += [*referring_flags(tmp_path / "data"), "--training.img_size=32"]
    trainer = TinyTrainer(tiny_config(tmp_path, *flags))
    trainer.loader = trainer.build_loader(0)
    with Reads() as reads:
        trainer.train_step(trainer.micro_batches(next(trainer.loader)))
    assert "aten._local_scalar_dense.default" in reads.seen, "the first step logs"
    for _ in range(2):
        batch = next(trainer.loader)
        with Reads() as reads:
            trainer.train_step(trainer.micro_batches(batch))
        assert reads.seen == []
    trainer.loader.close()
