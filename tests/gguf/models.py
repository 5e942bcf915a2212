"""Tiny models of every family, and tiny tokenizers of both kinds, made on the spot with transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

VOCAB_SIZE = 512
_TEXT = [Path(__file__).read_text(), Path(__file__).with_name("llama_cpp.py").read_text()]
_LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A model type with the settings that make it tiny, and what else is worth changing."""

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    lengths: tuple[int, ...] = (1, 7, 40)  # tokens of the prompts that it is judged on


_SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
_EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "long_factor": [1.0 + 0.1 * i for i in range(32)],
    "short_factor": [1.0 + 0.01 * i for i in range(32)],
}

FAMILIES = {
    "llama": Family("llama"),
    "llama, tied, llama3 rope": Family(
        "llama", {"tie_word_embeddings": True, "rope_parameters": _LLAMA3_ROPE, "head_dim": 32}, lengths=(1, 20, 90)
    ),
    "llama with biases": Family("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, linear rope": Family(
        "llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}
    ),
    "mistral": Family("mistral", {"sliding_window": None, "head_dim": 64}),
    "mixtral": Family("mixtral", {**_EXPERTS, "sliding_window": None}),
    "qwen2": Family("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": Family("qwen2", {"rope_parameters": YARN}, lengths=(1, 20, 90)),
    "qwen3": Family("qwen3", {"head_dim": 128, "tie_word_embeddings": False}),
    "qwen3moe": Family("qwen3_moe", {**_EXPERTS, "head_dim": 64, "norm_topk_prob": True}),
    "gemma": Family("gemma", {"head_dim": 64, "num_key_value_heads": 1}),
    "gemma2": Family(
        "gemma2",
        {"head_dim": 64, "query_pre_attn_scalar": 64, "sliding_window": 16, "num_hidden_layers": 4},
        lengths=(1, 14, 60),
    ),
    "gemma3": Family(
        "gemma3_text",
        {
            "head_dim": 64,
            "query_pre_attn_scalar": 64,
            "sliding_window": 16,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            },
        },
        lengths=(1, 14, 60),
    ),
    "phi3": Family("phi3", {"sliding_window": None}),
    # llama.cpp takes the long factors for any prompt in a context beyond the original one, 256 here
    "phi3, longrope": Family(
        "phi3",
        {"sliding_window": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 64},
        lengths=(70, 120),
    ),
    "phi3, longrope within the original context": Family(
        "phi3", {"sliding_window": None, "rope_parameters": _LONGROPE, "original_max_position_embeddings": 256}
    ),
    "phi4 mini": Family(
        "phi3",
        {
            "sliding_window": None,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
        },
    ),
}


def tiny_model(family: str | Family, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A randomly initialised model of the family, fp32, with weights large enough for sharp predictions."""
    entry = FAMILIES[family] if isinstance(family, str) else family
    torch.manual_seed(seed)
    config = AutoConfig.for_model(entry.model_type, **{**_SMALL, **entry.settings, **settings})
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or "bias" in name):
                parameter.add_(0.1 * torch.randn_like(parameter))
            else:
                # queries and keys so large that attention is sharp and depends on positions
                parameter.mul_(4.0 if "q_proj" in name or "k_proj" in name or "qkv_proj" in name else 2.0)
    return model


def logprobs(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    """transformers' log p(next token | ids), fp64 [V]."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)


def checkpoint_tensors(model: PreTrainedModel) -> Callable[[], Any]:
    """The live model's tensors by name, tied ones once."""
    return lambda: ((name, tensor) for name, tensor in model.named_parameters())


def save_byte_level_tokenizer(folder: Path, *, adds_bos: bool = False, words: str = _LLAMA3_WORDS) -> Path:
    """A byte-level BPE tokenizer of VOCAB_SIZE tokens in the manner of Llama 3, with ChatML's specials."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern_of(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - 2, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", tokenizer.token_to_id("<|begin|>"))]
        )
    tokenizer.add_tokens(["<tool>"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    return folder


def pattern_of(words: str):
    from tokenizers import Regex

    return Regex(words)


def save_sentencepiece_tokenizer(folder: Path, *, adds_space: bool = True) -> Path:
    """A BPE tokenizer with byte fallback in the manner of Llama 2 (or, without the first space, of Gemma)."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if adds_space else replace
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE - 3, special_tokens=special)
    tokenizer.train_from_iterator([line.replace("\n", "") for text in _TEXT for line in text.split(" ")], trainer)
    content = tokenizer.to_str()
    import json

    parsed = json.loads(content)
    parsed["added_tokens"] = [token for token in parsed["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = Tokenizer.from_str(json.dumps(parsed))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    wrapped.chat_template = CHATML
    wrapped.save_pretrained(folder)
    return folder
