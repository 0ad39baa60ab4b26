"""Each backend of attention against the formula in float64, and what is refused where it cannot run."""

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from helpers.small_model import arguments, small
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.config.compute import ActivationCheckpoint, Backend, Compile
from flux_trainer.models import backends
from flux_trainer.models.attention import Shapes, attention
from flux_trainer.models.backends import attention_by, check_backend
from flux_trainer.models.registry import model_class
from flux_trainer.parallel.apply import use_attention
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.remat import apply_checkpointing

CPU = torch.device("cpu")
EPS = {torch.float64: 2**-52, torch.float32: 2**-23, torch.bfloat16: 2**-8, torch.float16: 2**-11}
OPERATORS = {
    "cudnn": "_scaled_dot_product_cudnn_attention",
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "math": "_safe_softmax",
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    """softmax(q k^T / sqrt(D)) v of each sample's own tokens, written out; [B, L, H, D]."""
    out = torch.zeros_like(q)
    for i, n in enumerate(lengths):
        scores = torch.einsum("qhd,khd->hqk", q[i, :n], k[i, :n]) / q.shape[-1] ** 0.5
        out[i, :n] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[i, :n])
    return out


def shapes(lengths: list[int], length: int) -> Shapes:
    """Of samples with padding; where there is none, nothing is said."""
    return () if set(lengths) == {length} else tuple(torch.empty(0, n) for n in lengths)


def errors(
    name: Backend, length: int, lengths: list[int], dtype: torch.dtype, device: str = "cpu", dim: int = 64
) -> dict[str, float]:
    """Of output and gradients, relative to the largest entry."""
    g = torch.Generator().manual_seed(0)
    *qkv, grad = (
        torch.randn(len(lengths), length, 2, dim, generator=g, dtype=torch.float64) for _ in range(4)
    )
    qkv[0] *= 3  # attention that is not nearly uniform
    leaves = [x.to(device, dtype).requires_grad_() for x in qkv]
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]  # the same values
    grad = grad.to(dtype)
    want = plain(*wide, lengths)
    want.backward(grad.double())
    got = attention_by(name)(*leaves, shapes(lengths, length))
    assert (got.shape, got.dtype, got.device.type) == (want.shape, dtype, device)
    got.backward(grad.to(device))
    pairs = {"o": (got.detach(), want.detach())} | {
        f"d{n}": (x.grad, y.grad) for n, x, y in zip("qkv", leaves, wide, strict=True)
    }
    return {n: float((x.cpu() - y).abs().max() / y.abs().max()) for n, (x, y) in pairs.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[20, 20], [20, 7, 7, 0], [150, 150], [150, 40]], ids=str)
@pytest.mark.parametrize("name", ["auto", "flash", "math"])
def test_what_runs_on_a_cpu_is_attention(name, lengths, dtype):
    found = errors(name, max(lengths), lengths, dtype)
    assert max(found.values()) <= 16 * EPS[dtype], found


class Operators(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op._opname.removesuffix("_for_cpu")] += 1
        return op(*args, **(kwargs or {}))


def used(name: Backend, q: Tensor) -> set[str]:
    with Operators() as seen:
        attention_by(name)(q, q, q, ())
    return {backend for backend, operator in OPERATORS.items() if seen.counts[operator]}


def test_a_name_is_what_it_says():
    short, long = (torch.randn(1, length, 2, 8) for length in (20, 150))
    for q in (short, long):
        assert used("math", q) == {"math"}
        assert used("flash", q) == {"flash"}
    assert attention_by("auto") is attention
    assert {name: attention_by(name) for name in get_args(Backend)} == {
        name: attention_by(name) for name in get_args(Backend)
    }, "one function for each name, or blocks would not share a graph"


def step(name: Backend, mode: str, counter: CompileCounterWithBackend | None, lengths=None):
    """Gradients of a small model whose blocks attend so, compiled where there is a counter."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    config = small(depth_single_blocks=3)
    model = model_class(config)(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    blocks = [block for _, block in model.blocks()]
    use_attention(blocks, attention_by(name))
    apply_checkpointing(model.blocks(), ActivationCheckpoint(mode=mode))
    section = Compile.model_construct(enable=bool(counter), components=["model"], backend=counter)
    compile_blocks(blocks, section)
    out = model(**arguments(config, 2, image=20, text=8), lengths=lengths)
    out[:, :11].square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(got, want):
    for key, gradient in want.items():
        assert (got[key] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), key


@pytest.mark.slow
def test_blocks_of_a_kind_share_a_graph():
    """Without a break: `compile_blocks` asks for whole graphs."""
    counter = CompileCounterWithBackend("aot_eager")
    assert_same(step("flash", "attention", counter), step("auto", "none", None))
    assert counter.frame_count == 2
    lengths = ((28,), (19,))
    assert_same(step("flash", "none", counter, lengths), step("auto", "none", None, lengths))


class Backwards:
    """A backend of the compiler that lists the operators of each backward."""

    def __init__(self) -> None:
        self.found: list[Counter[str]] = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.common import aot_autograd
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        def look(backward, _):
            self.found.append(Counter(str(node.target) for node in backward.graph.nodes))
            return backward

        compiler = aot_autograd(
            fw_compiler=lambda forward, _: forward,
            bw_compiler=look,
            partition_fn=min_cut_rematerialization_partition,
        )
        return compiler(graph, inputs)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "again"), [("none", 0), ("selective", 0), ("attention", 0), ("full", 1)])
def test_checkpointing_sees_flex_in_compiled_blocks(mode, again, monkeypatch):
    """Selective policies keep its result. torch refuses its backward on a CPU, but has the formula of it."""
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    backwards = Backwards()
    assert_same(step("flex", mode, backwards), step("auto", "none", None))
    assert [found["flex_attention_backward"] for found in backwards.found] == [1, 1]
    assert [found["flex_attention"] for found in backwards.found] == [again, again]


@pytest.mark.slow
def test_flex_alone_makes_a_kernel_for_pictures_on_a_cpu():
    """Also for samples of several lengths."""
    torch._dynamo.reset()
    for length, lengths in ((150, [150, 150]), (40, [40, 9, 9, 0])):
        g = torch.Generator().manual_seed(length)
        q, k, v = (torch.randn(len(lengths), length, 2, 16, generator=g) for _ in range(3))
        want = plain(q.double(), k.double(), v.double(), lengths)
        with torch.no_grad():
            got = attention_by("flex")(q, k, v, shapes(lengths, length))
        assert (got - want).abs().max() <= 16 * EPS[torch.float32] * want.abs().max()


@pytest.mark.parametrize(
    ("name", "training", "words"),
    [
        ("cudnn", True, '"cudnn" runs on CUDA alone, not on cpu; take "auto"'),
        ("efficient", False, '"efficient" runs on CUDA alone, not on cpu; take "auto"'),
        ("flex", True, '"flex" has no backward on cpu; take "auto"'),
    ],
)
def test_what_a_cpu_cannot_run_is_refused(name, training, words):
    with pytest.raises(ValueError, match=f"attention.backend = {words}"):
        check_backend(name, CPU, torch.float32, 64, training=training)


def test_what_a_cpu_can_run_is_not():
    for name in ("auto", "flash", "math"):
        check_backend(name, CPU, torch.float32, 64, training=True)
    check_backend("flex", CPU, torch.float32, 64, training=False)


def test_what_a_gpu_cannot_run_is_refused(monkeypatch):
    """By what torch says of it: here of one that is not there."""
    cuda, empty = torch.device("cuda", 0), torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, device, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "T4")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    with pytest.raises(ValueError, match=r'"cudnn" needs cuDNN 9.15.1 or newer, and this torch has 91002'):
        check_backend("cudnn", cuda, torch.bfloat16, 64, training=True)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    asked = []
    for takes in (True, False):
        can_use = {
            name: lambda asks, _, takes=takes: asked.append(asks) or takes for name in backends._CAN_USE
        }
        monkeypatch.setattr(backends, "_CAN_USE", can_use)
        for name in can_use:
            if takes:
                check_backend(name, cuda, torch.float32, 80, training=True)
            else:
                words = rf'"{name}" does not take float32 in heads of 80 on a T4 .* take "auto"'
                with pytest.raises(ValueError, match=words):
                    check_backend(name, cuda, torch.float32, 80, training=False)
    assert [(asks.query.shape[-1], asks.query.requires_grad) for asks in asked] == [(80, True)] * 3 + [
        (80, False)
    ] * 3


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("lengths", [[384, 384], [300, 45, 45, 0]], ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in get_args(Backend)),
        *((name, torch.float32) for name in ("auto", "efficient", "math")),
    ],
    ids=str,
)
def test_what_runs_on_a_gpu_is_attention(name, dtype, dim, lengths):
    """bfloat16 within a few of its roundings; "cudnn" where this GPU and this torch have it."""
    try:
        check_backend(name, torch.device("cuda", 0), dtype, dim, training=True)
    except ValueError as error:
        pytest.skip(str(error))
    found = errors(name, max(lengths), lengths, dtype, "cuda", dim)
    assert max(found.values()) <= (16 if dtype == torch.bfloat16 else 64) * EPS[dtype], found


@pytest.mark.gpu
@needs_cuda
def test_a_name_is_what_it_says_on_a_gpu():
    q = torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for name in ("flash", "efficient", "math"):
        assert used(name, q) == {name}
    assert used("auto", q.float()) == {"efficient"}
    cudnn_is_preferred = torch.cuda.get_device_capability() in ((9, 0), (10, 0))
    if cudnn_is_preferred and torch.backends.cudnn.version() >= backends.OLDEST_CUDNN:
        assert used("cudnn", q) == used("auto", q) == {"cudnn"}
    elif torch.cuda.get_device_capability() >= (8, 0):
        assert used("auto", q) == {"flash"}


@pytest.mark.gpu
@needs_cuda
def test_float32_is_not_for_flash_on_a_gpu():
    for name in ("cudnn", "flash"):
        with pytest.raises(ValueError, match='take "auto"'):
            check_backend(name, torch.device("cuda", 0), torch.float32, 64, training=True)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("mode", ["none", "selective", "attention", "full"])
@pytest.mark.parametrize("name", ["auto", "flash", "flex"])
def test_blocks_compiled_for_a_gpu(name, mode):
    """Gradients of a whole model, by inductor, within bfloat16's roundings of eager ones."""

    def gradients(name: Backend, mode: str, compiled: bool) -> Tensor:
        torch._dynamo.reset()
        torch.manual_seed(0)
        config = small(hidden_size=128, num_heads=2, axes_dim=(16, 24, 24), depth_single_blocks=3)
        model = model_class(config)(config).to("cuda", torch.bfloat16)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.05)
        blocks = [block for _, block in model.blocks()]
        use_attention(blocks, attention_by(name))
        apply_checkpointing(model.blocks(), ActivationCheckpoint(mode=mode))
        compile_blocks(blocks, Compile(enable=compiled))
        given = arguments(config, 2, image=256, text=44, dtype=torch.float32)
        ids = [key for key in given if "ids" in key]
        dtypes = {key: torch.float32 if key in ids else torch.bfloat16 for key in given}
        out = model(**{key: x.to("cuda", dtypes[key]) for key, x in given.items()})
        out.float().square().mean().backward()
        return torch.cat([p.grad.flatten().float() for p in model.parameters()])

    want, got = gradients("math", "none", False), gradients(name, mode, True)
    assert (got - want).norm() <= 0.05 * want.norm()
