"""One step of a FLUX model on one device, built of what training is built of, on random latents and text.

train      forward, backward, clipping and optimizer, as `Trainer.train_step`
frozen     forward, and backward to the inputs, as for an adapter
inference  forward without gradients
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flux_trainer.config.schema import JobConfig
from flux_trainer.flow.latents import SPACES
from flux_trainer.flow.loss import flow_loss
from flux_trainer.models import registry
from flux_trainer.models.backends import check_backend
from flux_trainer.models.configs import ModelConfig
from flux_trainer.models.flops import forward_flops_per_sample, train_flops_per_sample
from flux_trainer.optim.build import build_optimizer
from flux_trainer.optim.build import step as optimizer_step
from flux_trainer.optim.guard import NONE, Guard, clip_grad_norm
from flux_trainer.optim.in_backward import StepInBackward
from flux_trainer.parallel.apply import parallelize
from flux_trainer.parallel.arithmetic import tokens
from flux_trainer.parallel.compile import compile_loss
from flux_trainer.parallel.init import default_dtype
from flux_trainer.parallel.mesh import build_mesh
from flux_trainer.runtime.dist import set_deterministic
from flux_trainer.velocity import Velocity

KINDS = ("train", "frozen", "inference")


def flops(kind: str, model: ModelConfig, image: int, text: int) -> int:
    """FLOPs of one sample's step, in matrix products, without recomputation."""
    forward = forward_flops_per_sample(model, image, text)
    if kind == "inference":
        return forward
    if kind == "train":
        return train_flops_per_sample(model, image, text)
    # Backward to the inputs has one product for each of forward's, and another one for those of attention,
    # q k^T and its product with v, both of whose operands need a gradient.
    blocks = model.depth + model.depth_single_blocks
    return 2 * forward + blocks * 2 * 2 * (image + text) ** 2 * model.hidden_size


def make(kind: str, shape: ModelConfig, config: JobConfig, device: torch.device) -> Callable[[], object]:
    """The step of a model of that shape with random weights; the process group is there."""
    set_deterministic(config.debug.seed, False)
    compute = getattr(torch, config.training.mixed_precision_param)
    with torch.device("meta"), default_dtype(getattr(torch, config.training.dtype)):
        model = registry.model_class(shape)(shape)
    model.requires_grad_(kind == "train")
    backend, training = config.attention.backend, kind != "inference"
    check_backend(backend, device, compute, shape.head_dim, training=training)
    parallel = parallelize(
        model,
        build_mesh(config.parallelism, 1, device.type),
        tokens=tokens(config),
        parallelism=config.parallelism,
        activation_checkpoint=config.activation_checkpoint,
        compile=config.compile,
        param_dtype=compute,
        reduce_dtype=getattr(torch, config.training.mixed_precision_reduce),
        attention=config.attention,
        quantize=config.quantize,
    )
    model.to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)

    velocity, space = Velocity(parallel, shape, device), SPACES[shape.family]
    loss_of, batch = compile_loss(flow_loss, config.compile), config.training.local_batch_size
    encoded = {"dtype": getattr(torch, config.encoder.dtype), "device": device}
    x_t = torch.randn(batch, *space.shape(config.training.img_size, config.training.img_size), device=device)
    target = space.pack(torch.randn_like(x_t))  # [B, L, C]
    txt = torch.randn(batch, tokens(config)[1], shape.context_in_dim, **encoded)
    vec = torch.randn(batch, shape.vec_in_dim, **encoded) if shape.vec_in_dim else None
    t, guidance = torch.rand(batch, device=device), torch.ones(batch, device=device)
    inputs = [x for x in (x_t, t, txt, vec, guidance) if x is not None]
    for x in inputs:
        x.requires_grad_(kind == "frozen")

    def forward() -> Tensor:
        return model(**velocity.arguments(x_t, t, txt, vec, guidance))

    def backward() -> None:
        loss_of(forward(), target, None, batch, target[0].numel()).backward()

    def frozen() -> None:
        backward()
        for x in inputs:
            x.grad = None

    if kind == "inference":
        return torch.no_grad()(forward)
    if kind == "frozen":
        return frozen
    parameters = dict(model.named_parameters())
    optimizer = build_optimizer(parameters.items(), config.optimizer, seed=config.debug.seed)
    stepping = StepInBackward(optimizer, parameters.items()) if config.optimizer.in_backward else None
    guard = Guard(config.training.spike_factor, device)

    def train() -> None:
        backward()
        norm = clip_grad_norm(
            parameters, config.training.max_norm, freed=stepping.norms if stepping else NONE
        )
        optimizer_step(optimizer, guard(norm))
        optimizer.zero_grad()

    return train
