"""What a rank holds at the peak of forward and backward, composed of what single blocks cost.

With blocks 1..n, kept_k the bytes that block k keeps, backward_k its peak in backward, and G_k what FSDP
holds meanwhile,

    peak = stored + max over k of (kept_1 + ... + kept_(k-1) + backward_k + G_k + gradients so far)

G_k is the gathered weights of the root, of block k and of those to come next (`fsdp_prefetch`), and the
buffer through which the gradients of the one before are summed; or all gathered weights of the stage where
they stay. Under a pipeline, what the other micro-batches in flight keep is added.

With host offload, what blocks keep in large tensors is away, but of two blocks: the one in backward and the
one before it, which comes back meanwhile. A block's input counts as kept by the block before.

Not counted: workspaces inside operators, the allocator's fragments, the CUDA context and NCCL's buffers.
A compiled block keeps less; what a memory budget leaves is put at its upper end.

The root's gradients wait for those of the embedders: as long as backward runs, those of the head.

`tests/parallel/test_estimate.py` compares with measured peaks of flux-tiny and flux2-tiny on CPUs (first the
whole peak, then the part of it that is neither weights nor optimizer state):

    one rank, float32 and bfloat16, each checkpointing mode,
    without and with references of different numbers            -0.1 to +0.1 %    -0.2 to +0.3 %
    the same so narrow that activations are most of it, each
    mode, policies by kind, every second block, offload         -1.1 to -0.2 %    -2.9 to -0.4 %
    pp2 (1F1B, 4 micro-batches), bfloat16, both ranks           +0.1 to +0.8 %    +0.3 to +1.6 %
    (torch 2.15: FLUX.2's +1.2 %)

and with imagined peers, bfloat16

    fsdp2 and fsdp2 x tp2, each mode; hsdp 2x2, cp2, fsdp2 x cp2, cp4 (ring, allgather) and
    cp2 x tp2, selective                                        -0.7 to +0.1 %    -1.9 to +0.3 %

Larger meshes, offload on any of them, other products with a pipeline, and GPUs have not been compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flux_trainer.config.compute import ActivationCheckpoint
from flux_trainer.parallel.arithmetic import encodes_ahead
from flux_trainer.parallel.estimate import Costs, Part, Plan
from flux_trainer.parallel.remat import policies
from flux_trainer.parallel.stages import STAGES_PER_RANK
from flux_trainer.runtime.live_bytes import Cost


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank."""

    parameters: int
    gathered: int
    """Low-precision copies of weights that FSDP has gathered."""
    gradients: int
    """When backward is done."""
    gradients_at_peak: int
    reduction: int
    """Whole gradients on their way into sums over ranks, or waiting for them."""
    optimizer: int
    ema: int
    activations: int
    """All that forward and backward hold at the peak."""
    host: int
    """In host memory, at the most."""

    @property
    def stored(self) -> int:
        return self.parameters + self.optimizer + self.ema

    @property
    def training(self) -> int:
        """The peak of forward and backward."""
        return self.stored + self.gathered + self.gradients_at_peak + self.reduction + self.activations


def memory(p: Plan, stages: Sequence[Part], rank: int, cost: Costs, section: ActivationCheckpoint) -> Memory:
    """What `rank` of the pipeline holds at the peak of forward and backward.

    Args:
        cost: of blocks under the policies of `section`.
    """
    stored, compute = p.dtype("dtype").itemsize, p.dtype("mixed_precision_param").itemsize
    wide = max(stored, torch.float32.itemsize)
    moment = getattr(torch, p.config.optimizer.state_dtype or p.config.training.dtype).itemsize
    at_once = p.config.optimizer.in_backward  # gradients are freed as they come
    reduce = p.dtype("mixed_precision_reduce").itemsize
    groups = [(part, name) for part in stages for name in part.shapes]
    count = sum(len(part.shapes[name]) for part, name in groups)
    elements = sum(part.shard(name, p.fsdp) for part, name in groups)
    walks = [_walk(part, cost, section) for part in stages]
    away = [sum(_away(name, c, section) for name, c in walk) for walk in walks]
    kept = [sum(c.kept for _, c in walk) - gone for walk, gone in zip(walks, away, strict=True)]
    others = _in_flight(p, rank, kept) + _pipeline_buffers(p, rank, stages)
    pe = p.batch * sum(p.local_tokens) * p.model.head_dim * torch.float32.itemsize
    whole = sum(part.numel(name) for part, name in groups)
    late = p.sizes["pp"] > 1 and p.hold and p.wraps  # gradients wait, whole, for the end of the step
    accumulates = p.micro_batches > 1
    best: Memory | None = None
    for part, walk, own in zip(stages, walks, kept, strict=True):
        root, names = part.numel(""), [name for name, _ in walk]
        for k, (name, c) in enumerate(walk):
            before = sum(each.kept for _, each in walk[:k])
            before -= sum(_away(other, each, section) for other, each in walk[: max(0, k - 1)])
            later = names[k + 1 :]
            # The root's gradients wait, whole, until those of the embedders are there.
            waiting = part.head if k + 1 < len(walk) else 0
            done = sum(part.shard(other, p.fsdp) for other in later if other)
            if not p.wraps:
                done += waiting
            if at_once:
                done = 0
            gathered = reduction = 0
            if p.wraps:
                first = max(0, k - p.config.parallelism.fsdp_prefetch)
                ahead = sum(part.numel(other) for other in names[first:k] if other)
                here = part.numel(name) if name else 0
                gathered = compute * (whole if p.hold else root + here + ahead)
                previous = later[0] if later else ""
                sent = part.numel(previous) if previous else 0
                kept_apart = (accumulates and not late) or reduce != stored  # else it is the gradient
                if previous and kept_apart and not at_once:
                    sent += part.shard(previous, p.fsdp)
                reduction = reduce * (sent + (whole if late and accumulates else 0)) + compute * waiting
            candidate = Memory(
                parameters=elements * stored,
                gathered=gathered,
                gradients=0 if at_once else stored * elements,
                gradients_at_peak=stored * (elements if accumulates and not late else done),
                reduction=reduction,
                optimizer=2 * elements * moment + 4 * count,
                ema=elements * wide if p.config.ema.enable else 0,
                activations=others - own + before + c.backward + pe,
                host=_in_flight(p, rank, away),
            )
            if best is None or candidate.training > best.training:
                best = candidate
    assert best
    return best


def _walk(part: Part, cost: Costs, section: ActivationCheckpoint) -> list[tuple[str, Cost]]:
    """What runs one after another in forward; the root's part is named ""."""
    ends = next(iter(cost.values()))
    walk = []
    if part.embedders:
        walk.append(("", ends["embedders"]))
    for name, policy in zip(part.blocks, policies(part.blocks, section), strict=True):
        walk.append((name, cost[policy][name.split(".")[0]]))
    if part.head:
        walk.append(("", ends["head"]))
    return walk


def _away(name: str, cost: Cost, section: ActivationCheckpoint) -> int:
    """What a module keeps in host memory."""
    return cost.kept_large if section.offload and name else 0


def _in_flight(p: Plan, rank: int, kept: Sequence[int]) -> int:
    """The most bytes that all micro-batches on their way keep on this rank; kept: by its stages.

    The schedules' own arithmetic: so many forwards in advance, then one forward and one backward in turn.
    """
    ranks, n, chunks = p.sizes["pp"], p.micro_batches, len(kept)
    if ranks == 1:
        return kept[0]
    if STAGES_PER_RANK[p.config.parallelism.pipeline_parallel_schedule] == 1:
        return min(n, ranks - rank) * kept[0]
    together = n // max(1, n // ranks)  # micro-batches that pass one stage before the next stage's turn
    ahead = min(n * chunks, (chunks - 1) * together + 2 * (ranks - 1 - rank) + 1)
    alive = most = 0
    for forward in range(n * chunks):
        alive += kept[forward // together % chunks]
        most = max(most, alive)
        done = forward + 1 - ahead
        if done >= 0:
            alive -= kept[chunks - 1 - done // together % chunks]
    return most


def _pipeline_buffers(p: Plan, rank: int, stages: Sequence[Part]) -> int:
    """Room for the states and gradients to come of all micro-batches, and for those on their way."""
    if p.sizes["pp"] == 1:
        return 0
    state = (sum(p.local_tokens) + p.model.state_vectors) * p.batch * p.model.hidden_size
    state *= p.dtype("mixed_precision_param").itemsize
    buffers = sum((not part.embedders) + (not part.head) for part in stages)
    flying = min(p.micro_batches, p.sizes["pp"] - rank)
    return (p.micro_batches * buffers + 2 * flying * len(stages)) * state


def samples(p: Plan) -> int:
    """Bytes of a step's encoded samples: noisy latents, targets, and the captions' features."""
    wide = torch.promote_types(p.dtype("mixed_precision_param"), torch.float32).itemsize
    text = getattr(torch, p.config.encoder.dtype).itemsize
    features = p.tokens[1] * p.model.context_in_dim + p.model.vec_in_dim
    latents = p.tokens[0] * p.model.in_channels
    return p.micro_batches * p.batch * (2 * latents * wide + features * text)


def ahead(p: Plan, encoding: int) -> int:
    """Bytes that lie beside all parts of a step where encoders work ahead: `encoding`, which they take at
    their peak, and three steps' samples. They belong to another stream, so nothing else gets them."""
    return encoding + 3 * samples(p) if encodes_ahead(p.config.training, p.sizes) else 0
