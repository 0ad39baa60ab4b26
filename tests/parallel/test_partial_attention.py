"""Attention in parts, in one process: keys and values are split, and the parts merged."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from flux_trainer.parallel import partial_attention as subject
from flux_trainer.parallel.partial_attention import (
    choose_kernel,
    merge,
    partial_attention,
    partial_attention_backward,
    wide,
)

DIM = 16


def whole(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
    """o, log-sum-exp, dq, dk, dv of plain attention in float64."""
    q, k, v = (x.double().requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / DIM**0.5
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    out.backward(grad.double())
    return [out.detach(), scores.detach().logsumexp(-1), q.grad, k.grad, v.grad]


def in_parts(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, lengths: list[int]) -> list[Tensor]:
    """The same from parts of k and v of these lengths."""
    parts = list(zip(k.split(lengths, dim=1), v.split(lengths, dim=1), strict=True))
    out, lse = partial_attention(q, *parts[0])
    out = out.to(wide(q.dtype))
    for part in parts[1:]:
        lse = merge(out, lse, *partial_attention(q, *part))
    out, lse = out.to(q.dtype), lse.contiguous()
    dqs, dks, dvs = zip(
        *(partial_attention_backward(grad, q, *part, out, lse) for part in parts), strict=True
    )
    dq = torch.stack([x.to(wide(q.dtype)) for x in dqs]).sum(0)
    return [out, lse, dq, torch.cat(dks, dim=1), torch.cat(dvs, dim=1)]


def errors(dtype: torch.dtype, lengths: list[int], device: str = "cpu", queries: int = 37) -> Iterator[float]:
    g = torch.Generator().manual_seed(0)
    shapes = [(2, n, 3, DIM) for n in (queries, sum(lengths), sum(lengths), queries)]
    tensors = [torch.randn(shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]
    tensors[0] *= 3  # attention that is not nearly uniform
    for got, want in zip(in_parts(*tensors, lengths), whole(*tensors), strict=True):
        assert got.shape == want.shape
        yield float((got - want).abs().max() / want.abs().max())


SHORT_PARTS, LONG_PARTS = [5, 0, 17, 1], [150, 130, 20]
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 64 * 2**-24,
    torch.float16: 8 * 2**-12,
    torch.bfloat16: 8 * 2**-9,
}


@pytest.mark.parametrize("lengths", [SHORT_PARTS, LONG_PARTS, [200]], ids=str)
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_parts_make_the_whole(dtype, lengths):
    """Plain products, the CPU's flash kernel, and both in one sum."""
    assert max(errors(dtype, lengths)) <= TOLERANCE[dtype]


def test_long_parts_are_the_flash_kernels():
    q, short, long = (torch.randn(1, 2, length, DIM) for length in (150, 100, 200))
    assert choose_kernel(q, long, long) == "flash_for_cpu"
    assert choose_kernel(q, short, short) == "products"
    assert choose_kernel(q[:, :, :0], long, long) == "products"


def test_large_scores_do_not_overflow():
    q, k, v, grad = (torch.full((1, 2, 1, 4), 50.0) for _ in range(4))
    out, lse, *grads = in_parts(q, k, v, grad, [1, 1])
    assert torch.equal(out, v)
    assert (lse == 5000 + torch.tensor(2.0).log()).all()
    assert all(x.isfinite().all() for x in grads)


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    [("flash", torch.bfloat16), ("efficient", torch.float32), ("efficient", torch.float16)],
)
def test_cuda_kernels_take_these_arguments(kernel, dtype, monkeypatch):
    """Shapes and dtypes alone, on a machine without a GPU: what torch's own shape functions accept."""
    monkeypatch.setattr(subject, "choose_kernel", lambda q, k, v: kernel)
    q, grad = (torch.empty(2, 37, 3, DIM, dtype=dtype, device="meta") for _ in range(2))
    k, v = (torch.empty(2, 70, 3, DIM, dtype=dtype, device="meta") for _ in range(2))
    out, lse, dq, dk, dv = in_parts(q, k, v, grad, [50, 20])
    assert (lse.shape, lse.dtype) == ((2, 3, 37), torch.float32)
    assert out.shape == dq.shape == q.shape
    assert dk.shape == dv.shape == k.shape
    assert out.dtype == dk.dtype == dtype


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    ("dtype", "kernel"),
    [
        (torch.bfloat16, "flash"),
        (torch.float16, "flash"),
        (torch.float32, "efficient"),
        (torch.float64, "products"),
    ],
    ids=str,
)
@pytest.mark.parametrize("lengths", [SHORT_PARTS, LONG_PARTS], ids=str)
def test_parts_make_the_whole_on_a_gpu(dtype, kernel, lengths, monkeypatch):
    chosen = set()
    monkeypatch.setattr(
        subject, "choose_kernel", lambda *x: chosen.add(choose_kernel(*x)) or choose_kernel(*x)
    )
    allow_tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    found = max(errors(dtype, lengths, "cuda", queries=100))
    torch.backends.cuda.matmul.allow_tf32 = allow_tf32
    assert found <= TOLERANCE[dtype]
    assert kernel in chosen
