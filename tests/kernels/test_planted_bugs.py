"""What the kernel tests notice: bugs planted in the kernels, their launches and their references.

Every check here is one that the suite runs, at a size that suits the bug.
"""

import dataclasses
from collections.abc import Callable

import pytest
import torch

from fastllm.kernels import linear_cross_entropy
from fastllm.kernels.layer_definition import Keep
from fastllm.kernels.linear_cross_entropy import LogitTransform

from ..planting import Bug, plant
from .layers import Spec
from .parity import OverLimit, Setting
from .test_activation import check_activation
from .test_activation import check_overlay as check_activation_overlay
from .test_attention import check_narrowed, check_two_functions, check_under_autograd, masks
from .test_decoder_layer import SPECS, check_away, check_keep_modes, check_layer
from .test_fp8 import check_group as check_fp8_group
from .test_kept_weights import (
    adapters_trained,
    check_follows,
    dense_edited,
)
from .test_layer_norm import check_add_and_norm as check_add_and_layer_norm
from .test_layer_norm import check_layer_norm
from .test_linear_cross_entropy import Case, check_loss, check_statistics
from .test_lora import DROPOUT, GROUPS, RANK_STABILIZED, check_group
from .test_nf4 import check_dequantize
from .test_rms_norm import check_add_and_norm, check_rms_norm
from .test_rope import check_rope
from .test_vision_block import SPECS as BLOCK_SPECS
from .test_vision_block import check_block, check_recomputation

# Triton's interpreter computes masked lanes too, in numpy.
pytestmark = [
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("narrow_extension"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="a bug that writes past a tensor ends the CUDA context of every later test"
    ),
]


def checks(
    function: Callable[..., None], *args, on: str = "triton", dtype: torch.dtype = torch.float32, **options
) -> Callable[[torch.device], None]:
    """`function(setting, ...)` in the implementation that holds the bug; references run on the CPU."""

    def check(device: torch.device) -> None:
        device = device if on == "triton" else torch.device("cpu")
        function(Setting(on, dtype, device), *args, **options)

    return check


def check_in_chunks(setting: Setting, case: Case) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(linear_cross_entropy, "MIN_CHUNK_ROWS", 16)
        patch.setattr(linear_cross_entropy, "_CHUNK_ELEMENTS", 1)
        check_loss(setting, case)


def check_masked_attention(setting: Setting) -> None:
    check_two_functions(setting, "grouped", masks(setting, "grouped", "bool"))


def layer(name: str, on: str = "reference", **changes) -> Callable[[torch.device], None]:
    return checks(check_layer, dataclasses.replace(SPECS[name], **changes), on=on)


def block(name: str, on: str = "reference", **changes) -> Callable[[torch.device], None]:
    return checks(check_block, dataclasses.replace(BLOCK_SPECS[name], **changes), on=on)


RMS_NORM = {
    "eps_missing": Bug(
        "tl.sum(x * x, axis=1) / width + eps", "tl.sum(x * x, axis=1) / width",
        checks(check_rms_norm, 7, 100),
    ),
    "mean_over_padding": Bug(
        "tl.sum(x * x, axis=1) / width", "tl.sum(x * x, axis=1) / BLOCK",
        checks(check_rms_norm, 7, 100),
    ),
    "backward_sign": Bug(
        "dx = (scaled - normed", "dx = (scaled + normed", checks(check_rms_norm, 7, 100)
    ),
    "backward_term_dropped": Bug(
        "(tl.sum(scaled * normed, axis=1) / width)", "(tl.sum(scaled * 0.0, axis=1) / width)",
        checks(check_rms_norm, 7, 100),
    ),
    "backward_without_offset": Bug(
        "dx.stride(0), offset,", "dx.stride(0), 0.0,", checks(check_rms_norm, 7, 100, offset=1.0)
    ),
    "weight_gradient_of_the_last_rows_only": Bug(
        "dw += tl.sum(dy * normed, axis=0)", "dw = tl.sum(dy * normed, axis=0)",
        checks(check_rms_norm, 515, 2049),
    ),
    "residual_gradient_dropped": Bug(
        "HAS_RESIDUAL=residual_grad is not None", "HAS_RESIDUAL=False",
        checks(check_add_and_norm, 7, 100),
    ),
    "sum_not_rounded_before_the_norm": Bug(
        "x = rounded.to(tl.float32)", "x = x.to(tl.float32)",
        checks(check_add_and_norm, 33, 257, dtype=torch.float16),
    ),
    "statistics_in_16_bit": Bug(
        "wide = x.to(accumulate)", "wide = x",
        checks(check_rms_norm, 7, 100, on="reference", dtype=torch.float16),
    ),
}  # fmt: skip

ROPE = {
    "halves_swapped": Bug(
        "first, second = i[None, :], half + i[None, :]", "second, first = i[None, :], half + i[None, :]",
        checks(check_rope, "grouped"),
    ),
    "sign": Bug(
        "        y1 = x1 * cos1 - x2 * sin1\n", "        y1 = x1 * cos1 + x2 * sin1\n",
        checks(check_rope, "grouped"),
    ),
    "backward_turns_the_same_way": Bug(
        "q_grad, k_grad, inverse=True", "q_grad, k_grad", checks(check_rope, "grouped")
    ),
    "angles_of_the_first_row_of_the_batch": Bug(
        "cos.stride(0) if cos.shape[0] > 1 else 0", "0", checks(check_rope, "grouped", batch_of_angles=2)
    ),
    "tail_never_written": Bug(
        "TAIL=next_power_of_2(head_dim - 2 * half) if head_dim > 2 * half else 0", "TAIL=0",
        checks(check_rope, "partial_rotary"),
    ),
    "sine_of_the_wrong_half": Bug(
        "y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin2",
        "y1, y2 = x1 * cos1 - x2 * sin1, x2 * cos2 + x1 * sin1", checks(check_rope, "grouped", on="reference"),
    ),
}  # fmt: skip

LAYER_NORM = {
    "mean_not_taken_away": Bug(
        "centered = tl.where(live, x - mean[:, None], 0.0)", "centered = tl.where(live, x, 0.0)",
        checks(check_layer_norm, 7, 100),
    ),
    "variance_of_the_padding": Bug(
        "centered = tl.where(live, x - mean[:, None], 0.0)", "centered = x - mean[:, None]",
        checks(check_layer_norm, 7, 100),
    ),
    "eps_missing": Bug(
        "tl.sum(centered * centered, axis=1) / width + eps", "tl.sum(centered * centered, axis=1) / width",
        checks(check_layer_norm, 7, 100),
    ),
    "backward_without_the_mean_of_dy": Bug("- level[:, None]", "", checks(check_layer_norm, 7, 100)),
    "backward_without_the_mean_of_x": Bug(
        "normed = tl.where(live, (x - mean[:, None])", "normed = tl.where(live, x", checks(check_layer_norm, 7, 100)
    ),
    "gradients_of_the_last_rows_only": Bug(
        "db += tl.sum(dy, axis=0)", "db = tl.sum(dy, axis=0)", checks(check_layer_norm, 515, 2049)
    ),
    "weight_and_bias_gradients_exchanged": Bug(
        "dw, db = partial.sum(1)", "db, dw = partial.sum(1)", checks(check_layer_norm, 7, 100)
    ),
    "residual_gradient_dropped": Bug(
        "HAS_RESIDUAL=residual_grad is not None", "HAS_RESIDUAL=False", checks(check_add_and_layer_norm, 7, 100)
    ),
    "statistics_in_16_bit": Bug(
        "centered = x.to(accumulate)", "centered = x",
        checks(check_layer_norm, 7, 100, on="reference", dtype=torch.float16),
    ),
}  # fmt: skip

ACTIVATION = {
    "slope_term_dropped": Bug(
        "slope = sigmoid + acted * (1.0 - sigmoid)", "slope = sigmoid", checks(check_activation, 5, 97, name="silu")
    ),
    "tanh_slope_constant": Bug(
        "3.0 * 0.044715", "2.0 * 0.044715", checks(check_activation, 5, 97, name="gelu_tanh")
    ),
    "quick_slope_without_its_factor": Bug(
        "1.702 * acted", "acted", checks(check_activation, 5, 97, name="quick_gelu")
    ),
    "y_never_written": Bug(
        "STORE_Y=y_out is not None", "STORE_Y=False", checks(check_activation_overlay, "quick_gelu")
    ),
    "other_gelu": Bug(
        '"tanh" if name == "gelu_tanh" else "none"', '"none" if name else "tanh"',
        checks(check_activation, 5, 97, name="gelu_tanh", on="reference"),
    ),
}  # fmt: skip

NF4 = {
    "nested_offset_missing": Bug(
        "* scale2 + tl.load(offset_ptr)", "* scale2", checks(check_dequantize, 65, 192)
    ),
    "nested_block_size": Bug(
        "blocks // NESTED_BLOCK", "blocks // (2 * NESTED_BLOCK)", checks(check_dequantize, 300, 256)
    ),
    "nibbles_swapped": Bug(
        "high, low = _values_of(", "low, high = _values_of(", checks(check_dequantize, 3, 128)
    ),
    "code_rounded_before_the_product": Bug(
        "body = values[:full]", "body = values[:full].to(dtype)",
        checks(check_dequantize, 65, 192, on="reference", dtype=torch.float16),
    ),
    "reference_without_the_nested_offset": Bug(
        "* scale2 + weight.offset", "* scale2", checks(check_dequantize, 65, 192, on="reference")
    ),
}  # fmt: skip

LORA = {
    "scaling_missing_in_the_gradients_of_all_a": Bug(
        "(factor,) = scalings if", "(factor,) = (1.0,) if", checks(check_group, GROUPS["gate_up"])
    ),
    "scaling_missing_in_the_gradient_of_a": Bug(
        "stacked[ranks] *= projection.scaling", "stacked[ranks] *= 1.0", checks(check_group, RANK_STABILIZED)
    ),
    "bias_missing": Bug(
        "prepared.joined[: group.out_features], prepared.bias, y", "prepared.joined[: group.out_features], None, y",
        checks(check_group, GROUPS["odd"], weights="nf4"),
    ),
    "bias_of_the_wrong_projection": Bug(
        ".to(dtype) for part in parts]", ".to(dtype) for part in parts[::-1]]", checks(check_group, GROUPS["one_bias"])
    ),
    "input_gradient_without_adapters": Bug(
        "return extended @ prepared.joined[:, : group.in_features], dy_low_rank",
        "return dy @ prepared.joined[: group.out_features, : group.in_features], dy_low_rank",
        checks(check_group, GROUPS["one"], weights="nf4"),
    ),
    "adapters_of_the_first_step_kept": Bug(
        "    if a is not None and b is not None:\n", "    if a is not None and b is not None and a.isnan().any():\n",
        checks(check_follows, adapters_trained, on="reference"),
    ),
    "low_rank_path_forgotten": Bug(
        "prepared.fp8, _fp8_term(group, low_rank, prepared.b), out=y)", "prepared.fp8, out=y)",
        checks(check_fp8_group, "dense", on="reference"),
    ),
    "low_rank_gradient_forgotten": Bug("dx = fp8_input_grad(dy, prepared.fp8, term)",
                                       "dx = fp8_input_grad(dy, prepared.fp8)",
                                       checks(check_fp8_group, "dense", on="reference")),
    "bias_forgotten": Bug("            y += prepared.bias\n", "            pass\n",
                          checks(check_fp8_group, "nf4", on="reference")),
    "dropout_mask_drawn_again": Bug(
        "masks = rest[: len(group.projections)]", "masks = dropout_masks(group, rows_of(x))",
        checks(check_group, DROPOUT),
    ),
    "dropout_not_rescaled": Bug(
        "x * mask * (1.0 / (1.0 - probability))", "x * mask", checks(check_group, DROPOUT)
    ),
    "gradient_of_a_sees_what_was_dropped": Bug(
        "dropped = _dropped(x, masks[index], projection.dropout)", "dropped = x", checks(check_group, DROPOUT)
    ),
    "gradient_of_b_from_the_first_ranks": Bug(
        "low_rank[:, ranks], projection.lora_b.dtype",
        "low_rank[:, : projection.rank], projection.lora_b.dtype", checks(check_group, GROUPS["gate_up"]),
    ),
}  # fmt: skip

LOSS = {
    "label_off_by_one": Bug(
        "tl.store(grads_ptr + label,", "tl.store(grads_ptr + (label + 1) % vocab,", checks(check_loss, Case()),
    ),
    "ignored_rows_counted": Bug(
        "num_items = (labels != ignore_index).sum()",
        "num_items = torch.ones_like(labels).sum()", checks(check_loss, Case()),
    ),
    "ignored_rows_not_zeroed": Bug(
        "(-target).masked_fill(ignored, 0.0)", "-target",
        checks(check_loss, Case(is_skipping=False), on="reference"),
    ),
    "softmax_not_rescaled": Bug(
        "total = total * rescale", "total = total",
        checks(check_loss, Case(rows=19, vocab=8192)),
    ),
    "softcap_slope_missing": Bug(
        "grad *= soft_cap_slope(z, softcap)", "grad *= 1.0",
        checks(check_loss, Case(transform=LogitTransform(softcap=5.0))),
    ),
    "logit_scale_missing_in_the_gradient": Bug(
        "            g = scale\n", "            g = 1.0\n",
        checks(check_loss, Case(transform=LogitTransform(scale=0.0625))),
    ),
    "gradients_in_the_wrong_rows": Bug(
        "index_copy_(0, kept, value)", "index_copy_(0, kept.flip(0), value)",
        checks(check_loss, Case()),
    ),
    "last_chunk_only": Bug(
        "add_matmul(dw, dlogits.t(), hidden)", "dw.copy_(dlogits.t() @ hidden)",
        checks(check_in_chunks, Case(rows=33, ignored=0.0, weights="trained")),
    ),
    "hidden_gradient_without_the_adapter": Bug(
        "if prepared.a is not None and prepared.b is not None:", "if False:",
        checks(check_loss, Case(rank=5)),
    ),
    "entropy_sign": Bug(
        "lse - weighted / total", "lse + weighted / total",
        checks(check_statistics, Case()),
    ),
    "gradients_summed_in_16_bit": Bug(
        "dtype=torch.promote_types(p.dtype, torch.float32), device", "dtype=p.dtype, device",
        checks(
            check_in_chunks, Case(rows=640, ignored=0.0, weights="trained", loss_scale=1024.0),
            on="reference", dtype=torch.float16,
        ),
    ),
    "losses_in_16_bit": Bug(
        "log_probs = torch.log_softmax(wide, dim=-1)",
        "log_probs = torch.log_softmax(wide, dim=-1).to(logits.dtype).float()",
        checks(check_loss, Case(loss_scale=1024.0), per_row=True, on="reference", dtype=torch.float16),
    ),
}  # fmt: skip

ATTENTION = {
    "mask_shifted": Bug(
        "device=q.device).tril()", "device=q.device).tril(1)",
        checks(check_under_autograd, "plain", "causal", on="auto"),
    ),
    "not_causal": Bug(
        "is_causal=mask is None and case.causal", "is_causal=False",
        checks(check_two_functions, "plain", None, on="auto"),
    ),
    "always_causal": Bug(
        "is_causal=mask is None and case.causal", "is_causal=mask is None",
        checks(check_two_functions, "plain", None, causal=False, on="auto"),
    ),
    "documents_joined": Bug(
        "torch.cat([_differentiable(whole)(*part) for part in parts], dim=2)", "_differentiable(whole)(q, k, v)",
        checks(check_narrowed, "segments", "autograd", on="auto"),
    ),
    "default_scale": Bug(
        "scale=case.scaling, enable_gqa=q", "enable_gqa=q",
        checks(check_under_autograd, "plain", "causal", on="auto"),
    ),
    "key_heads_in_the_wrong_order": Bug(
        "x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)",
        "x.repeat(1, q.shape[1] // x.shape[1], 1, 1)", checks(check_masked_attention, on="auto"),
    ),
}  # fmt: skip

LAYER = {
    "residual_of_the_wrong_branch": Bug(
        ".add_(state.middle)", ".add_(state.x)", layer("llama_dense")
    ),
    "residual_gradient_dropped": Bug(
        "residual_grad=dmiddle,", "residual_grad=None,", layer("llama_dense")
    ),
    "rotation_not_undone": Bug(
        "dq_rows, dk_rows, inverse=True)", "dq_rows, dk_rows)", layer("llama_nf4", on="triton")
    ),
    "head_norms_without_backward": Bug(
        "norm_grads |= _norm_heads_backward(layer, state, dqkv, needs_norm)", "pass",
        layer("qwen3", trains_norms=False),
    ),
    "stale_gradient_of_v": Bug(
        "dv.transpose(1, 2).flatten(2)", "dv.zero_().transpose(1, 2).flatten(2)", layer("llama_nf4", on="triton")
    ),
    "wrong_norm_in_the_backward": Bug(
        "    norm = layer.input_norm\n    prepared = weights.take(", "    prepared = weights.take(",
        layer("llama_dense"),
    ),
    "norm_of_an_output_takes_the_wrong_gradient": Bug(
        "dmiddle, state.attention_out, state", "dy, state.attention_out, state", layer("gemma2")
    ),
    "wrong_norm_of_an_output_in_the_backward": Bug(
        "state.mlp_out_rstd, layer.mlp_out_norm", "state.mlp_out_rstd, layer.post_norm", layer("gemma2")
    ),
    "offset_missing_in_the_norm_of_an_output": Bug(
        "offset=norm.offset, out=_empty_rows(rows, dtype)", "out=_empty_rows(rows, dtype)", layer("gemma2")
    ),
    "other_dropout_in_a_recomputed_output": Bug(
        "_mlp_output(layer, weights, state, keep=True)",
        "weights.take('down'), torch.rand(1), _mlp_output(layer, weights, state, keep=True)",
        checks(check_keep_modes, Spec(dropout=0.3, has_out_norms=True, weights="dense"), on="reference"),
    ),
    "random_numbers_forgotten_on_the_host": Bug(
        "ctx.dtype, None if ctx.rng is not None else keep)", "ctx.dtype, keep)",
        checks(check_away, Spec(dropout=0.3, weights="dense"), on="reference"),
    ),
    "norms_of_heads_exchanged": Bug(
        "in zip(layer.qkv_columns[:2], (layer.query_norm", "in zip(layer.qkv_columns[1::-1], (layer.query_norm",
        layer("qwen3"),
    ),
    "other_dropout_when_recomputed": Bug(
        "with replayed(rng, dy.device):", "with replayed(None, dy.device):",
        checks(check_keep_modes, Spec(dropout=0.3, weights="dense"), on="reference"),
    ),
    "dropout_masks_forgotten_when_recomputed": Bug(
        "state.down_masks = dropout_masks(layer.down, gate)", "pass",
        checks(check_layer, dataclasses.replace(SPECS["dropout"], keep=Keep.INPUT), on="reference"),
    ),
}  # fmt: skip

BLOCK = {
    "residual_of_the_wrong_branch": Bug(".add_(state.middle)", ".add_(state.x)", block("qwen2_vl")),
    "residual_gradient_dropped": Bug(
        "needs_norm1, residual_grad=dmiddle", "needs_norm1, residual_grad=torch.zeros_like(dmiddle)",
        block("qwen2_vl"),
    ),
    "rotation_not_undone": Bug(
        "dq_rows, dk_rows, inverse=True)", "dq_rows, dk_rows)", block("qwen2_vl", on="triton")
    ),
    "towers_without_rotation_forgotten": Bug(
        "        dk_rows.copy_(dk)\n", "", block("siglip", on="triton")
    ),
    "stale_gradient_of_v": Bug("    dv_rows.copy_(dv)\n", "", block("qwen2_vl", on="triton")),
    "queries_and_keys_exchanged": Bug(
        "q, k, v = (part.transpose", "k, q, v = (part.transpose", block("qwen2_vl")
    ),
    "wrong_norm_in_the_backward": Bug(
        "_normed(block.norm2, state.middle, out=hidden)", "_normed(block.norm1, state.middle, out=hidden)",
        block("qwen2_vl"),
    ),
    "gradients_of_a_norm_exchanged": Bug("zip((dw, db), needs", "zip((db, dw), needs", block("qwen3_vl")),
    "other_dropout_when_recomputed": Bug(
        "with replayed(rng, x.device):", "with replayed(None, x.device):",
        checks(check_recomputation, dataclasses.replace(BLOCK_SPECS["qwen2_vl"], dropout=0.3), on="reference"),
    ),
    "dropout_masks_forgotten_when_recomputed": Bug(
        "state.down_masks = dropout_masks(block.down, state.up[:, : block.down.in_features])", "pass",
        block("dropout", recompute=True),
    ),
}  # fmt: skip

LOW_RANK_FILL = {
    "scaling_missing": Bug(
        "mask=live & in0, other=0.0).to(tl.float32) * s0", "mask=live & in0, other=0.0).to(tl.float32)",
        checks(check_group, GROUPS["one"]),
    ),
    "scaling_missing_in_the_reference": Bug(
        "projection.lora_a.detach() * projection.scaling", "projection.lora_a.detach()",
        checks(check_group, GROUPS["one"], on="reference"),
    ),
    "b_transposed": Bug(
        "b0 + (i - row0) * r0 + (j - rank0)", "b0 + (i - row0) + (j - rank0) * n",
        checks(check_group, GROUPS["one"]),
    ),
    "last_rank_dropped": Bug(
        "in0, in1, in2 = row < rank0 + r0,", "in0, in1, in2 = row < rank0 + r0 - 1,",
        checks(check_group, GROUPS["gate_up"], weights="nf4"),
    ),
    "stale_buffer": Bug(
        "        b.zero_()\n", "", checks(check_group, GROUPS["gate_up"], on="reference")
    ),
}  # fmt: skip

NORMED_INPUT = {
    "rows_not_scaled": Bug(
        "torch.mul(dy_low_rank, rstd[:, None], out=scaled)", "scaled.copy_(dy_low_rank)", layer("llama_dense")
    ),
    "columns_not_scaled": Bug(
        "return product.mul_(", "return product; (", layer("llama_dense")
    ),
    "offset_missing": Bug("+ norm.offset if norm.offset else weight", "if norm.offset else weight", layer("gemma")),
    "offset_missing_in_the_recomputed_norm": Bug(
        "norm.eps, offset=norm.offset, out=hidden)", "norm.eps, out=hidden)", layer("gemma", weights="trained")
    ),
    "weights_take_the_input_of_the_norm": Bug("is_read = needs_weight or (", "is_read = (", layer("full_finetuning")),
    "dropout_forgotten": Bug("(prepared.group.has_dropout or not has_range)", "not has_range", layer("dropout")),
}  # fmt: skip

HOST = {
    "heads_and_tokens_exchanged": Bug(
        "view(batch, length, heads, head_dim).transpose(1, 2)", "view(batch, heads, length, head_dim)",
        checks(check_away, Spec(weights="dense"), on="reference"),
    ),
    "rows_not_waited_for": Bug(
        "            self._coming.arrive()\n", "", checks(check_away, Spec(weights="dense"), 5, on="reference")
    ),
}  # fmt: skip

WEIGHT_FORMS = {
    "dense_weight_kept": Bug(
        "if not isinstance(projection.weight, Nf4Weight):\n            copy_rows",
        "if known is None and not isinstance(projection.weight, Nf4Weight):\n            copy_rows",
        checks(check_follows, dense_edited, dense=True, on="reference"),
    ),
}  # fmt: skip
BUGS = {
    "rms_norm": RMS_NORM, "layer_norm": LAYER_NORM, "rope": ROPE, "activation": ACTIVATION, "nf4": NF4,
    "lora": LORA, "low_rank_fill": LOW_RANK_FILL, "linear_cross_entropy": LOSS, "attention": ATTENTION,
    "decoder_layer": LAYER, "normed_input": NORMED_INPUT, "decoder_activations": HOST, "vision_block": BLOCK,
    "weight_forms": WEIGHT_FORMS,
}  # fmt: skip


def check_noticed(module: str, bug: Bug, device: torch.device, monkeypatch, folder) -> None:
    """The check passes, and fails with the bug planted."""
    bug.check(device)
    with monkeypatch.context() as planting:
        plant(f"fastllm.kernels.{module}", bug, planting, folder)
        with pytest.raises(OverLimit):
            bug.check(device)


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}") for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, device, monkeypatch, tmp_path):
    check_noticed(module, bug, device, monkeypatch, tmp_path)
