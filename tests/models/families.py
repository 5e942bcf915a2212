"""Small models of each supported family, plain and adapted side by side, and how far each is from float64."""

import copy
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from fastllm.kernels.nf4 import dequantize_nf4_reference
from fastllm.models.arch import arch_of
from fastllm.models.lora_view import projection_of
from fastllm.models.patch import adapt

PROJECTIONS = [
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
]  # fmt: skip
_COMMON = {
    "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 307, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": LlamaConfig(**_COMMON),
    "llama3-rope": LlamaConfig(
        **_COMMON,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**_COMMON, sliding_window=16),
    "qwen2": Qwen2Config(**_COMMON, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**_COMMON, head_dim=32),
    "phi3": Phi3Config(**_COMMON, rope_parameters={
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75,
    }),
    "gemma": GemmaConfig(**_COMMON, head_dim=24),
    "gemma2": Gemma2Config(
        **_COMMON, head_dim=24, sliding_window=16, query_pre_attn_scalar=40, attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0, attn_implementation="eager",  # SDPA has no cap for the scores
    ),
    "gemma3_text": Gemma3TextConfig(
        **_COMMON, head_dim=24, sliding_window=16, query_pre_attn_scalar=40,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
}  # fmt: skip


def build(config, *, dtype=torch.float32, device="cpu", seed=0):
    """A plain transformers model with weights spread out enough that every part of it matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    neutral = 0.0 if config.model_type.startswith("gemma") else 1.0  # of a norm's weight
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
            else:
                parameter.normal_(neutral, 0.1)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.to(device=device, dtype=dtype)


def with_lora(model, *, seed=1, **options):
    """PEFT's LoRA on all projections, both matrices away from zero, adapters in fp32 (float64 for float64)."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **options}
    adapted = get_peft_model(model, LoraConfig(**settings))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return adapted


def fast_copy(model, *, setting=False):
    """The same plain model adapted by fastllm, independent of the original."""
    clone = copy.deepcopy(model)
    adapt(clone, arch_of(clone.config), setting)
    return clone


def batch(config, *, device="cpu", seed=2, rows=3, length=29):
    """Token ids with right padding and masked prompts, as a collator makes them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, config.vocab_size, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    mask[1:2, length * 2 // 3 :] = 0
    ids[mask == 0] = config.pad_token_id
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :4] = -100
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


@dataclass
class Step:
    """Loss and gradients of one forward and backward."""

    loss: float
    grads: dict[str, torch.Tensor]

    def distance(self, truth: "Step") -> dict[str, float]:
        """Relative errors: of the loss, of the whole gradient, and the median, 95th percentile and largest of those of
        single tensors that carry at least a thousandth of the gradient's norm."""
        total = sum(float(g.double().square().sum()) for g in truth.grads.values()) ** 0.5
        errors, squares = [], 0.0
        for name, expected in truth.grads.items():
            difference = float((self.grads[name].double() - expected.double()).norm())
            squares += difference**2
            if float(expected.norm()) >= 1e-3 * total:
                errors.append(difference / float(expected.double().norm()))
        errors.sort()
        return {
            "loss": abs(self.loss - truth.loss) / abs(truth.loss),
            "whole": squares**0.5 / total,
            "median": errors[len(errors) // 2],
            "p95": errors[int(0.95 * (len(errors) - 1))],
            "worst": errors[-1],
        }


def on_device_of(model, inputs):
    """The inputs where the model is, as trainers put a collator's batch there."""
    return {name: value.to(model.device) if torch.is_tensor(value) else value for name, value in inputs.items()}


def step(model, inputs, *, autocast=None, loss_scale=1.0, seed=3):
    """One differentiated forward; gradients by parameter name."""
    model.train()
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    inputs = on_device_of(model, inputs)
    with torch.autocast(model.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        loss = model(**inputs).loss
    (loss * loss_scale).backward()
    grads = {n: p.grad.detach().cpu() / loss_scale for n, p in model.named_parameters() if p.requires_grad}
    return Step(float(loss.detach()), grads)


def float64_twin(adapted, auto_class=AutoModelForCausalLM):
    """The plain float64 model with the same weights: 4-bit layers become the matrices they stand for."""
    config = copy.deepcopy(adapted.get_base_model().config)
    config.quantization_config = None
    twin = auto_class.from_config(config, dtype=torch.float64)
    source = adapted.get_base_model()
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            owner, _, attribute = name.rpartition(".")
            module = source.get_submodule(owner)
            module = getattr(module, "base_layer", module)
            weight = getattr(module, attribute)
            if getattr(weight, "quant_state", None) is not None:
                weight = dequantize_nf4_reference(projection_of(module).weight, module.compute_dtype or torch.float32)
            parameter.copy_(weight)
    lora = adapted.peft_config["default"]
    wide = get_peft_model(twin, copy.deepcopy(lora))
    theirs = dict(adapted.named_parameters())
    for name, parameter in wide.named_parameters():
        if "lora_" in name:
            parameter.data = theirs[name].detach().to("cpu", torch.float64)
    return wide.to(source.device)
