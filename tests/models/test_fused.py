"""The functions between the matrix products: values and gradients against the plain formulas beside them."""

import pytest
import torch
from torch.autograd import gradcheck

from flux_trainer.models import fused
from flux_trainer.models.sinusoids import rope_table

EPS = 1e-6


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed + 7 * len(shape))
    return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype).requires_grad_()


def table(batch: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    ids = torch.randint(0, 40, (batch, 5, 2), generator=torch.Generator().manual_seed(1))
    return rope_table(ids.to(dtype), (2, 4), 10_000)


def cases(dtype: torch.dtype, batch: int) -> dict[str, tuple]:
    """Function, plain formula, arguments."""
    x, y = (normal(batch, 5, 6, seed=i, dtype=dtype) for i in range(2))
    shift, scale = (normal(batch, 1, 6, seed=i, dtype=dtype) for i in range(2))
    heads, weight = normal(batch, 5, 3, 6, seed=2, dtype=dtype), normal(6, seed=3, dtype=dtype)
    angles = table(batch, torch.promote_types(dtype, torch.float32))
    return {
        "modulated_norm": (fused.modulated_norm, fused.plain_modulated_norm, (x, shift, scale, EPS)),
        "gated_sum": (fused.gated_sum, fused.plain_gated_sum, (x, shift, y)),
        "norm_rope": (fused.norm_rope, fused.plain_norm_rope, (heads, weight, angles, EPS)),
        "gelu": (fused.gelu, fused.plain_gelu, (x,)),
        "swiglu": (fused.swiglu, fused.plain_swiglu, (x, y)),
    }


NAMES = list(cases(torch.float64, 1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_in_float64(name, batch):
    function, plain, arguments = cases(torch.float64, batch)[name]
    torch.testing.assert_close(function(*arguments), plain(*arguments), atol=1e-13, rtol=1e-13)
    assert gradcheck(function, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_no_less_exact_than_the_plain_formula(name, dtype):
    function, plain, arguments = cases(dtype, 2)[name]
    inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
    exact = [x.double() if isinstance(x, torch.Tensor) else x for x in arguments]
    exact_inputs = [e for e, x in zip(exact, arguments, strict=True) if any(x is i for i in inputs)]
    probe = normal(*plain(*arguments).shape, seed=9, dtype=dtype).detach()

    def results(f, arguments, inputs, probe):
        out = f(*arguments)
        return [out, *torch.autograd.grad(out, inputs, probe)]

    want = results(plain, exact, exact_inputs, probe.double())
    ours, theirs = (results(f, arguments, inputs, probe) for f in (function, plain))
    for a, b, w in zip(ours, theirs, want, strict=True):
        assert a.dtype == dtype
        error, allowed = (a.double() - w).norm() / w.norm(), (b.double() - w).norm() / w.norm()
        assert error <= 1.2 * allowed + 1e-7


def test_strided_arguments_and_gradients():
    """Queries are sections of a wider tensor, and attention's gradients come with heads outermost."""
    wide = torch.cat((normal(2, 5, 18), normal(2, 5, 18)), dim=-1).detach().requires_grad_()
    scale, angles = normal(6), table(2)
    probe = normal(2, 3, 5, 6).detach().transpose(1, 2)

    def gradients(f):
        q = wide[..., 2:20].unflatten(-1, (3, 6))
        return torch.autograd.grad(f(q, scale, angles, EPS), (wide, scale), probe)

    for a, b in zip(gradients(fused.norm_rope), gradients(fused.plain_norm_rope), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    by_pairs = probe.mT.contiguous().mT
    (a,) = torch.autograd.grad(
        fused.norm_rope(wide[..., :18].unflatten(-1, (3, 6)), scale, angles, EPS), wide, by_pairs
    )
    (b,) = torch.autograd.grad(
        fused.plain_norm_rope(wide[..., :18].unflatten(-1, (3, 6)), scale, angles, EPS), wide, by_pairs
    )
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_norms_compute_statistics_in_float32():
    """bf16 would give each mean, and the norm, only 8 bits."""
    _, _, (x, scale, angles, eps) = cases(torch.bfloat16, 2)["norm_rope"]
    exact = fused.plain_norm_rope(x.double(), scale.double(), angles.double(), eps)
    torch.testing.assert_close(fused.norm_rope(x, scale, angles, eps), exact.bfloat16(), atol=0, rtol=0)
