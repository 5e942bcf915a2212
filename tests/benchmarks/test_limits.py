"""The arithmetic of the physical limit, against counts by hand, and the classes of a profile."""

import dataclasses

import pytest
import torch

from benchmarks.cases import CASES
from benchmarks.limits import Attention, floor, measured_product, shares, work
from benchmarks.profiling import Slice, breakdown, class_of


def flops_as_seconds(case):
    """The floor on a machine that computes one operation a second."""
    return floor(
        case, lambda kind, rows, inputs, outputs: 2.0 * rows * inputs * outputs,
        lambda attention: (float(attention.flops), 2.5 * attention.flops),
    )  # fmt: skip


def test_the_work_of_llama_8b():
    tokens, layers = 4 * 2048, 32
    layer = 4096 * (4096 + 1024 + 1024) + 4096 * 4096 + 4096 * 2 * 14336 + 14336 * 4096
    products = 2 * tokens * (layers * layer + 4096 * 128256)
    attention = layers * 4 * 32 * (2 * 2 * 2048 * 2048 * 128) // 2
    found = flops_as_seconds(CASES["qlora-8b"])
    assert found["products_s"] == 2 * products  # forward and the gradient of the input
    assert found["attention_s"] == 3.5 * attention
    assert found["floor_s"] == found["flops"] == 2 * products + 3.5 * attention
    again = 2 * tokens * layers * (layer - 14336 * 4096) + attention  # all but down_proj, and no head
    assert found["floor_recompute_s"] == found["floor_s"] + again


def test_full_fine_tuning_adds_the_gradients_of_the_weights():
    case = CASES["full-1b"]
    lora = dataclasses.replace(case, bits=16)
    assert flops_as_seconds(case)["products_s"] == 1.5 * flops_as_seconds(lora)["products_s"]


def test_accumulation_multiplies_the_step():
    once = CASES["qlora-8b"]
    case = dataclasses.replace(once, accumulate=4)
    assert flops_as_seconds(case)["floor_s"] == 4 * flops_as_seconds(once)["floor_s"]


def test_the_floor_of_a_trainers_step_has_its_batches_joined():
    case = CASES["qlora-8b-short"]
    launches = floor(case, lambda kind, rows, inputs, outputs: 1.0, lambda attention: (0.0, 0.0))
    assert launches["products_s"] == 2 * (32 * 4 + 1)
    assert launches["products"][0]["rows"] == 4 * 512


def test_the_vision_tower_counts_patches():
    products, attention = work(CASES["vl-7b-batch-8"])
    rows = {group.name: group.rows for group in products}
    assert rows["qkv"] == 8 * 195 and rows["vision qkv"] == 8 * 320 and rows["vision merger"] == 8 * 80
    assert attention == Attention(8, 195, 28, 4, 128, 28)


def test_joined_weights_are_used_where_they_are_faster():
    with_overhead = floor(CASES["smoke"], lambda kind, rows, inputs, outputs: 1.0, lambda attention: (0.0, 0.0))
    assert with_overhead["products_s"] == 2 * (2 * 4 + 1)  # two layers of four joined products, and the head


def test_the_share_of_a_measured_step():
    assert shares({"step_s": 0.5}, {"floor_s": 0.4, "floor_recompute_s": 0.5}) == {
        "of_floor": 0.8, "of_floor_recompute": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["forward", "dx", "dw"])
def test_products_run(kind):
    assert measured_product(kind, 8, 16, 24) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNN", "gemm"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7", "attention"),
        ("_flash_bwd_kv_kernel", "attention"),
        ("void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)", "dequantize"),
        ("_dequantize_kernel", "dequantize"),
        ("_rms_norm_bwd_kernel", "elementwise"),
        ("_glu_fwd_kernel", "elementwise"),
        ("void at::native::vectorized_elementwise_kernel<4, gpu_kernel_impl<lambda>>", "elementwise"),
        ("_cross_entropy_kernel", "loss"),
        ("_fill_low_rank_kernel", "lora"),
        ("Memcpy DtoH (Device -> Pinned)", "copies"),
        ("void kOptimizerStatic8bit2StateBlockwise<__nv_bfloat16, 1, 256, 1>", "optimizer"),
        ("unheard_of", "other"),
    ],
)  # fmt: skip
def test_kernels_have_classes(name, kind):
    assert class_of(Slice(name, 0, 1)) == kind


def test_narrow_products_are_of_lora():
    assert class_of(Slice("nvjet_tst", 0, 1, narrowest=48)) == "lora"
    assert class_of(Slice("nvjet_tst", 0, 1, narrowest=195)) == "gemm"


def test_the_breakdown_counts_overlaps_once_and_finds_gaps():
    found = breakdown([
        Slice("gemm", 0, 4000), Slice("Memcpy DtoH", 1000, 3000), Slice("gemm", 5000, 6000), Slice("rope", 6000, 6500),
    ])  # fmt: skip
    assert (found["span_ms"], found["busy_ms"], found["gaps_ms"]) == (6.5, 5.5, 1.0)
    assert found["classes_ms"] == {"gemm": 5.0, "copies": 2.0, "elementwise": 0.5}
    assert found["kernels"][0] == {"name": "gemm: gemm", "ms": 5.0, "calls": 2}
    assert [gap["ms"] for gap in found["gaps"]] == [1.0]
    assert breakdown([])["span_ms"] == 0


def test_floor_takes_real_timings():
    found = floor(CASES["smoke"], lambda *shape: 1e-3, lambda attention: (torch.tensor(1e-3).item(), 2e-3))
    assert found["floor_recompute_s"] > found["floor_s"] > 0
