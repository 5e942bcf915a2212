"""What the model tests notice: bugs planted between transformers' modules and the kernels."""

import pytest
import torch

from ..kernels.parity import OverLimit
from ..planting import Bug, plant
from .families import FAMILIES, batch, build, fast_copy, with_lora
from .test_fp8_compute import check_trained_weight
from .test_parity import check_same_step, left_padded, packed
from .test_weight_keeping import check_exchanged_state


def checks(family, inputs=lambda config, device: batch(config, device=device), *, setting=False, **options):
    """One step of a family beside transformers and PEFT; `inputs(config, device)` is its batch."""

    def check(device):
        config = FAMILIES[family]
        plain = build(config, device=device)
        fast = with_lora(fast_copy(plain, setting=setting), **options)
        check_same_step(fast, with_lora(plain, **options), inputs(config, device))

    return check


def with_num_items(config, device):
    """A part of a larger batch, as under gradient accumulation."""
    return {**batch(config, device=device), "num_items_in_batch": 1000}


BLOCKS = {
    "labels_shifted_twice": Bug("labels[:, 1:], (0, 1)", "labels[:, 2:], (0, 2)", checks("llama")),
    "labels_not_shifted": Bug("labels[:, 1:], (0, 1)", "labels, (0, 0)", checks("llama")),
    "last_label_wraps_around": Bug(
        "nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)", "labels.roll(-1, 1)",
        checks("llama", left_padded),
    ),
    "left_padding_taken_for_right": Bug(
        "return ordered & ~(~visible & (aligned_labels != IGNORE_INDEX)).any()", "return ordered | True",
        checks("llama", left_padded),
    ),
    "documents_not_kept_apart": Bug(
        "documents.on(hidden_states.device) if documents.is_packed else None", "None",
        checks("llama", packed),
    ),
    "items_of_this_part_counted": Bug("num_items=num_items,", "num_items=None,", checks("llama", with_num_items)),
    "scores_not_capped": Bug("if module.caps_scores else 0.0", "if False else 0.0", checks("gemma2")),
    "windows_forgotten": Bug(
        "window = window if window < documents.length else 0", "window = 0", checks("gemma3_text")
    ),
}  # fmt: skip
FUSED_PARTS = {
    "query_norm_forgotten": Bug('if "q_norm" in heads:', "if False:", checks("qwen3")),
    "norm_of_the_attention_taken_for_that_before_the_mlp": Bug(
        'own["pre_feedforward_layernorm" if norms_outputs else "post_attention_layernorm"]',
        'own["post_attention_layernorm"]', checks("gemma3_text"),
    ),
    "norms_of_the_outputs_forgotten": Bug(
        'norms_outputs = "pre_feedforward_layernorm" in own', "norms_outputs = False", checks("gemma2")
    ),
    "norms_exchanged": Bug(
        '"input_norm": own["input_layernorm"]', '"input_norm": own["post_attention_layernorm"]', checks("llama")
    ),
}  # fmt: skip
LORA_VIEW = {
    "scaling_ignored": Bug("float(lora.scaling[name])", "1.0", checks("llama")),
    "scaling_of_plain_lora_under_rslora": Bug(
        "float(lora.scaling[name])", "lora.lora_alpha[name] / lora.r[name]", checks("llama", use_rslora=True)
    ),
    "dropout_ignored": Bug(
        "dropout.p if isinstance(dropout, nn.Dropout) and module.training else 0.0", "0.0",
        checks("llama", lora_dropout=0.2),
    ),
    "exchanged_statistics_ignored": Bug(
        'watch.entries(quantization.__dict__, "absmax")', "pass", check_exchanged_state
    ),
    "bias_ignored": Bug("return Projection(weight, bias)", "return Projection(weight)", checks("qwen2")),
}  # fmt: skip
WATCH = {
    "trained_weight_in_fp8": Bug(
        "if list(map(_REQUIRES_GRAD, self._tensors)) != self._trained:", "if False:", check_trained_weight
    ),
}
BUGS = {"blocks": BLOCKS, "fused_parts": FUSED_PARTS, "lora_view": LORA_VIEW, "watch": WATCH}


@pytest.mark.parametrize(("module", "bug"), [
    pytest.param(module, bug, id=f"{module}-{name}")
    for module, bugs in BUGS.items() for name, bug in bugs.items()
])  # fmt: skip
def test_planted_bug_is_noticed(module, bug, monkeypatch, tmp_path):
    device = torch.device("cpu")  # where PEFT's dropout draws the same numbers as ours
    bug.check(device)
    with monkeypatch.context() as planting:
        plant(f"fastllm.models.{module}", bug, planting, tmp_path)
        with pytest.raises(OverLimit):
            bug.check(device)
