"""What the settings of a mesh come to, without torch: an impossible one is refused before it is imported.

The trainer and the estimate both go by these functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Literal

from flux_trainer.config.compute import EIGHT_BIT_MULTIPLE, Backend, Parallelism
from flux_trainer.config.pictures import reference_side
from flux_trainer.config.problems import ConfigError
from flux_trainer.config.schema import JobConfig, Training
from flux_trainer.models.configs import ModelConfig
from flux_trainer.models.flops import macs
from flux_trainer.models.registry import FLAVORS
from flux_trainer.parallel.stages import check_micro_batches, spans

Method = Literal["ulysses", "ring", "allgather"]
"""Of context parallelism."""


def degrees(section: Parallelism, world_size: int) -> dict[str, int]:
    """Ranks along each dimension. Raises ValueError if they do not multiply to `world_size`."""
    sizes = {
        "pp": section.pipeline_parallel_degree,
        "dp_replicate": section.data_parallel_replicate_degree,
        "dp_shard": section.data_parallel_shard_degree,
        "cp": section.context_parallel_degree,
        "tp": section.tensor_parallel_degree,
    }
    if sizes["dp_shard"] == -1:
        sizes["dp_shard"] = max(1, world_size // prod(n for n in sizes.values() if n != -1))
    if prod(sizes.values()) != world_size:
        product = " x ".join(f"{name} {n}" for name, n in sizes.items())
        raise ValueError(f"{product} = {prod(sizes.values())} ranks, but the world has {world_size}")
    return sizes


def tokens(config: JobConfig) -> tuple[int, int]:
    """Image and text tokens of a training sample; an image token covers 16 x 16 pixels."""
    text: int = getattr(config.encoder, FLAVORS[config.model.flavor].text_length)
    return (config.training.img_size // 16) ** 2, text


def has_references(config: JobConfig) -> bool:
    """Whether a source of training or validation names reference images."""
    sources = [*config.data.sources, *config.validation.sources]
    return any(source.refers for source in sources)


def reference_tokens(config: JobConfig) -> int:
    """The most that the reference images of a training sample come to."""
    side = reference_side(config.data, config.training.img_size)
    most = config.data.max_references * (side * side // 256)
    return most if any(source.refers for source in config.data.sources) else 0


def reference_room(longest: int, most: int) -> int:
    """Tokens for the references of a pipeline's samples, of which the longest has `longest`, out of `most`.

    One of five lengths: for each the pipeline keeps a schedule with its buffers.
    """
    quarter = -(-most // 4)
    return -(-longest // quarter) * quarter if longest else 0


def global_batch_size(training: Training, groups: int) -> int:
    """Samples of an optimizer step on `groups` groups of ranks that work on different samples."""
    total = training.global_batch_size
    return training.local_batch_size * groups if total == -1 else total


def micro_batches(training: Training, groups: int) -> int:
    """Local batches of an optimizer step on each of `groups` groups."""
    return global_batch_size(training, groups) // groups // training.local_batch_size


def holds_weights(section: Parallelism) -> bool:
    """Whether FSDP keeps the weights it gathered for forward until backward."""
    setting = section.fsdp_reshard_after_forward
    return setting == "never" or (setting == "default" and section.pipeline_parallel_degree > 1)


def encodes_ahead(training: Training, sizes: Mapping[str, int]) -> bool:
    """Whether encoders work on the next batch beside the step, on a mesh of these sizes, on CUDA.

    Not where ranks share a copy of the model, and with it the text encoder: its weights would be gathered
    beside the collectives of the step. Over the same communicator each would wait for all that were asked for
    before, the step for the encoder; over several, kernels that wait for each other may not fit on the device
    together.
    """
    return training.encode_ahead and prod(sizes.values()) == sizes["dp_replicate"]


def check_heads(model: ModelConfig, degree: int) -> None:
    """Raise ValueError unless `degree` ranks can share the attention heads and MLP features evenly."""
    for what, size in (("attention heads", model.num_heads), ("MLP features", model.mlp_hidden)):
        if size % degree:
            raise ValueError(
                f"The model's {size} {what} cannot be shared out evenly: {size} / {degree} "
                f"(tensor_parallel_degree) = {size / degree:.6g} per rank. Take a degree that divides {size}."
            )


def context_method(section: Parallelism, heads: int) -> Method:
    """How attention reaches all tokens where a rank computes `heads` heads: what is set, or what suits."""
    if section.context_parallel_method != "auto":
        return section.context_parallel_method
    return "ring" if heads % section.context_parallel_degree else "ulysses"


def check_context(method: Method, heads: int, degree: int) -> None:
    """Raise ValueError unless attention over `heads` heads can be shared by `degree` ranks in that way."""
    if method == "ulysses" and heads < degree:
        raise ValueError(
            f"ulysses gives every rank of a context parallel group at least one head, but {heads} heads "
            f"over {degree} ranks leave {degree - heads} without; use ring or allgather, or at "
            f"most {heads} ranks"
        )


def check_ring(method: Method, backend: Backend) -> None:
    """Raise ValueError where a ring, which takes the kernel that suits it, is told another."""
    if method == "ring" and backend != "auto":
        raise ValueError(
            f'attention.backend = "{backend}" does not go with ring attention, which takes the fastest of '
            'flash, efficient and plain products that returns log-sum-exps; set it to "auto", or '
            'parallelism.context_parallel_method to "allgather", or "ulysses" where the heads divide evenly'
        )


def cuts(model: ModelConfig, tokens: tuple[int, int], section: Parallelism) -> list[range]:
    """The blocks of each stage of a pipeline, of one stage without one; stages cost as equally as can be.

    Args:
        tokens: image and text tokens of a sample.

    Raises:
        ValueError: there are more stages than blocks.
    """
    if section.pipeline_parallel_degree == 1:
        return [range(model.depth + model.depth_single_blocks)]
    cost = macs(model, *tokens)
    return spans(
        section.pipeline_parallel_schedule,
        section.pipeline_parallel_degree,
        cost.blocks,
        cost.inputs + cost.embedders,
        cost.head,
    )


def check_sharing(config: JobConfig, world_size: int) -> dict[str, int]:
    """Ranks along each dimension of a mesh on which the model can be shared out.

    Raises:
        ConfigError: there is no such mesh; with the arithmetic.
    """
    model, section = FLAVORS[config.model.flavor], config.parallelism
    try:
        sizes = degrees(section, world_size)
        check_heads(model, sizes["tp"])
        heads = model.num_heads // sizes["tp"]
        method = context_method(section, heads)
        check_context(method, heads, sizes["cp"])
        if sizes["cp"] > 1:
            check_ring(method, config.attention.backend)
        cuts(model, tokens(config), section)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    return sizes


def check_rows(config: JobConfig, ranks: int) -> None:
    """Refuse batches that 8-bit products cannot sum over, where `ranks` share the tokens of a sample.

    A weight's gradient is a sum over all tokens of a batch, taken so many at a time.

    Raises:
        ConfigError: with the arithmetic.
    """
    linears = config.quantize.linears
    multiple, batch = EIGHT_BIT_MULTIPLE.get(linears, 1), config.training.local_batch_size
    for what, count in zip(("image", "text"), tokens(config), strict=True):
        for share in {count // ranks, -(-count // ranks)}:
            if batch * share % multiple:
                raise ConfigError(
                    [
                        f'quantize.linears = "{linears}" needs a multiple of {multiple} {what} tokens in a '
                        f"batch, but training.local_batch_size {batch} x {share} tokens = {batch * share}"
                    ]
                )


def check_mesh(config: JobConfig, world_size: int) -> None:
    """Refuse a mesh on which the model cannot be shared out, or that cannot run the steps.

    Raises:
        ConfigError: with the arithmetic.
    """
    sizes = check_sharing(config, world_size)
    check_rows(config, sizes["cp"])
    if sizes["pp"] > 1:
        count = micro_batches(config.training, sizes["dp_replicate"] * sizes["dp_shard"])
        try:
            check_micro_batches(config.parallelism.pipeline_parallel_schedule, sizes["pp"], count)
        except ValueError as error:
            raise ConfigError([str(error)]) from error
