"""What each policy of activation checkpointing keeps and computes again, and that no gradient changes."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from unittest.mock import patch

import pytest
import torch
from helpers.marks import slow
from helpers.small_model import arguments, small, small2
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode

from flux_trainer.config.compute import ActivationCheckpoint, Compile
from flux_trainer.models import on_cpu
from flux_trainer.models.attention import Lengths
from flux_trainer.models.model import FluxModel
from flux_trainer.models.registry import model_class
from flux_trainer.models.sinusoids import rope_table
from flux_trainer.parallel import offload
from flux_trainer.parallel.compile import compile_blocks
from flux_trainer.parallel.offload import Moved, Offload
from flux_trainer.parallel.remat import apply_checkpointing, apply_memory_budget, policies
from flux_trainer.runtime.live_bytes import measure

CONFIGS = {"flux1": small(depth_single_blocks=3), "flux2": small2(depth_single_blocks=3)}
DOUBLE, SINGLE = 2, 3
BATCH, IMAGE, TEXT = 2, 90, 50
SECTIONS = {
    "full": {"mode": "full"},
    "op": {"mode": "selective"},
    "every second": {"mode": "selective", "selective_ac_option": "2"},
    "attention": {"mode": "attention"},
    "by kind": {"mode": "none", "double_blocks": "attention", "single_blocks": "2"},
}
BUDGETS = {"budget 0": {"mode": "memory_budget", "memory_budget": 0.0}, "budget": {"mode": "memory_budget"}}


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(offload, "LARGE", 64)


def build(
    family: str, section: dict, dtype=torch.float32, compile: bool = False, device: str = "cpu"
) -> FluxModel:
    """A model with random values in every parameter, made ready in the order of `parallel/apply.py`."""
    torch.manual_seed(1)
    model = model_class(CONFIGS[family])(CONFIGS[family]).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.3)
    model.to(device)
    settings = ActivationCheckpoint(**section)
    away = Offload() if settings.offload else None
    blocks = [block for _, block in model.blocks()]
    apply_checkpointing(model.blocks(), settings, None if compile else away)
    compile_blocks(blocks, Compile(enable=compile, backend="aot_eager"))
    apply_memory_budget(model.blocks(), settings)
    if away:
        away.apply(blocks)
    return model


def gradients(
    model: FluxModel, image: int = IMAGE, count: Ops | None = None, lengths: Lengths | None = None
) -> dict[str, torch.Tensor]:
    """Counts the operators of backward in `count`."""
    parameter = next(model.parameters())
    given = arguments(model.config, BATCH, image=image, text=TEXT, dtype=parameter.dtype)
    given = {name: x.to(parameter.device) for name, x in given.items()}
    loss = model(**given, lengths=lengths).square().sum()
    with count or nullcontext():
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}


class Ops(TorchDispatchMode):
    """Counts operators by what they are."""

    KINDS = (
        ("product", ("mm.default", "addmm.default", "linear_by_onednn.default")),
        ("attention", ("flash_attention_for_cpu.default", "_softmax.default")),
        ("norm", ("native_layer_norm.default",)),
        ("activation", ("gelu.default", "silu.default")),
    )

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        for kind, names in self.KINDS:
            self.counts[kind] += str(op).endswith(names)
        return op(*args, **(kwargs or {}))


@cache
def plain_gradients(family: str, dtype: torch.dtype, image: int, threads: int) -> dict[str, torch.Tensor]:
    return gradients(build(family, {"mode": "none"}, dtype), image)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("away", [False, True], ids=("", "offload"))
@pytest.mark.parametrize("name", ["none", "full", "op", "attention", *slow("every second", "by kind")])
@pytest.mark.parametrize("family", CONFIGS)
def test_no_bit_changes(family, name, away, threads, monkeypatch):
    """With attention in one operator, and in plain products as few tokens have it on a CPU; in bfloat16, and
    with two threads, with what CPUs compute another way."""
    torch.set_num_threads(threads)
    monkeypatch.setattr(on_cpu, "CACHED", 2000)
    section = SECTIONS.get(name, {"mode": "none"}) | {"offload": away}
    for image, dtype in ((IMAGE, torch.float32), (20, torch.float32), (IMAGE, torch.bfloat16)):
        want = plain_gradients(family, dtype, image, threads)
        got = gradients(build(family, section, dtype), image)
        assert all(torch.equal(got[key], want[key]) and want[key].any() for key in want), image


# Of double-stream and of single-stream blocks: products, attentions, norms, activations computed again.
# FLUX.1's blocks begin with 2 (1) products of one row a sample each.
AGAIN = {
    ("flux1", "full"): ((10, 1, 4, 2), (3, 1, 1, 1)),
    ("flux2", "full"): ((8, 1, 4, 2), (2, 1, 1, 1)),
    ("flux1", "attention"): ((6, 0, 4, 2), (1, 0, 1, 1)),
    ("flux2", "attention"): ((6, 0, 4, 2), (1, 0, 1, 1)),
    ("flux1", "op"): ((5, 0, 4, 2), (1, 0, 1, 1)),
    ("flux2", "op"): ((4, 0, 4, 2), (1, 0, 1, 1)),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("away", [False, *slow(True)], ids=("", "offload"))
@pytest.mark.parametrize(("family", "name"), AGAIN)
def test_what_is_computed_again(family, name, away, threads):
    """With two threads, a CPU multiplies by another operator."""
    torch.set_num_threads(threads)
    plain, again = Ops(), Ops()
    gradients(build(family, {"mode": "none"}), count=plain)
    gradients(build(family, SECTIONS[name] | {"offload": away}), count=again)
    double, single = AGAIN[family, name]
    want = {
        kind: (DOUBLE * d + SINGLE * s) * (BATCH if kind == "norm" else 1)  # a norm is taken sample by sample
        for kind, d, s in zip(("product", "attention", "norm", "activation"), double, single, strict=True)
    }
    assert {kind: again.counts[kind] - plain.counts[kind] for kind in want} == want


def test_each_block_has_its_policy():
    names = ["double_blocks.0", "double_blocks.1", "single_blocks.0", "single_blocks.1", "single_blocks.2"]

    def of(**section) -> list[str]:
        return policies(names, ActivationCheckpoint(**section))

    assert of() == ["op"] * 5
    assert of(mode="attention", single_blocks="selective") == ["attention"] * 2 + ["op"] * 3
    assert of(mode="selective", selective_ac_option="2") == ["full", "none", "full", "none", "full"]
    assert of(mode="full", single_blocks="3") == ["full", "full", "none", "full", "none"]
    assert of(mode="memory_budget", double_blocks="op") == ["op"] * 2 + ["memory_budget"] * 3


@pytest.mark.parametrize("name", ["full", "attention", "op"])
@pytest.mark.parametrize("family", CONFIGS)
def test_kept_bytes(family, name):
    """The table in `parallel/remat.py`, with a block's output in place of its input."""
    config = CONFIGS[family]
    h, heads, dim, flux1 = config.hidden_size, config.num_heads, config.head_dim, family == "flux1"
    m = config.mlp_hidden * (1 if flux1 else 2)
    tokens = IMAGE + TEXT
    want = {"double_blocks": tokens * h, "single_blocks": tokens * h}
    if name != "full":  # attention's output and its log-sum-exp
        want = {kind: elements + tokens * (h + heads) for kind, elements in want.items()}
    if name == "attention":
        want["double_blocks"] += tokens * 3 * h + 12 * h * flux1
        want["single_blocks"] += tokens * (3 * h + m) + 3 * h * flux1
    if name == "op":
        want["double_blocks"] += IMAGE * 5 * h + TEXT * m + 6 * h * flux1
        want["single_blocks"] += tokens * h + 3 * h if flux1 else tokens * (3 * h + m)
    with FakeTensorMode():
        model = model_class(config)(config)
        apply_checkpointing(model.blocks(), ActivationCheckpoint(**SECTIONS[name]))
        lengths = (0, 0, 1, 6, 6, 3)[: 3 if flux1 else 6]
        state = tuple(torch.randn(BATCH, n * h, requires_grad=True) for n in lengths)
        of_double, of_single = (
            tuple(x.detach().requires_grad_() for x in each) for each in model.modulations(state)
        )
        ids = torch.zeros(BATCH, tokens, len(config.axes_dim))
        pe = rope_table(ids, config.axes_dim, config.theta)
        img, txt, both = (torch.randn(BATCH, n, h, requires_grad=True) for n in (IMAGE, TEXT, tokens))
        for path, block in model.blocks():
            kind = path.split(".")[0]
            taken = (img, txt, *of_double, pe) if kind == "double_blocks" else (both, *of_single, pe)

            def run(block=block, taken=taken):
                out = block(*taken)
                return out if isinstance(out, tuple) else [out]

            kept = measure(run, [*block.parameters(), *taken]).kept
            # beside these, what marks a recomputed region in autograd's graph
            assert 0 <= kept - 4 * BATCH * want[kind] <= 64, (path, kept, dim)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "name", "away"),
    [
        ("flux1", "full", True),
        ("flux1", "attention", False),
        ("flux1", "budget", True),
        ("flux2", "attention", True),
        ("flux2", "by kind", False),
        ("flux2", "budget 0", False),
    ],
)
def test_compiled(family, name, away):
    torch._dynamo.reset()
    section = (SECTIONS | BUDGETS)[name] | {"offload": away}
    want = gradients(build(family, {"mode": "none"}, torch.float64))
    with watching() as moved:
        got = gradients(build(family, section, torch.float64, compile=True))
    for key, gradient in want.items():
        assert (got[key] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), key
    assert len(moved) >= (DOUBLE + SINGLE) * away
    assert torch._functorch.config.activation_memory_budget == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("name", [*SECTIONS, "budget"])
def test_compiled_in_bfloat16(name):
    """Where CPUs multiply by an operator of our own, whose results policies keep or not."""
    torch._dynamo.reset()
    section = (SECTIONS | BUDGETS)[name]
    want = gradients(build("flux1", {"mode": "none"}, torch.bfloat16))
    got = gradients(build("flux1", section, torch.bfloat16, compile=True))
    for key, gradient in want.items():
        assert (got[key] - gradient).norm() <= 0.05 * gradient.norm(), key


@pytest.mark.slow
def test_budgets_count_operators_of_our_own():
    """The compiler would take them for free, and compute all of them again before it looks at the budget."""

    class Linears(Ops):
        KINDS = (("linear", ("linear_by_onednn.default",)),)

    def again(budget: float) -> int:
        torch._dynamo.reset()
        section = {"mode": "memory_budget", "memory_budget": budget}
        count = Linears()
        gradients(build("flux1", section, torch.bfloat16, compile=True), count=count)
        return count.counts["linear"]

    assert again(0.7) == 0 < again(0)


def saved_bytes(section: dict) -> int:
    """What compiled blocks hold for backward."""
    torch._dynamo.reset()
    model = build("flux1", section, compile=True)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        out = model(**arguments(model.config, BATCH, image=IMAGE, text=TEXT, dtype=torch.float32))
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.slow
def test_less_budget_less_memory():
    at = {budget: saved_bytes({"mode": "memory_budget", "memory_budget": budget}) for budget in (0, 0.5, 1)}
    assert at[0] < at[0.5] < at[1] == saved_bytes({"mode": "none"})
    assert at[0.5] - at[0] == pytest.approx(0.5 * (at[1] - at[0]), rel=0.3)


@contextmanager
def watching() -> Iterator[list[str]]:
    """What happens to storages that are moved, in order: "out", "in" and "gone"."""
    events: list[str] = []

    class Watched(Moved):
        def _copy(self, target, source):
            events.append("out" if target is self.host else "in")
            super()._copy(target, source)

        def __del__(self):
            super().__del__()
            events.append("gone")

    with patch.object(offload, "Moved", Watched):
        yield events


@pytest.mark.parametrize("name", ["none", "full", "op", "attention"])
def test_offload_leaves_nothing_behind(name):
    """No cycle of references holds what was moved: the trainer lets the garbage collector sleep."""
    model = build("flux1", SECTIONS.get(name, {"mode": "none"}) | {"offload": True})
    gc.collect()
    gc.disable()
    try:
        with watching() as events:
            gradients(model)
        assert events.count("gone") == events.count("out") > 0
        # All come back, but those of the last block, which never leave the device.
        assert 0 < events.count("out") - events.count("in") < 0.5 * events.count("out")
    finally:
        gc.enable()


@pytest.mark.parametrize("lengths", [None, ((TEXT + IMAGE,), (TEXT + IMAGE - 3,))], ids=("", "padded"))
def test_offload_in_full_mode_moves_the_tokens(lengths):
    """And only these: twice each in double-stream blocks; not the positions that all blocks share."""
    model = build("flux1", {"mode": "full", "offload": True})
    with (
        watching() as events,
        patch.object(offload, "LARGE", BATCH * TEXT * CONFIGS["flux1"].hidden_size * 4),
    ):
        gradients(model, lengths=lengths)
    outs = 2 * DOUBLE + SINGLE
    assert Counter(events) == {"out": outs, "in": outs - 1, "gone": outs}
    # The first block in backward is the last in forward; while it runs, the one before it comes.
    assert events[:outs] == ["out"] * outs
    assert events[outs] == "in"


def test_offload_in_two_forwards_and_twice_back():
    """Micro-batches in flight, as in a pipeline; and a graph that is kept and run again."""
    plain, moved = build("flux2", {"mode": "none"}), build("flux2", {"mode": "none", "offload": True})
    for model in (plain, moved):
        losses = [
            model(**arguments(model.config, BATCH, image=IMAGE, text=TEXT, dtype=torch.float32, seed=seed))
            .square()
            .sum()
            for seed in (1, 2)
        ]
        losses[0].backward(retain_graph=True)
        losses[1].backward()
        losses[0].backward()
    for p, q in zip(plain.parameters(), moved.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_no_gradient_no_copies():
    model = build("flux1", {"mode": "attention", "offload": True})
    with watching() as events, torch.no_grad():
        model(**arguments(model.config, BATCH, dtype=torch.float32))
    assert not events


class Stream:
    """Writes down what would happen on a stream of a GPU."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def record_event(self) -> str:
        self.log.append(f"{self.name} has copied")
        return "copy"

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for the {event}")


def test_streams_wait_for_each_other(monkeypatch):
    """A copy for what it copies and for the memory it fills; who reads or frees, for the copy."""
    log: list[str] = []
    main, side = Stream("main", log), Stream("side", log)
    current = [main]

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, pin_memory=False, **options: empty(*shape, **options))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "stream", entered)
    copied = ["side waits for main", "side has copied"]

    there = torch.arange(8, dtype=torch.uint8)
    moved = Moved(there, side)
    moved.unread = 1
    assert log == copied
    moved.let_go()
    assert log[2:] == ["main waits for the copy"]
    moved.fetch()
    assert log[3:] == copied
    assert torch.equal(moved.read(), there)
    assert log[5:] == ["main waits for the copy"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True], ids=("eager", "compiled"))
@pytest.mark.parametrize("name", ["none", *SECTIONS])
def test_offload_on_a_gpu(name, compile):
    """Copies go their own way there: no gradient may read what has not arrived."""
    section = SECTIONS.get(name, {"mode": "none"})
    torch._dynamo.reset()
    want = gradients(build("flux1", section, compile=compile, device="cuda"))
    for _ in range(3):
        got = gradients(build("flux1", section | {"offload": True}, compile=compile, device="cuda"))
        for key, gradient in want.items():
            assert (got[key] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), key
