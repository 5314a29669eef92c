"""Where a step's time goes: operations by what they do, and the time in which the GPU does nothing."""

from __future__ import annotations

import pytest

from helpers.step_costs import IDLE, MOST, costs, kind_of, table


def test_time_is_given_to_what_it_went_to():
    operations = [
        ("dequantize_kernel", 0, 10), ("nvjet_tst_128x256", 10, 40), ("nvjet_tst_64x8", 35, 45),  # these two overlap
        ("Memcpy HtoD (Pinned -> Device)", 60, 61), ("dequantize_kernel", 61, 66),
    ]  # fmt: skip
    rows = {row["cost"]: row for row in costs(operations, wall_ms=100)}
    assert {name: row["ms"] for name, row in rows.items()} == {
        IDLE: 49, "matrix products": 40, "NF4 decoding": 15, "copies and fills": 1,
    }  # fmt: skip
    assert rows["NF4 decoding"]["operations"] == 2 and rows["NF4 decoding"]["share"] == 0.15
    assert rows["matrix products"]["speedup_without"] == pytest.approx(100 / 60, abs=0.01)
    assert list(rows) == sorted(rows, key=lambda name: -rows[name]["ms"])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("cutlass_80_wmma_tensorop_bf16_s161616gemm", "matrix products"),
        ("triton_red_fused__log_softmax_nll_loss_forward_1", "softmax and loss"),
        ("triton_poi_fused_add_mul_3", "fused elementwise kernels, norms"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("void at::native::multi_tensor_apply_kernel<LpNormFunctor>", "gradient norm and clipping"),
        ("Memset (Device)", "copies and fills"), ("void at::native::index_kernel", "other kernels"),
    ],
)  # fmt: skip
def test_kernels_are_known_by_their_names(name, kind):
    assert kind_of(name) == kind


def test_no_more_than_ten_rows_and_a_table_of_them():
    names = ["dequantize", "flash", "gemm", "nll", "adam", "LpNorm", "Memcpy", "triton_poi", "x"]
    rows = costs([(name, i, i + 1) for i, name in enumerate(names)], wall_ms=20)
    assert len(rows) == MOST and rows[0] == {
        "cost": IDLE,
        "operations": 0,
        "ms": 11,
        "share": 0.55,
        "speedup_without": 2.22,
    }
    assert table(rows).splitlines()[2] == f"| {IDLE} |  | 11.0 | 55% | 2.22x as fast |"
