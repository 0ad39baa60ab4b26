"""Samples of different lengths in one batch: each is computed as if it were alone."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo
from helpers.small_model import arguments, small, small2
from torch._dynamo.utils import counters

from flux_trainer.config.compute import ActivationCheckpoint, Compile
from flux_trainer.models.attention import attention
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.remat import apply_checkpointing

CONFIGS = {"flux1": small(), "flux2": small2()}
TEXT, IMAGE = 5, 8
COUNTS = (8, 3, 3, 5)  # image tokens that count
LENGTHS = tuple((TEXT + n,) for n in COUNTS)


def build(config):
    torch.manual_seed(0)
    model = model_class(config)(config).double()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


def images(given):
    return ("img", "img_ids") if "img" in given else ("x", "x_ids")


def loss(model, given, count, **lengths):
    """Of each sample's tokens that count; what comes of the others must not matter."""
    out = model(**given, **lengths)
    channels = out.shape[2]
    weights = torch.linspace(-1, 1, IMAGE * channels, dtype=out.dtype).view(IMAGE, channels)
    return [(x[:n] * weights[:n]).sum() for x, n in zip(out, count, strict=True)]


@pytest.mark.parametrize("remat", ["none", "full", "selective"])
@pytest.mark.parametrize("family", CONFIGS)
def test_a_batch_computes_each_sample_as_if_it_were_alone(family, remat):
    """Outputs and every gradient, to rounding; padding holds values that would show."""
    model = build(CONFIGS[family])
    given = arguments(CONFIGS[family], len(COUNTS), image=IMAGE, text=TEXT)
    alone = []
    for i, n in enumerate(COUNTS):
        one = {name: x[i : i + 1, :n] if name in images(given) else x[i : i + 1] for name, x in given.items()}
        alone += loss(model, one, [n])
    sum(alone).backward()
    want = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    apply_checkpointing(model.blocks(), ActivationCheckpoint(mode=remat))
    together = loss(model, given, COUNTS, lengths=LENGTHS)
    sum(together).backward()
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-12)
    for name, p in model.named_parameters():
        assert (p.grad - want[name]).abs().max() <= 1e-12 * want[name].abs().max(), name


def test_padding_gets_zero_and_no_gradient():
    q, k, v = (torch.randn(4, 13, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3))
    out = attention(q, k, v, tuple(torch.empty(0, *each) for each in LENGTHS))
    assert not any(out[i, n:].any() for i, (n,) in enumerate(LENGTHS))
    out.sum().backward()
    assert not any(x.grad[i, n:].any() for x in (q, k, v) for i, (n,) in enumerate(LENGTHS))
    assert k.grad.abs().sum() > 0


@pytest.mark.slow
def test_compiled_blocks_follow_the_lengths():
    """No graph break, and after the first two batches no new graph, whatever the lengths."""
    config = CONFIGS["flux2"]
    plain, compiled = build(config), build(config)
    torch._dynamo.reset()
    compile_blocks([block for _, block in compiled.blocks()], Compile(enable=True, backend="aot_eager"))
    counters["stats"].clear()
    for counts in [(8, 3, 3, 5), (7, 4, 4, 6), (6, 2, 2, 8), (5, 6, 7, 8), (8, 8, 3, 2)]:
        given = arguments(config, 4, image=IMAGE, text=TEXT, seed=sum(counts))
        lengths = tuple((TEXT + n,) for n in counts)
        ours, theirs = (model(**given, lengths=lengths) for model in (compiled, plain))
        for x, y, n in zip(ours, theirs, counts, strict=True):
            assert (x[:n] - y[:n]).abs().max() <= 1e-12 * y.abs().max()
    assert counters["stats"]["unique_graphs"] == 4, "two of each kind of block: of given, then of any lengths"
