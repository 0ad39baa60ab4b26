"""Context-parallel attention against plain attention on one process: outputs, gradients, and messages."""

from collections import Counter
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers.marks import slow
from helpers.ranks import run_ranks
from helpers.sent import Sent
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flux_trainer.parallel import gathered, ring, ulysses
from flux_trainer.parallel.context import COLLECTIVES, ContextParallel
from flux_trainer.parallel.group import shares

METHODS = ("ulysses", "ring", "allgather")


@dataclass(frozen=True)
class Case:
    txt: int = 6
    img: int = 12
    heads: int = 4
    batch: int = 2
    dim: int = 8
    dtype: torch.dtype = torch.float64


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v, written out; [B, L, H, D]."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def relative(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the largest entry."""
    assert got.shape == want.shape
    return (
        float((got.detach() - want.detach()).abs().max() / want.detach().abs().max()) if got.numel() else 0.0
    )


def tokens(case: Case, count: int) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shape = (case.batch, case.txt + case.img, case.heads, case.dim)
    return [torch.randn(shape, generator=g, dtype=torch.float64).to(case.dtype) for _ in range(count)]


def local(cp: ContextParallel, case: Case, x: Tensor) -> Tensor:
    """This rank's tokens of both streams."""
    return torch.cat(cp.split(*x.split((case.txt, case.img), dim=1)), dim=1)


def errors(method: str, case: Case, group: dist.ProcessGroup) -> dict[str, float]:
    """Relative errors of o, dq, dk, dv on this rank."""
    *qkv, grad = tokens(case, 4)
    whole = [x.to(torch.float64, copy=True).requires_grad_() for x in qkv]
    want = plain_attention(*whole)
    want.backward(grad.to(torch.float64))

    cp = ContextParallel(group, method, case.heads)
    cp.begin(case.txt, case.img)
    mine = [local(cp, case, x).requires_grad_() for x in qkv]  # leaves: `local` copies
    got = cp.attention(*mine)
    assert got.dtype == case.dtype
    got.backward(local(cp, case, grad))
    found = {"o": relative(got, local(cp, case, want))}
    for name, x, y in zip("qkv", mine, whole, strict=True):
        found[f"d{name}"] = relative(x.grad, local(cp, case, y.grad))
    return found


def all_errors(cases: list[dict], methods: tuple[str, ...]) -> dict:
    return {(m, str(case)): errors(m, Case(**case), dist.group.WORLD) for case in cases for m in methods}


def assert_exact(results: list[dict], tolerance: float) -> None:
    for rank, result in enumerate(results):
        for key, found in result.items():
            assert max(found.values()) <= tolerance, (rank, key, found)


@pytest.mark.distributed
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_outputs_and_gradients_equal_plain_attention(ranks):
    """Also with heads and lengths that do not divide; 150 tokens a rank are the flash kernel's."""
    cases = [
        {},
        {"txt": 5, "img": 13, "heads": 5},
        {"txt": 7, "img": 6, "heads": 7, "batch": 1},
        {"txt": 101, "img": 150 * ranks, "heads": ranks, "batch": 1},
    ]
    assert_exact(run_ranks(ranks, all_errors, cases, METHODS), 1e-12)


@pytest.mark.distributed
def test_ranks_without_tokens():
    cases = [{"txt": 2, "img": 1}, {"txt": 0, "img": 3}, {"txt": 1, "img": 130}]
    assert_exact(run_ranks(4, all_errors, cases, METHODS), 1e-12)


@pytest.mark.distributed
def test_fewer_heads_than_ranks():
    assert_exact(run_ranks(3, all_errors, [{"heads": 1}, {"heads": 2}], ("ring", "allgather")), 1e-12)


@pytest.mark.distributed
def test_narrow_types():
    """float32 within 64 of its roundings, bfloat16 within 8, relative to the largest entry."""
    for txt, img in ((7, 20), (101, 400)):
        for dtype, tolerance in ((torch.float32, 64 * 2**-24), (torch.bfloat16, 8 * 2**-9)):
            case = {"txt": txt, "img": img, "heads": 3, "dtype": dtype}
            assert_exact(run_ranks(2, all_errors, [case], METHODS), tolerance)


def on_a_mesh() -> dict:
    """Both dimensions of a 2 x 2 mesh, one after the other: groups whose ranks are not the world's."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    case = Case(txt=5, img=8)
    return {(m, name): errors(m, case, mesh[name].get_group()) for name in ("a", "b") for m in METHODS}


@pytest.mark.distributed
def test_groups_within_the_world():
    assert_exact(run_ranks(4, on_a_mesh), 1e-12)


def calls_of_attend() -> dict[str, list[tuple[int, ...]]]:
    """Shapes of what each method leaves to `attend`."""
    case, shapes = Case(), {}
    for method in METHODS:
        seen = shapes[method] = []

        def attend(q: Tensor, k: Tensor, v: Tensor, lengths: tuple, seen=seen) -> Tensor:
            seen.append((*q.shape[1:3], *k.shape[1:3]))
            return plain_attention(q, k, v)

        cp = ContextParallel(dist.group.WORLD, method, case.heads, attend)
        cp.begin(case.txt, case.img)
        got = cp.attention(*(local(cp, case, x) for x in tokens(case, 3)))
        assert relative(got, local(cp, case, plain_attention(*tokens(case, 3)))) <= 1e-12
    return shapes


@pytest.mark.distributed
def test_attention_to_whole_sequences_is_what_was_asked_for():
    for shapes in run_ranks(2, calls_of_attend):
        assert shapes == {"ulysses": [(18, 2, 18, 2)], "ring": [], "allgather": [(9, 4, 18, 4)]}


def round_trip() -> bool:
    cp = ContextParallel(dist.group.WORLD, "ring", heads=1)
    x = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = torch.arange(2.0).view(1, 2, 1)
    pieces = cp.split(x, y)
    wholes = [cp.gather(piece, whole.shape[1]) for piece, whole in zip(pieces, (x, y), strict=True)]
    return torch.equal(wholes[0], x) and torch.equal(wholes[1], y) and not wholes[0].requires_grad


@pytest.mark.distributed
def test_gather_restores_what_split_took_apart():
    assert all(run_ranks(3, round_trip))


def refusals() -> list[str]:
    messages = []
    for method in ("ulysses", "zigzag"):
        with pytest.raises(ValueError) as refusal:  # noqa: PT011
            ContextParallel(dist.group.WORLD, method, heads=2)
        messages.append(str(refusal.value))
    return messages


@pytest.mark.distributed
def test_what_cannot_be_split_is_refused():
    too_few, unknown = run_ranks(3, refusals)[0]
    assert "2 heads over 3 ranks leave 1 without" in too_few
    assert "'zigzag' is none of ulysses, ring, allgather" in unknown


def sent_per_call(options: dict) -> dict[str, list]:
    case, counts = Case(**options), {}
    for method in METHODS:
        cp = ContextParallel(dist.group.WORLD, method, case.heads)
        cp.begin(case.txt, case.img)
        with Sent() as sent:
            out = cp.attention(*(local(cp, case, x).requires_grad_() for x in tokens(case, 3)))
            counts[method] = [sent.take()]
            out.sum().backward()
            counts[method].append(sent.take())
    return counts


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_byte_is_foreseen(dtype):
    """The formulas of the modules, on 3 ranks with 4 + 9 tokens (5, 4, 4) and 5 heads (2, 2, 1)."""
    options = {"txt": 4, "img": 9, "heads": 5, "dtype": dtype}
    case, size = Case(**options), 3
    lengths, heads = (5, 4, 4), (2, 2, 1)
    total, b, c = sum(lengths), dtype.itemsize, 4
    for rank, counts in enumerate(run_ranks(size, sent_per_call, options)):
        own, of_heads = lengths[rank], heads[rank]
        out_heads, out_tokens = own * (case.heads - of_heads), (total - own) * of_heads
        blocks, sums = 2 * (total - lengths[(rank + 1) % size]), 2 * (total - own)
        gathers = 2 * (size - 1) * max(lengths) * case.heads
        want = {
            "ulysses": [
                ({"all-to-all": 2}, (3 * out_heads + out_tokens) * b),
                ({"all-to-all": 2}, (out_heads + 3 * out_tokens) * b),
            ],
            "ring": [
                ({"send": 4}, blocks * case.heads * b),
                ({"send": 8}, blocks * case.heads * b + sums * case.heads * c),
            ],
            "allgather": [({"all-gather": 2}, gathers * b), ({"reduce-scatter": 2}, gathers * c)],
        }
        for method, (forward, backward) in want.items():
            for (calls, got), (want_calls, elements) in zip(counts[method], (forward, backward), strict=True):
                assert calls == want_calls, (method, rank)
                assert got == elements * case.batch * case.dim, (method, rank)


class Block(nn.Module):
    """A residual attention block with the seam of the model's."""

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        width = heads * dim
        self.dim, self.attention = dim, plain_attention
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64) / width**0.5

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (-1, self.dim)) for y in self.qkv(x).chunk(3, dim=-1))
        return x + self.proj(self.attention(q, k, v).flatten(2))


def step(block: Block, x: Tensor) -> list[Tensor]:
    """Output and the gradients of input and weights."""
    x = x.detach().requires_grad_()
    out = block.forward(x)
    block.zero_grad()
    out.square().sum().backward()
    return [out.detach(), x.grad, *(parameter.grad.clone() for parameter in block.parameters())]


def blocks(compiled: bool) -> dict:
    """Per method and checkpointing mode: the largest error of a block's step, and its messages."""
    case, found = Case(txt=5, img=8), {}
    (x,) = tokens(case, 1)
    x = x.flatten(2)
    want = step(Block(case.heads, case.dim), x)
    kept = partial(create_selective_checkpoint_contexts, list(COLLECTIVES))
    for method in METHODS:
        cp = ContextParallel(dist.group.WORLD, method, case.heads)
        cp.begin(case.txt, case.img)
        for mode in ("full", "selective"):
            block = Block(case.heads, case.dim)
            block.attention = cp.attention
            options = {"context_fn": kept} if mode == "selective" else {}
            block.forward = partial(checkpoint, block.forward, use_reentrant=False, **options)
            if compiled:
                torch._dynamo.reset()
                block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
            with Sent(operators=not compiled) as sent:
                out, *grads = step(block, local(cp, case, x))
            for gradient in grads[1:]:  # of weights: each rank has its tokens' share
                dist.all_reduce(gradient)
            got = [out, *grads]
            locals_ = [local(cp, case, y) if i < 2 else y for i, y in enumerate(want)]
            error = max(relative(a, b) for a, b in zip(got, locals_, strict=True))
            found[method, mode] = error, sent.calls
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("compiled", [False, *slow(True)])
def test_checkpointing_and_compiling(compiled):
    """The same numbers; full recomputation repeats the forward's messages, the selective one none."""
    forward = {"ulysses": {"all-to-all": 2}, "ring": {"send": 2}, "allgather": {"all-gather": 2}}
    backward = {"ulysses": {"all-to-all": 2}, "ring": {"send": 4}, "allgather": {"reduce-scatter": 2}}
    for result in run_ranks(2, blocks, compiled, timeout=60):
        for (method, mode), (error, calls) in result.items():
            assert error <= 1e-12, (method, mode, error)
            want = Counter(forward[method]) + Counter(backward[method])
            if mode == "full":
                want += Counter(forward[method])
            assert calls == want, (method, mode)


def graphs(method: str) -> tuple[int, float]:
    """Graphs compiled for five sequences of different lengths, and their largest error."""
    case = Case()
    cp = ContextParallel(dist.group.WORLD, method, case.heads)
    plain, block = Block(case.heads, case.dim), Block(case.heads, case.dim)
    block.attention = cp.attention
    counter = CompileCounterWithBackend("aot_eager")
    block.forward = torch.compile(block.forward, backend=counter, fullgraph=True)
    worst = 0.0
    for img in (8, 10, 14, 17, 23):
        case = Case(txt=6, img=img)
        (x,) = tokens(case, 1)
        cp.begin(case.txt, case.img)
        got, want = step(block, local(cp, case, x.flatten(2)))[0], step(plain, x.flatten(2))[0]
        worst = max(worst, relative(got, local(cp, case, want)))
    return counter.frame_count, worst


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("method", METHODS)
def test_new_lengths_do_not_compile_anew(method):
    """One graph for the first length, one for all others, and one where a rank has a token more."""
    for count, error in run_ranks(2, graphs, method, timeout=60):
        assert count <= 3
        assert error <= 1e-12


def operators() -> bool:
    """torch's own checks of an operator: its schema, and that shapes and strides foreseen come true."""
    group = dist.group.WORLD
    lengths, heads = [4, 3], 3
    own, own_heads = lengths[group.rank()], shares(heads, 2)[group.rank()]
    g = torch.Generator().manual_seed(group.rank())

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64, requires_grad=True)

    q, k, v = (random(2, own, heads, 4) for _ in range(3))
    where = (lengths, group.group_name)
    for operator, inputs in (
        (ring.ring_attention, (q, k, v)),
        (ulysses.scatter_heads, ([q, k, v],)),
        (ulysses.gather_heads, (random(sum(lengths), 3, 2, own_heads, 4), heads)),
        (gathered.gather_keys_values, (k, v)),
        (gathered.reduce_keys_values, tuple(random(sum(lengths), 2, heads, 4).detach() for _ in range(2))),
    ):
        torch.library.opcheck(operator, (*inputs, *where))
    out, lse = ring.ring_attention(q, k, v, *where)
    inputs = (out, q, k, v, out, lse)
    torch.library.opcheck(ring.ring_attention_backward, (*(x.detach() for x in inputs), *where))
    return True


@pytest.mark.slow
@pytest.mark.distributed
def test_operators_are_what_the_compiler_takes_them_for():
    assert all(run_ranks(2, operators))


def forgotten_begin() -> str:
    cp = ContextParallel(dist.group.WORLD, "ring", 2)
    cp.begin(4, 8)
    q = torch.randn(1, 7, 2, 4)
    try:
        cp.attention(q, q, q)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.distributed
def test_a_forward_of_lengths_that_nobody_announced_fails():
    assert run_ranks(2, forgotten_begin) == ["7 tokens, but begin() said 6"] * 2


def test_shares_are_those_of_tensor_split():
    for n in range(12):
        for size in range(1, 6):
            assert shares(n, size) == [len(x) for x in torch.arange(n).tensor_split(size)]
