"""What CPUs compute another way: as exact as torch's, or known by how much less."""

import os
import platform
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from flux_trainer.models import on_cpu
from flux_trainer.models.attention import attention

BF16 = torch.bfloat16


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(*shape, generator=g).to(dtype).requires_grad_()


def gradients(function, *arguments, dtype=BF16):
    """With a random gradient of the result, which is the same for all dtypes."""
    arguments = [x if x is None else x.detach().to(dtype).requires_grad_() for x in arguments]
    out = function(*arguments)
    probe = normal(*out.shape, seed=99).detach().to(dtype)
    return torch.autograd.grad(out, [x for x in arguments if x is not None], probe)


def errors(got, exact):
    """Relative ones; of what is exactly zero, or empty, zero if it is right, and else huge."""
    return [((a.double() - b).norm() / b.norm().clamp(1e-30)).item() for a, b in zip(got, exact, strict=True)]


class Names(TorchDispatchMode):
    """Of the operators that run, with the strides of the tensor they are given first."""

    def __init__(self):
        super().__init__()
        self.found = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        self.found.setdefault(op.overloadpacket.__name__, []).append(first is not None and first.stride())
        return op(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Which else gives up on a function that it has compiled eight times."""
    torch._dynamo.reset()


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [False, True], ids=("", "compiled"))
@pytest.mark.parametrize("bias", [True, False], ids=("", "no bias"))
@pytest.mark.parametrize("rows", [(0,), (1, 0), (1,), (1, 1), (3,), (2, 100)])
def test_linear_is_as_exact_as_torch(rows, bias, compiled):
    arguments = (normal(*rows, 48), normal(80, 48, seed=1), normal(80, seed=2) if bias else None)
    function = torch.compile(on_cpu.linear, backend="aot_eager") if compiled else on_cpu.linear
    exact = gradients(F.linear, *arguments, dtype=torch.float64)
    ours, torchs = (errors(gradients(f, *arguments), exact) for f in (function, F.linear))
    assert all(a <= 1.2 * b + 1e-3 for a, b in zip(ours, torchs, strict=True)), (ours, torchs)
    torch.testing.assert_close(function(*arguments), F.linear(*arguments), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_linear_with_a_bias_that_is_not_dense(two_threads, dtype):
    x, weight, bias = (normal(*shape).detach().to(dtype) for shape in ((100, 48), (80, 48), (160,)))
    for b in (bias[::2], bias[:1].expand(80)):
        torch.testing.assert_close(on_cpu.linear(x, weight, b), F.linear(x, weight, b))


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variable is of x86")
def test_a_cpu_without_bfloat16():
    """torch computes in bfloat16 on any; oneDNN does not."""
    program = (
        "import torch; from flux_trainer.models import on_cpu; assert not on_cpu.HAS_ONEDNN_BF16;"
        "x, w = (torch.randn(64, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(2));"
        "on_cpu.linear(x, w, None).sum().backward(); assert w.grad.any()"
    )
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", program], env=limited, check=True)


def test_linear_of_frozen_parts():
    x, weight, bias = normal(40, 8), normal(16, 8, seed=1).detach(), normal(16, seed=2)
    on_cpu.linear(x, weight, bias).sum().backward()
    assert [p.grad is None for p in (x, weight, bias)] == [False, True, False]


def test_linear_keeps_what_backward_needs():
    """A frozen weight needs no input, an input without gradient no weight."""
    x, weight = normal(40, 8), normal(16, 8, seed=1)
    for arguments, kept in (((x, weight.detach()), [weight]), ((x.detach(), weight), [x])):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t) or t, lambda t: t
        ):
            on_cpu.linear(*arguments, None)
        assert [t.shape for t in saved] == [t.shape for t in kept]


def test_a_cpu_can_go_the_way_of_other_devices():
    q = normal(1, 130, 2, 16)
    with on_cpu.as_elsewhere(), Names() as names:
        gradients(attention, q, q, q)
        gradients(on_cpu.linear, normal(40, 8), normal(16, 8, seed=1), None)
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in names.found
    assert "copy_" not in names.found  # of strips


def test_the_gradient_is_laid_out_as_its_weight():
    """Or adding it up would copy it."""
    for rows in (1, 100):
        weight = normal(80, 48, seed=1)
        on_cpu.linear(normal(rows, 48), weight, None).sum().backward()
        assert weight.grad.is_contiguous()


@pytest.mark.parametrize("shape", [(200, 70), (64, 3), (1, 5)])
def test_transposed(shape):
    x = normal(*shape).detach()
    assert torch.equal(on_cpu.transposed(x), x.t())
    assert on_cpu.transposed(x).is_contiguous()


def test_products_are_counted():
    """Where torch counts those of its own operators."""
    x, weight = normal(2, 100, 48), normal(80, 48, seed=1)
    counts = []
    for function in (on_cpu.linear, F.linear):
        with FlopCounterMode(display=False) as counter:
            function(x, weight, None).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == 3 * 2 * 200 * 48 * 80


@pytest.mark.slow
def test_compiled_products_have_rows_first():
    """The compiler is free to choose strides: dy^T [80, 64] must not become columns again."""
    arguments = (normal(64, 48), normal(80, 48, seed=1), normal(80, seed=2))
    y = torch.compile(on_cpu.linear)(*arguments)
    with Names() as names:
        torch.autograd.grad(y, arguments, torch.ones_like(y))
    assert names.found["mm"] == [(80, 1), (64, 1)]


@pytest.mark.parametrize("bias", [True, False], ids=("", "no bias"))
@pytest.mark.parametrize("shape", [(100, 48), (2, 50, 48)])
def test_wide_linear_in_float32(two_threads, shape, bias):
    """Of an input that is not dense, as the tokens of one stream are after the joint attention."""
    weight = normal(80, 48, seed=1)

    def values_and_gradients(function, dtype=torch.float32):
        x, w, b = (t.detach().to(dtype).requires_grad_() for t in (wider, weight, normal(80, seed=2)))
        y = function(x[..., 3:-3, :], w, b if bias else None)
        probe = normal(*y.shape, seed=9, dtype=dtype).detach()
        return y, *torch.autograd.grad(y, (x, w, b) if bias else (x, w), probe)

    wider = normal(*shape[:-2], shape[-2] + 6, shape[-1])
    with Names() as names:
        ours = values_and_gradients(on_cpu.linear)
    assert "linear_by_onednn" in names.found
    exact = values_and_gradients(F.linear, torch.float64)
    of_ours, of_torchs = errors(ours, exact), errors(values_and_gradients(F.linear), exact)
    assert all(a <= 1.5 * b + 1e-7 for a, b in zip(of_ours, of_torchs, strict=True)), (of_ours, of_torchs)


@pytest.mark.parametrize(
    ("shape", "out", "threads"),
    [((100, 48), 40, 2), ((8, 48), 80, 2), ((100, 48), 80, 1)],
    ids=("narrow", "few rows", "one thread"),
)
def test_other_linears_in_float32_are_torchs(two_threads, shape, out, threads):
    torch.set_num_threads(threads)
    arguments = (normal(*shape), normal(out, shape[-1], seed=1), None)
    with Names() as names:
        got = gradients(on_cpu.linear, *arguments, dtype=torch.float32)
    assert "linear_by_onednn" not in names.found
    for a, b in zip(got, gradients(F.linear, *arguments, dtype=torch.float32), strict=True):
        assert torch.equal(a, b)


def test_compiled_linears_in_float32_are_torchs(two_threads):
    """So that the compiler sees what it knows."""
    found = []

    def backend(graph, _):
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    x, weight = normal(100, 48, dtype=torch.float32), normal(80, 48, seed=1, dtype=torch.float32)
    torch.compile(on_cpu.linear, backend=backend)(x, weight, None)
    assert any("linear" in name for name in found)
    assert not any("onednn" in name for name in found)


def test_gelu_in_float32():
    """Of a section of a fused linear's output, and far out."""
    x = normal(2, 30, 3000, dtype=torch.float32).detach()[..., 500:].mul(4)
    x[0, 0, :6] = torch.tensor([0.0, -0.0, 1e10, -1e10, 40, -40])

    def of(function, dtype):
        x_ = x.to(dtype).requires_grad_()
        y = function(x_)
        return y, *torch.autograd.grad(y, x_, torch.ones_like(y))

    with Names() as names:
        ours = of(on_cpu.gelu, torch.float32)
    assert "sigmoid_" in names.found
    exact = of(torch_gelu, torch.float64)
    of_ours, of_torchs = errors(ours, exact), errors(of(torch_gelu, torch.float32), exact)
    assert all(a <= 1.2 * b + 1e-7 for a, b in zip(of_ours, of_torchs, strict=True)), (of_ours, of_torchs)
    torch.testing.assert_close(ours[0].double(), exact[0], atol=2e-6, rtol=2e-6)


def torch_gelu(x):
    return F.gelu(x, approximate="tanh")


@pytest.mark.parametrize("compiled", [False, True], ids=("", "compiled"))
@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("length", [130, 300])
def test_attention_is_within_twice_the_error(length, dtype, compiled):
    """Of torch's own backward, which keeps scores in float32. Six heads and samples: not all in one go."""
    q, k = (F.rms_norm(normal(2, length, 3, 64, seed=i), (64,)) for i in range(2))
    v = normal(2, length, 3, 64, seed=2)

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    exact = gradients(torchs, q, k, v, dtype=torch.float64)
    function = torch.compile(attention, backend="aot_eager") if compiled else attention
    ours = gradients(function, q, k, v, dtype=dtype)
    of_ours, of_torchs = errors(ours, exact), errors(gradients(torchs, q, k, v, dtype=dtype), exact)
    assert all(a <= 2.5 * b for a, b in zip(of_ours, of_torchs, strict=True)), (of_ours, of_torchs)
    assert max(of_ours) < (0.01 if dtype == BF16 else 1e-5)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    assert torch.equal(attention(q, k, v), torchs(q, k, v))


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("lengths", [(40, 300), (300, 129), (0, 130)])
def test_attention_to_keys_of_another_number(dtype, lengths):
    """As context parallelism has it; with gradients in columns."""
    q, k, v = (normal(1, n, 3, 16, seed=i) for i, n in enumerate((*lengths, lengths[1])))

    def torchs(q, k, v):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    def in_columns(function):
        return lambda *x: function(*x).transpose(1, 3)

    exact = gradients(in_columns(torchs), q, k, v, dtype=torch.float64)
    got = gradients(in_columns(attention), q, k, v, dtype=dtype)
    for a, b in zip(got, exact, strict=True):
        assert (a - b).norm() <= (0.02 if dtype == BF16 else 1e-5) * b.norm()


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_short_attention_goes_by_whole_products(dtype):
    q, k, v = (normal(1, 130, 2, 16, seed=i) for i in range(3))
    with Names() as names:
        gradients(attention, q, k, v, dtype=dtype)
    assert "_softmax_backward_data" in names.found
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" not in names.found


@pytest.mark.parametrize(("dtype", "length"), [(BF16, 1030), (torch.float32, 520), (torch.float64, 130)])
def test_long_attention_goes_by_tiles(dtype, length):
    q, k, v = (normal(1, length, 2, 16, seed=i) for i in range(3))
    with Names() as names:
        gradients(attention, q, k, v, dtype=dtype)
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in names.found
