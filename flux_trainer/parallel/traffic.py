"""How many bytes a rank sends in one optimizer step, by kind: the formulas of `docs/parallelism.md`.

A ring of n ranks sends (n - 1) / n of the whole tensor for an all-gather or a reduce-scatter, twice that for
an all-reduce. With m micro-batches,

    FSDP     all-gather      2 m times each block's weights (m times where they stay gathered, once under a
                             pipeline) and m times the root's, in the dtype of the computation
             reduce-scatter  m times all of them (once under such a pipeline), in the dtype of the sums
    HSDP     all-reduce      once what reduce-scatter has left
    tensor   all-reduce, all-gather    as `parallel/tensor.py` says
    context  all-to-all, ring, all-gather and reduce-scatter    as `parallel/context.py` says
    pipeline                 a state forward and its gradient back, each m times

Full checkpointing repeats what forward sends, and a memory budget may; the policies op and attention keep
what has come, and send nothing twice. `tests/parallel/test_traffic.py` counts real steps and compares. Where
tokens or heads do not divide by the ranks of a context parallel group, each sends a little more or less
(`parallel/context.py`).
Left out is what a step sends beside forward and backward: encoded samples, the gradients' norm, and the
gathered weights of the text encoder, which `flux-trainer estimate` adds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from flux_trainer.config.compute import ActivationCheckpoint
from flux_trainer.parallel.arithmetic import context_method
from flux_trainer.parallel.estimate import Part, Plan
from flux_trainer.parallel.remat import policies

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "ring", "pipeline")


def traffic(p: Plan, stages: Sequence[Part], mode: ActivationCheckpoint) -> dict[str, int]:
    """Bytes that a rank with these stages sends in a step, by kind (`KINDS`)."""
    sent: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
    for part in stages:
        _weights(p, part, sent)
        full = _repeats(part, mode)
        for index, name in enumerate(part.blocks):
            double = name.startswith("double")
            if p.sizes["tp"] > 1:
                _tensor(p, double, full[index], sent)
            if p.sizes["cp"] > 1:
                _context(p, full[index], sent)
        if p.sizes["pp"] > 1:
            state = p.batch * (sum(p.local_tokens) + p.model.state_vectors) * p.model.hidden_size
            ways = (not part.embedders) + (not part.head)  # a gradient back, a state forward
            sent["pipeline"] += p.micro_batches * ways * state * p.dtype("mixed_precision_param").itemsize
    return dict(sent)


def _repeats(part: Part, mode: ActivationCheckpoint) -> list[bool]:
    """Of each block, whether all of its forward is computed again, or may be."""
    return [policy in ("full", "memory_budget") for policy in policies(part.blocks, mode)]


def _weights(p: Plan, part: Part, sent: Counter[str]) -> None:
    compute = p.dtype("mixed_precision_param").itemsize
    reduce = p.dtype("mixed_precision_reduce").itemsize
    ranks, copies, m = p.fsdp, p.sizes["dp_replicate"], p.micro_batches
    once = p.hold and p.sizes["pp"] > 1
    for group in part.shapes:
        shard = part.shard(group, ranks)
        gathers = 1 if once else m if p.hold or not group else 2 * m
        sent["all-gather"] += gathers * (ranks - 1) * shard * compute
        sent["reduce-scatter"] += (1 if once else m) * (ranks - 1) * shard * reduce
        sent["all-reduce"] += 2 * (copies - 1) * shard * reduce // copies


def _tensor(p: Plan, double: bool, again: bool, sent: Counter[str]) -> None:
    n, h = p.sizes["tp"], p.model.hidden_size
    unit = p.micro_batches * p.dtype("mixed_precision_param").itemsize
    streams = 2 if double else 1
    sums = p.batch * sum(p.local_tokens) * h * streams
    back = sums + streams * 2 * p.model.head_dim
    gathered = 0
    if not p.model.shared_modulation:
        gathered = p.batch * h * (12 if double else 3)
        back += p.batch * h * streams
    forward = 2 if again else 1
    sent["all-reduce"] += 2 * (n - 1) * unit * (forward * sums + back) // n
    sent["all-gather"] += (n - 1) * unit * forward * gathered // n


def _context(p: Plan, again: bool, sent: Counter[str]) -> None:
    ranks, heads = p.sizes["cp"], p.model.num_heads // p.sizes["tp"]
    b = p.dtype("mixed_precision_param").itemsize
    c = torch.promote_types(p.dtype("mixed_precision_param"), torch.float32).itemsize
    unit = p.micro_batches * p.batch * p.model.head_dim * sum(p.tokens) * heads * (ranks - 1)  # x 1 / ranks
    forward = 2 if again else 1
    method = context_method(p.config.parallelism, heads)
    if method == "ulysses":
        sent["all-to-all"] += (forward + 1) * 4 * b * unit // ranks**2
    elif method == "ring":
        sent["ring"] += (forward * 2 * b + 2 * b + 2 * c) * unit // ranks
    else:
        sent["all-gather"] += forward * 2 * b * unit // ranks
        sent["reduce-scatter"] += 2 * c * unit // ranks
