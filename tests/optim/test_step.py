"""Optimizer, guard and EMA: what a skipped step may touch (nothing), and closed forms of the rest."""

import copy
import gc
from contextlib import nullcontext

import pytest
import torch
from helpers.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux_trainer.config.schema import Optimizer
from flux_trainer.optim.build import build_optimizer, optimizer_tensors, set_lr, step
from flux_trainer.optim.ema import EMA
from flux_trainer.optim.guard import SPIKE_WARMUP, Guard, clip_grad_norm

GO, SKIP = torch.zeros(()), torch.ones(())


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.RMSNorm(4), torch.nn.Linear(4, 3))


def set_grads(net: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in net.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


@pytest.mark.parametrize("decay_all", [False, True])
def test_only_matrices_decay(decay_all):
    net = model()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = build_optimizer(
        net.named_parameters(), Optimizer(lr=0.1, weight_decay=0.5, decay_all=decay_all)
    )
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    step(optimizer, GO)
    for name, p in net.named_parameters():
        decays = p.ndim == 2 or decay_all
        torch.testing.assert_close(p.detach(), before[name] * (1 - 0.1 * 0.5 * decays))


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_a_skipped_step_leaves_weights_and_moments_as_they_are(implementation):
    net = model()
    optimizer = build_optimizer(net.named_parameters(), Optimizer(implementation=implementation))
    set_grads(net, 1)
    step(optimizer, GO)
    named = dict(net.named_parameters())
    before = copy.deepcopy(
        {**{n: p.detach() for n, p in named.items()}, **optimizer_tensors(optimizer, named.items())}
    )
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan"))
    step(optimizer, SKIP)
    after = {**{n: p.detach() for n, p in named.items()}, **optimizer_tensors(optimizer, named.items())}
    assert all(torch.equal(before[k], after[k]) for k in before)
    set_grads(net, 2)
    step(optimizer, GO)
    assert not torch.equal(before["0.weight"], named["0.weight"])
    assert optimizer.state[named["0.weight"]]["step"] == 2


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_state_made_for_loading_is_what_adam_itself_would_make(implementation):
    """Loading into a fresh optimizer and going on equals going on: bitwise."""
    net, other = model(), model()
    section = Optimizer(implementation=implementation)
    a = build_optimizer(net.named_parameters(), section)
    b = build_optimizer(other.named_parameters(), section)
    for seed in (1, 2):
        set_grads(net, seed)
        step(a, GO)
    other.load_state_dict(net.state_dict())
    source = optimizer_tensors(a, net.named_parameters())
    for key, tensor in optimizer_tensors(b, other.named_parameters()).items():
        tensor.copy_(source[key])
    for n, o in ((net, a), (other, b)):
        set_grads(n, 3)
        set_lr(o, 0.01)
        step(o, GO)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_clip_scales_to_the_norm_and_returns_the_norm_before():
    net = model()
    set_grads(net, 1)
    flat = torch.cat([p.grad.flatten() for p in net.parameters()])
    norm = clip_grad_norm(dict(net.named_parameters()), 0.5)
    torch.testing.assert_close(norm, flat.norm())
    clipped = torch.cat([p.grad.flatten() for p in net.parameters()])
    torch.testing.assert_close(clipped, flat * 0.5 / flat.norm(), rtol=1e-5, atol=1e-6)
    assert clip_grad_norm(dict(net.named_parameters()), 0.0) == pytest.approx(clipped.norm().item())


def test_the_norm_of_bfloat16_gradients_is_float32():
    net = torch.nn.Linear(64, 64, bias=False).bfloat16()
    net.weight.grad = torch.full((64, 64), 1.0, dtype=torch.bfloat16)
    norm = clip_grad_norm(dict(net.named_parameters()), 6.4)
    assert norm.dtype == torch.float32
    assert norm == 64
    torch.testing.assert_close(net.weight.grad, torch.full((64, 64), 0.1, dtype=torch.bfloat16))
    net.weight.grad[0, 0] = float("inf")
    assert not clip_grad_norm(dict(net.named_parameters()), 1.0).isfinite()


def test_guard_skips_what_is_not_finite_and_counts():
    guard = Guard(0.0, torch.device("cpu"))
    norms = [1.0, float("nan"), float("inf"), 3.0, 1e6]
    assert [guard(torch.tensor(n)).item() for n in norms] == [0, 1, 1, 0, 0]
    assert (guard.skipped, guard.skipped_in_row, guard.longest_skip, guard.accepted) == (2, 0, 2, 3)


def test_guard_skips_spikes_once_it_knows_the_usual_range():
    guard = Guard(4.0, torch.device("cpu"))
    assert guard(torch.tensor(1.0)) == 0
    assert guard(torch.tensor(100.0)) == 0  # too early to judge
    for _ in range(SPIKE_WARMUP * 10):
        guard(torch.tensor(1.0))
    mean = guard.mean.item()
    assert mean == pytest.approx(1.0, abs=1e-2)
    assert guard(torch.tensor(5.0)) == 1
    assert guard.mean.item() == mean, "a skipped norm does not move the mean"
    assert guard.skipped_in_row == 1
    assert guard(torch.tensor(3.0)) == 0
    assert guard.skipped_in_row == 0


def test_ema_follows_its_half_life_in_samples():
    net = model()
    ema = EMA(net.named_parameters(), half_life=64, rampup_ratio=0.0)
    start = net[0].weight.detach().clone()
    with torch.no_grad():
        net[0].weight += 1
    for i in range(1, 9):  # 8 steps of 8 samples: one half-life
        ema.update(8 * i, 8, GO)
    torch.testing.assert_close(ema.averages["0.weight"], start + 0.5)


def test_ema_ramp_up_limits_the_half_life():
    ema = EMA(model().named_parameters(), half_life=1000, rampup_ratio=0.1)
    assert ema.weight(100, 10) == pytest.approx(0.5)  # half-life 10
    assert ema.weight(10**6, 10) == pytest.approx(1 - 2**-0.01)


def test_ema_is_untouched_by_a_skipped_step_even_one_with_broken_gradients():
    net = model()
    ema = EMA(net.named_parameters(), half_life=10, rampup_ratio=0.0)
    with torch.no_grad():
        net[0].weight += 1
    before = copy.deepcopy(ema.averages)
    ema.update(8, 8, SKIP)
    assert all(torch.equal(before[k], ema.averages[k]) for k in before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_swaps_in_and_out_without_loss(dtype):
    net = model().to(dtype)
    ema = EMA(net.named_parameters(), half_life=10, rampup_ratio=0.0)
    with torch.no_grad():
        net[0].weight += 1
    ema.update(8, 8, GO)
    weights, averages = copy.deepcopy(net.state_dict()), copy.deepcopy(ema.averages)
    with ema.swapped_in():
        torch.testing.assert_close(net[0].weight.detach(), averages["0.weight"].to(dtype))
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(averages[k], v) and v.dtype == torch.float32 for k, v in ema.averages.items())


def steps_on_a_shard(implementation: str) -> tuple[set[str], list[int]]:
    """Operations of two steps that see DTensors, and how many specs of DTensors there are after each step."""
    mesh = init_device_mesh("cpu", (2,))
    net = fully_shard(model(), mesh=mesh)
    optimizer = build_optimizer(net.named_parameters(), Optimizer(implementation=implementation))
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(x, DTensor) for x in tree_leaves((args, kwargs))):
                seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    specs = []
    for number in range(4):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with Watch() if number else nullcontext():  # the first step makes the moments
            step(optimizer, GO)
        optimizer.zero_grad()
        gc.collect()
        specs.append(sum(type(x) is DTensorSpec for x in gc.get_objects()))
    state = optimizer_tensors(optimizer, net.named_parameters())
    assert all(isinstance(x, DTensor) for name, x in state.items() if not name.endswith(".step"))
    return seen, specs


@pytest.mark.distributed
@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
def test_sharded_parameters_step_as_plain_tensors(implementation):
    """torch 2.11 kept the specs of every fused step over DTensors, and dispatching them costs the host."""
    for seen, specs in run_ranks(2, steps_on_a_shard, implementation):
        assert not seen
        assert specs[1] == specs[2] == specs[3]
