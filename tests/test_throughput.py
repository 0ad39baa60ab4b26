"""The command that measures one GPU, on a CPU: a row for each case, arithmetic, and what does not fit."""

import importlib
import json
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.small_model import small, small2
from helpers.tiny_run import ROOT
from torch.utils.flop_counter import FlopCounterMode

from flux_trainer.models.flops import train_flops_per_sample
from flux_trainer.models.registry import FLAVORS
from flux_trainer.runtime.dist import init_distributed


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def module(name: str) -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setitem(FLAVORS, "flux-tiny", small(in_channels=64))
    monkeypatch.setitem(FLAVORS, "flux2-tiny", small2(in_channels=128))
    shape = ["--sizes", "32", "--text", "8", "--warmup", "1", "--steps", "3", "--out", str(tmp_path)]

    def rows(*words: str) -> list[dict[str, Any]]:
        module("throughput").main([*shape, *words])
        return json.loads((tmp_path / "throughput.json").read_text())[-1]["rows"]

    return rows


@pytest.mark.slow
def test_a_row_for_each_case(run, tmp_path):
    eager = ["none", "selective:2", "attention+offload"]
    words = ["--flavors", "flux-tiny,flux2-tiny", "--policies", ",".join([*eager, "memory_budget:0.5"])]
    rows = run(*words, "--compile", "off")
    found = [(r["flavor"], r["kind"], r["policy"]) for r in rows]
    ways = [(kind, policy) for kind in ("train", "frozen") for policy in eager] + [("inference", "none")]
    assert found == [(flavor, *way) for flavor in ("flux-tiny", "flux2-tiny") for way in ways]
    assert all(r["seconds"] > 0 and r["peak_gib"] > 0 and r["mfu"] is None for r in rows)
    page = (tmp_path / "throughput.md").read_text()
    assert page.count("\n| flux") == len(rows)
    assert f"torch {torch.__version__}" in page
    assert "    python benchmarks/throughput.py --sizes 32" in page


def test_a_profile_for_each_row(run, tmp_path):
    words = ["--flavors", "flux-tiny", "--kinds", "train,inference", "--policies", "none", "--compile", "off"]
    run(*words, "--profile")
    profile = (tmp_path / "throughput_profile.txt").read_text()
    assert profile.count("ms a step under the profiler") == 2
    assert "[matrix products] aten::" in profile


def test_arithmetic(run):
    """images/s x FLOPs of an image = FLOP/s, and MFU is their share of the peak."""
    words = ["--flavors", "flux-tiny", "--kinds", "train", "--policies", "none", "--compile", "off"]
    _, row = run(*words, "--batches", "1,3")
    assert row["tflop_per_image"] == train_flops_per_sample(FLAVORS["flux-tiny"], 4, 8) / 1e12
    assert row["images_per_second"] == pytest.approx(3 / row["seconds"])
    assert row["tflops"] == pytest.approx(row["images_per_second"] * row["tflop_per_image"])
    figures = module("throughput").figures(4, 800 * 10**12, 2.0, 1000e12)
    assert (figures["images_per_second"], figures["tflops"], figures["mfu"]) == (2.0, 400.0, 0.4)


@pytest.mark.parametrize("kind", ["train", "frozen", "inference"])
@pytest.mark.parametrize("flavor", ["flux-tiny", "flux2-tiny"])
def test_flops_are_those_of_the_step(run, flavor, kind):
    throughput, one_step = module("throughput"), module("one_step")
    case = throughput.Case(flavor, 32, 2, kind, "none", False, "none", 2, 1)
    init_distributed()
    step = one_step.make(kind, case.model, case.settings(8, []), torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        step()
    assert counter.get_total_flops() == 2 * one_step.flops(kind, case.model, 4, 8)


def test_what_does_not_fit_is_a_row_and_is_halved(run, tmp_path, monkeypatch):
    throughput = module("throughput")
    make = throughput.make

    def of_small_memory(kind, shape, *rest):
        if shape.depth + shape.depth_single_blocks > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(kind, shape, *rest)

    monkeypatch.setattr(throughput, "make", of_small_memory)
    words = ["--flavors", "flux-tiny", "--kinds", "frozen", "--policies", "full", "--compile", "off"]
    (row,) = run(*words, "--blocks", "3+5")
    assert row["seconds"] is row["tflops"] is row["images_per_second"] is row["peak_gib"] is None
    assert "| out of memory |" in (tmp_path / "throughput.md").read_text()
    rows = run(*words, "--blocks", "3+5", "--fit", "--append")
    assert [(r["double"], r["single"]) for r in rows] == [(3, 5), (2, 3), (1, 2)]
    assert [r["seconds"] is None for r in rows] == [True, True, False]
    assert (tmp_path / "throughput.md").read_text().count("| out of memory |") == 3


def test_no_blocks_are_left_to_halve():
    throughput = module("throughput")
    case = throughput.Case("flux-tiny", 32, 1, "train", "none", False, "none", 1, 2)
    assert throughput.halved(case) == replace(case, single=1)
    assert throughput.halved(replace(case, single=1)) is None
    assert throughput.halved(replace(case, double=0, single=1)) is None


def test_settings_of_a_run_hold_for_every_row(run):
    words = ["--flavors", "flux-tiny", "--kinds", "train", "--policies", "full", "--compile", "off"]
    (row,) = run(
        *words, "--optimizer.in_backward", "--training.max_norm=0", "--optimizer.state_dtype=bfloat16"
    )
    assert row["seconds"] > 0
    with pytest.raises(ValueError, match="max_norm"):
        run(*words, "--optimizer.in_backward")


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matrix products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void pytorch_flash::flash_bwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("triton_red_fused__scaled_dot_product_flash_attention_addmm_mul_0", "compiled"),
        ("triton_tem_fused_mm_3", "matrix products"),
        ("mkldnn::_linear_pointwise", "matrix products"),
        ("aten::baddbmm", "matrix products"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
    ],
)
def test_kernels_by_name(kernel, part):
    assert module("device_time").part_of(kernel) == part


@pytest.mark.slow
def test_compiled(run):
    words = ["--flavors", "flux-tiny", "--blocks", "1+1", "--policies", "full,memory_budget:0.5"]
    backend = "--compile.backend=aot_eager_decomp_partition"  # all of the compiler but its C++
    rows = run(*words, "--compile", "on", "--kinds", "train,inference", backend)
    assert [(r["kind"], r["policy"], r["compile"]) for r in rows] == [
        ("train", "full", True),
        ("train", "memory_budget:0.5", True),
        ("inference", "none", True),
    ]
    assert all(r["seconds"] > 0 for r in rows)
