"""What a rank will hold and send, from the settings alone: no weights are allocated, no process is started.

Weights, gradients and optimizer state are exact: the shapes of a stage's parameters after tensor
parallelism, of which FSDP's first rank holds ceil(rows / ranks) rows.

Activations come from one block of each kind, run forward and backward on fake tensors of the real shapes,
with the real checkpointing, tensor and context parallelism. `held` composes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil, prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from flux_trainer.config.compute import ActivationCheckpoint, Parallelism
from flux_trainer.config.schema import JobConfig
from flux_trainer.flow.loss import flow_loss
from flux_trainer.models import registry
from flux_trainer.models.backends import attention_by
from flux_trainer.models.configs import ModelConfig
from flux_trainer.models.model import FluxModel, State
from flux_trainer.models.on_cpu import as_elsewhere
from flux_trainer.models.sinusoids import rope_table
from flux_trainer.parallel import offload
from flux_trainer.parallel.apply import context_parallel, use_attention
from flux_trainer.parallel.arithmetic import (
    check_mesh,
    cuts,
    degrees,
    holds_weights,
    micro_batches,
    reference_tokens,
    tokens,
)
from flux_trainer.parallel.cast import read_as
from flux_trainer.parallel.cut import take
from flux_trainer.parallel.group import shares
from flux_trainer.parallel.mesh import DATA, Mesh, build_mesh
from flux_trainer.parallel.remat import apply_checkpointing, policies
from flux_trainer.parallel.tensor import tensor_parallel
from flux_trainer.runtime.live_bytes import Cost, fill_fake, measure

MODES = {
    "none": ActivationCheckpoint(mode="none"),
    "selective op": ActivationCheckpoint(mode="selective"),
    "attention": ActivationCheckpoint(mode="attention"),
    "full": ActivationCheckpoint(mode="full"),
}
Costs = dict[str, dict[str, Cost]]
"""One micro-batch's, by policy of checkpointing, then by kind of block, "embedders" and "head"."""


@dataclass(frozen=True)
class Part:
    """The parameters of a stage, of which FSDP's groups are the root (embedders, head) and each block."""

    blocks: list[str]
    """Names of its blocks; the kind of each is the first word."""
    shapes: dict[str, list[tuple[int, ...]]]
    """By group ("" for the root): of the parameters, after tensor parallelism."""
    embedders: bool
    head: int
    """Elements of the head's parameters; 0 where another stage has it."""

    def numel(self, group: str) -> int:
        return sum(prod(shape) for shape in self.shapes[group])

    def shard(self, group: str, ranks: int) -> int:
        """Elements of the first of `ranks` ranks, which has the most."""
        return sum(ceil(shape[0] / ranks) * prod(shape[1:]) for shape in self.shapes[group])


@dataclass(frozen=True)
class Plan:
    """What the settings come to."""

    config: JobConfig
    model: ModelConfig
    sizes: dict[str, int]
    """The mesh."""
    micro_batches: int
    """Of a step on each rank."""
    tokens: tuple[int, int]
    """Tokens of a sample: those of the image with the most that its references come to, and of the text."""
    references: int
    """Of the former."""
    local_tokens: tuple[int, int]
    """Those of the first rank of a context parallel group."""

    def size(self, *dimensions: str) -> int:
        return prod(self.sizes[name] for name in dimensions)

    @property
    def batch(self) -> int:
        return self.config.training.local_batch_size

    @property
    def encoder_calls(self) -> int:
        """Of a rank in a step: the ranks that work on the same samples encode a part of them each."""
        samples = ceil(self.micro_batches * self.batch / self.size("pp", "cp", "tp"))
        return ceil(samples / self.batch)

    @property
    def fsdp(self) -> int:
        """Ranks that share each weight."""
        return self.size("dp_shard", "cp")

    @property
    def wraps(self) -> bool:
        """Whether the model is FSDP's."""
        return self.size("dp_replicate", "dp_shard", "cp") > 1

    @property
    def hold(self) -> bool:
        """Whether gathered weights stay between forward and backward."""
        return holds_weights(self.config.parallelism)

    def dtype(self, key: str) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, getattr(self.config.training, key))
        return dtype


def plan(config: JobConfig, world_size: int) -> Plan:
    """The arithmetic of a run on `world_size` ranks.

    Raises:
        ConfigError: the mesh cannot run these settings.
    """
    check_mesh(config, world_size)
    sizes = degrees(config.parallelism, world_size)
    count = micro_batches(config.training, prod(sizes[name] for name in DATA))
    (image, text), references, cp = tokens(config), reference_tokens(config), sizes["cp"]
    local = (shares(image, cp)[0] + shares(references, cp)[0], shares(text, cp)[0])
    model = registry.FLAVORS[config.model.flavor]
    return Plan(config, model, sizes, count, (image + references, text), references, local)


@contextmanager
def sharing(p: Plan) -> Iterator[Mesh | None]:
    """A fake process group for the ranks that share samples' tokens and features; nothing is sent."""
    if p.size("cp", "tp") == 1:
        yield None
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=p.size("cp", "tp"))
    try:
        section = Parallelism(
            data_parallel_shard_degree=1,
            context_parallel_degree=p.sizes["cp"],
            tensor_parallel_degree=p.sizes["tp"],
        )
        yield build_mesh(section, p.size("cp", "tp"), "cpu")
    finally:
        dist.destroy_process_group()


def parts(p: Plan, rank: int, mesh: Mesh | None) -> list[Part]:
    """The stages of a rank of the pipeline (the whole model without one)."""
    with torch.device("meta"):
        model = registry.model_class(p.model)(p.model)
    if mesh and mesh.tp:
        tensor_parallel(model.blocks(), mesh.tp)
    names = [name for name, _ in model.blocks()]
    shapes: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    before: list[tuple[int, ...]] = []
    head: list[tuple[int, ...]] = []
    for name, parameter in model.named_parameters():
        block = ".".join(name.split(".")[:2])
        end = head if name.split(".")[0] in model.HEAD else before
        shapes.get(block, end).append(tuple(parameter.shape))
    stages = cuts(p.model, tokens(p.config), p.config.parallelism)
    found = []
    for stage in range(rank, len(stages), p.sizes["pp"]):
        first, last = stage == 0, stage == len(stages) - 1
        blocks = [names[i] for i in stages[stage]]
        root = (before if first else []) + (head if last else [])
        groups = {"": root, **{name: shapes[name] for name in blocks}}
        found.append(Part(blocks, groups, first, sum(map(prod, head)) if last else 0))
    return found


def describe(section: ActivationCheckpoint) -> str:
    """The settings in a few words."""
    values = {"selective": section.selective_ac_option, "memory_budget": f"{section.memory_budget:g}"}

    def words(policy: str) -> str:
        return f"{policy} {values[policy]}" if policy in values else policy

    kinds = ((kind, getattr(section, kind)) for kind in ("double_blocks", "single_blocks"))
    parts = [words(section.mode), *(f"{kind} {words(policy)}" for kind, policy in kinds if policy)]
    return ", ".join([*parts, *(["offload"] if section.offload else [])])


def costs(p: Plan, mesh: Mesh | None, section: ActivationCheckpoint) -> Costs:
    """What modules cost under each policy that `section` comes to."""
    depths = {"double_blocks": p.model.depth, "single_blocks": p.model.depth_single_blocks}
    wanted = set(policies([f"{kind}.{i}" for kind, depth in depths.items() for i in range(depth)], section))
    if "memory_budget" in wanted:
        wanted |= {"none", "full"}
    found = {policy: _costs(p, mesh, policy) for policy in sorted(wanted - {"memory_budget"})}
    if "memory_budget" in wanted:
        found["memory_budget"] = {
            name: _within(section.memory_budget, low, found["none"][name])
            for name, low in found["full"].items()
        }
    return found


def _within(budget: float, low: Cost, high: Cost) -> Cost:
    """Of a block that keeps that share of what lies between its inputs and all that autograd would keep: the
    compiler, whose share is of what it would keep, keeps less."""
    kept, large = (
        round(a + budget * (b - a)) for a, b in ((low.kept, high.kept), (low.kept_large, high.kept_large))
    )
    return Cost(kept, large, max(low.forward, high.forward), max(low.backward, high.backward))


def _costs(p: Plan, mesh: Mesh | None, policy: str) -> dict[str, Cost]:
    kinds = {"double_blocks": min(1, p.model.depth), "single_blocks": min(1, p.model.depth_single_blocks)}
    small = replace(p.model, depth=kinds["double_blocks"], depth_single_blocks=kinds["single_blocks"])
    with torch.device("meta"):
        model = registry.model_class(small)(small)
    ends = {
        "embedders": take(model, (), embedders=True, head=False),
        "head": take(model, (), embedders=False, head=True),
    }
    if mesh and mesh.tp:
        tensor_parallel(model.blocks(), mesh.tp)
    blocks = [block for _, block in model.blocks()]
    attend = attention_by(
        "math" if p.config.attention.backend == "math" else "flash"
    )  # the others keep as much
    context = context_parallel(p.config.parallelism, mesh, p.model.num_heads, attend) if mesh else None
    if context:
        context.begin(p.tokens[1], p.tokens[0] - p.references, context.padded(p.references))
    use_attention(blocks, context.attention if context else attend)
    mode = "selective" if policy == "op" else policy
    apply_checkpointing(model.blocks(), ActivationCheckpoint.model_validate({"mode": mode}))
    with FakeTensorMode(), as_elsewhere():
        weights = {name: _present(p, end) for name, end in ends.items()}
        state = _state(p, ends["embedders"])
        of_double, of_single = (tuple(map(_leaf, each)) for each in model.modulations(state))
        pe = rope_table(torch.cat(_positions(p), dim=1), p.model.axes_dim, p.model.theta)
        txt_img = _leaf(torch.cat((state[1], state[0]), dim=1))
        taken = {
            "double_blocks": (*state[:2], *of_double, pe, *_lengths(p)),
            "single_blocks": (txt_img, *of_single, pe, *_lengths(p)),
        }
        found = {}
        for name, block in model.blocks():
            kind = name.split(".")[0]
            found[kind] = _block_cost(p, block, taken[kind])
        return found | {name: _end_cost(p, end, weights[name], state) for name, end in ends.items()}


def _lengths(p: Plan) -> tuple[Tensor, ...]:
    """`Shapes` of samples with different numbers of references: one has hardly less than the others' most."""
    if not p.references or p.batch * p.sizes["pp"] == 1:
        return ()
    own = sum(p.local_tokens)
    return tuple(torch.empty(0, *[own - (sample == 0)] * p.sizes["cp"]) for sample in range(p.batch))


def _present(p: Plan, module: nn.Module) -> list[Tensor]:
    """Give `module` fake weights in the dtype in which a rank computes with them; returns these."""
    compute, stored = p.dtype("mixed_precision_param"), p.dtype("dtype")
    weights = fill_fake(module, compute if p.wraps else stored)
    if not p.wraps and compute != stored:
        read_as(module, compute)
    if not p.wraps and p.config.optimizer.in_backward:
        for weight in weights:
            weight.register_post_accumulate_grad_hook(_free)
    return weights


def _free(weight: Tensor) -> None:
    weight.grad = None


def _inputs(p: Plan) -> dict[str, Tensor]:
    """Fake ones of a rank, by the names of `FluxModel.arguments`."""
    wide = torch.promote_types(p.dtype("mixed_precision_param"), torch.float32)
    encoded = getattr(torch, p.config.encoder.dtype)
    (image, text), model = p.local_tokens, p.model
    text_ids, image_ids = _positions(p)
    return {
        "image": torch.empty(p.batch, image, model.in_channels, dtype=wide),
        "image_ids": image_ids,
        "text": torch.empty(p.batch, text, model.context_in_dim, dtype=encoded),
        "text_ids": text_ids,
        "timesteps": torch.empty(p.batch, dtype=wide),
        "pooled": torch.empty(p.batch, model.vec_in_dim),
        "guidance": torch.empty(p.batch, dtype=wide),
    }


def _positions(p: Plan) -> tuple[Tensor, Tensor]:
    """Of text and image tokens."""
    image, text = p.local_tokens
    axes = len(p.model.axes_dim)
    return torch.empty(p.batch, text, axes), torch.empty(p.batch, image, axes)


def _state(p: Plan, embedders: FluxModel) -> State:
    """What blocks take, as leaves."""
    with torch.no_grad():
        state = embedders(**embedders.arguments(**_inputs(p)))
    return tuple(torch.empty_like(x).requires_grad_() for x in state)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_()


def _block_cost(p: Plan, block: nn.Module, taken: tuple[Tensor, ...]) -> Cost:
    def run() -> Sequence[Tensor]:
        out = block(*taken)
        return out if isinstance(out, tuple) else [out]

    return measure(run, [*_present(p, block), *taken], offload.LARGE)


def _end_cost(p: Plan, end: FluxModel, weights: list[Tensor], state: State) -> Cost:
    inputs = _inputs(p)
    length = p.local_tokens[0] - shares(p.references, p.sizes["cp"])[0]
    target = torch.empty(p.batch, length, p.model.out_channels, dtype=inputs["image"].dtype)

    def run() -> Sequence[Tensor]:
        out = end(**end.arguments(**inputs), state=None if end.img_in is not None else state)
        if isinstance(out, tuple):
            return out
        return [flow_loss(out[:, :length], target, None, p.batch, target[0].numel())]

    return measure(run, [*weights, *state, target, *inputs.values()])
