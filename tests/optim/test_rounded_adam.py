"""Adam with bfloat16 state against torch's in float32, on any mesh, over skips and interruptions."""

import copy

import pytest
import torch
from helpers.ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flux_trainer.config.schema import Optimizer
from flux_trainer.optim.build import build_optimizer, optimizer_tensors, set_lr, step
from flux_trainer.optim.rounded_adam import RoundedAdam
from flux_trainer.runtime.layout import Layouts, boxes, local, share_out

GO, SKIP = torch.zeros(()), torch.ones(())
SMALL = {"0.weight": (12, 10), "0.bias": (12,), "1.weight": (7, 12)}


def parameters(shapes=SMALL, dtype=torch.float32) -> dict[str, torch.nn.Parameter]:
    g = torch.Generator().manual_seed(0)
    return {n: torch.nn.Parameter(torch.randn(s, generator=g).to(dtype)) for n, s in shapes.items()}


def gradient(name: str, shape, number: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(1000 * number + len(name) + sum(shape))
    return torch.randn(shape, generator=g)


def set_grads(named, number: int) -> None:
    for name, p in named.items():
        p.grad = gradient(name, p.shape, number).to(p.dtype)


def tensors(optimizer, named) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in named.items()} | optimizer_tensors(optimizer, named.items())


@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_the_first_step_of_float32_parameters_is_torchs(name):
    """The moments are rounded after they have been used."""
    section = Optimizer(name=name, lr=0.1, weight_decay=0.3)
    ours, theirs = parameters(), parameters()
    a = build_optimizer(ours.items(), section.model_copy(update={"state_dtype": "bfloat16"}))
    b = build_optimizer(theirs.items(), section)
    assert isinstance(a, RoundedAdam)
    assert not isinstance(b, RoundedAdam)
    for named, optimizer in ((ours, a), (theirs, b)):
        set_grads(named, 1)
        step(optimizer, GO)
    for key, p in ours.items():
        torch.testing.assert_close(p, theirs[key])
        state, want = a.state[p], b.state[theirs[key]]
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == torch.bfloat16
        torch.testing.assert_close(state["exp_avg"].float(), want["exp_avg"], rtol=2**-7, atol=0)
        torch.testing.assert_close(state["exp_avg_sq"].float(), want["exp_avg_sq"], rtol=2**-7, atol=0)


def test_moments_follow_float32_where_rounding_to_the_nearest_stands_still():
    """beta2 = 0.999: each step moves v by less than half of bfloat16's distance between numbers."""
    section = Optimizer(beta2=0.999, state_dtype="bfloat16", lr=1e-3)
    named = parameters({"w": (64, 64)})
    optimizer = build_optimizer(named.items(), section)
    for _ in range(600):
        named["w"].grad = torch.ones(64, 64)
        step(optimizer, GO)
    want = 1 - 0.999**600
    v = optimizer.state[named["w"]]["exp_avg_sq"].float()
    assert v.mean().item() == pytest.approx(want, rel=1e-2)
    still = torch.tensor(0.0).bfloat16()
    for _ in range(600):
        still = (0.999 * still.float() + 1e-3).bfloat16()
    assert still.item() < 0.9 * want, "to the nearest would not do"


def test_bfloat16_parameters_move_by_less_than_their_precision():
    """100 steps of 1e-4 from 1, whose neighbour below is 2^-8 away: rounded to the nearest it stays."""
    p = torch.nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    optimizer = build_optimizer([("w", p)], Optimizer(lr=1e-4, weight_decay=0.0))
    for _ in range(100):
        p.grad = torch.ones_like(p)
        step(optimizer, GO)
    assert p.float().mean().item() == pytest.approx(1 - 100 * 1e-4, abs=3e-4)
    other = torch.nn.Parameter(torch.ones(128, 128, dtype=torch.bfloat16))
    plain = torch.optim.AdamW([other], lr=1e-4, weight_decay=0.0)
    for _ in range(100):
        other.grad = torch.ones_like(other)
        plain.step()
    assert torch.equal(other, torch.ones_like(other))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_skipped_step_touches_nothing(dtype):
    named = parameters(dtype=dtype)
    optimizer = build_optimizer(named.items(), Optimizer(state_dtype="bfloat16"))
    set_grads(named, 1)
    step(optimizer, GO)
    before = copy.deepcopy(tensors(optimizer, named))
    for p in named.values():
        p.grad = torch.full_like(p, torch.nan)
    step(optimizer, SKIP)
    after = tensors(optimizer, named)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert optimizer.state[named["0.bias"]]["step"] == 1


@pytest.mark.parametrize("state_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_bitwise(dtype, state_dtype):
    section = Optimizer(state_dtype=state_dtype)
    named, other = parameters(dtype=dtype), parameters(dtype=dtype)
    a, b = (build_optimizer(n.items(), section, seed=3) for n in (named, other))
    for number in (1, 2):
        set_grads(named, number)
        step(a, GO)
    source = tensors(a, named)
    with torch.no_grad():
        for key, tensor in tensors(b, other).items():
            tensor.copy_(source[key])
    for n, optimizer in ((named, a), (other, b)):
        set_grads(n, 3)
        set_lr(optimizer, 0.01)
        step(optimizer, GO)
    after = tensors(b, other)
    assert all(torch.equal(tensor, after[key]) for key, tensor in tensors(a, named).items())


def test_the_seed_and_the_parameters_name_decide_how_it_is_rounded():
    def moments(name: str, seed: int) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(32, 32))
        optimizer = build_optimizer([(name, p)], Optimizer(state_dtype="bfloat16"), seed=seed)
        p.grad = gradient("", (32, 32), 1)
        step(optimizer, GO)
        return optimizer.state[p]["exp_avg"]

    assert torch.equal(moments("a", 0), moments("a", 0))
    assert not torch.equal(moments("a", 0), moments("b", 0))
    assert not torch.equal(moments("a", 0), moments("a", 1))


def test_large_parameters_in_pieces_are_the_same(monkeypatch):
    results = []
    for chunk in (1 << 17, 50):
        monkeypatch.setattr("flux_trainer.optim.rounded_adam.CHUNK", chunk)
        named = parameters(dtype=torch.bfloat16)
        optimizer = build_optimizer(named.items(), Optimizer(state_dtype="bfloat16"))
        set_grads(named, 1)
        step(optimizer, GO)
        results.append(tensors(optimizer, named))
    assert all(torch.equal(x, results[1][key]) for key, x in results[0].items())


class Small(torch.nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, p in parameters(dtype=dtype).items():
            self.register_parameter(name.replace(".", "_"), p)


LAYOUTS: Layouts = {  # as of tensor parallelism, rank 1 of 2: rows of two sections, columns of two sections
    "0.weight": share_out((12, 10), 0, (8, 4), 1, 2),
    "0.bias": share_out((12,), 0, (8, 4), 1, 2),
    "1.weight": share_out((7, 12), 1, (2, 10), 1, 2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_parallel_rank_rounds_its_part_as_the_whole_is_rounded(dtype):
    named = parameters(dtype=dtype)
    parts = {
        n: torch.nn.Parameter(
            torch.cat([p.detach().narrow(LAYOUTS[n].dim, *s) for s in LAYOUTS[n].sections], LAYOUTS[n].dim)
        )
        for n, p in named.items()
    }
    section = Optimizer(state_dtype="bfloat16", lr=0.1)
    whole, part = (
        build_optimizer(named.items(), section),
        build_optimizer(parts.items(), section, layouts=LAYOUTS),
    )
    for number in (1, 2):
        for name, p in named.items():
            layout = LAYOUTS[name]
            p.grad = gradient(name, p.shape, number).to(dtype)
            parts[name].grad = torch.cat([p.grad.narrow(layout.dim, *s) for s in layout.sections], layout.dim)
        step(whole, GO)
        step(part, GO)
    got, want = tensors(part, parts), tensors(whole, named)
    for key, tensor in want.items():
        name = next(n for n in named if n in key)
        pieces = (
            [tensor]
            if tensor.ndim == 0
            else [tensor.narrow(LAYOUTS[name].dim, *s) for s in LAYOUTS[name].sections]
        )
        assert torch.equal(
            got[key], pieces[0] if tensor.ndim == 0 else torch.cat(pieces, LAYOUTS[name].dim)
        ), key


def sharded_steps(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Two steps with given gradients; the whole tensors afterwards."""
    model = Small(dtype)
    world = torch.distributed.get_world_size()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    named = dict(zip(SMALL, model.parameters(), strict=True))
    optimizer = build_optimizer(named.items(), Optimizer(state_dtype="bfloat16", lr=0.1))
    for number in (1, 2):
        for name, p in named.items():
            grad = gradient(name, SMALL[name], number).to(dtype)
            if isinstance(p, DTensor):
                part = torch.empty_like(p.detach())
                for box in boxes(p, None):
                    rows = slice(box.offsets[0], box.offsets[0] + box.sizes[0])
                    local(part).copy_(grad[rows])
                grad = part
            p.grad = grad
        step(optimizer, GO)
    return {k: x.full_tensor() if isinstance(x, DTensor) else x for k, x in tensors(optimizer, named).items()}


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shards_are_rounded_as_the_whole_is(dtype):
    (one,) = run_ranks(1, sharded_steps, dtype)
    for rank in run_ranks(3, sharded_steps, dtype):
        assert rank.keys() == one.keys()
        assert all(torch.equal(tensor, rank[key]) for key, tensor in one.items())
