"""Checkpoints of real shapes with random weights, so that nothing is downloaded to measure speed and memory.

Tensors are drawn where the arithmetic is fast and written shard by shard: no whole model is in memory, on the GPU or
the host, and the disk is the limit. A checkpoint that is not needed now makes room for the one that is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

_LLAMA = {
    "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}  # fmt: skip
IMAGE_TOKEN, VIDEO_TOKEN, VISION_START, VISION_END = 4, 5, 6, 7
SPECIAL_TOKENS = [
    "<s>", "</s>", "<pad>", "<unk>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>",
]  # fmt: skip
_QWEN_VL = {
    "image_token_id": IMAGE_TOKEN, "video_token_id": VIDEO_TOKEN, "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END, "tie_word_embeddings": False,
}  # fmt: skip


def _mrope(*section: int) -> dict[str, Any]:
    return {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)},
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "tie_word_embeddings": False,
    }  # fmt: skip


# name -> (transformers' name of the family, its configuration)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "toy": ("Llama", {
        "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024, "head_dim": 16, **_LLAMA,
    }),
    "llama-3.2-1b": ("Llama", {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 64, "tie_word_embeddings": True, **_LLAMA,
    }),
    "llama-2-7b": ("Llama", {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "vocab_size": 32000, "head_dim": 128, **_LLAMA,
    }),
    "llama-2-13b": ("Llama", {
        "hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40,
        "num_key_value_heads": 40, "vocab_size": 32000, "head_dim": 128, **_LLAMA,
    }),
    "llama-3.1-8b": ("Llama", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "head_dim": 128, **_LLAMA,
    }),
    "gemma-2-9b": ("Gemma2", {
        "hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 256, "vocab_size": 256000, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "max_position_embeddings": 8192, "bos_token_id": 0, "eos_token_id": 1,
        "pad_token_id": 2,
    }),
    "qwen2.5-vl-7b": ("Qwen2_5_VL", {
        "text_config": {
            "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
            "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6,
            **_mrope(16, 24, 24),
        },
        "vision_config": {
            "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31],
        },
        **_QWEN_VL,
    }),
    "toy-vl": ("Qwen2_5_VL", {
        "text_config": {
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1024, "max_position_embeddings": 1024, **_mrope(2, 3, 3),
        },
        "vision_config": {
            "depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
            "patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1],
        },
        **_QWEN_VL,
    }),
}  # fmt: skip
_SHARD_BYTES = 2 * 2**30
_DONE = "checkpoint.done"
# How transformers names the modules of a vision-language model, and how the published checkpoints do.
_PUBLISHED = {"Qwen2_5_VL": (("model.visual.", "visual."), ("model.language_model.", "model."))}


def config(shape: str) -> Any:
    """The transformers configuration of a shape."""
    import transformers

    family, values = SHAPES[shape]
    return getattr(transformers, f"{family}Config")(**values)


def is_made(shape: str, folder: Path) -> bool:
    return (folder / shape / _DONE).is_file()


def checkpoint(shape: str, folder: Path) -> Path:
    """The folder of the checkpoint of a shape, made when it is not there: bf16 weights and a small tokenizer."""
    target = folder / shape
    if is_made(shape, folder):
        return target
    import torch
    import transformers

    family, _ = SHAPES[shape]
    values = config(shape)
    values.architectures, values.dtype = [_class_name(family)], torch.bfloat16
    with torch.device("meta"):
        model = getattr(transformers, _class_name(family))(values)
    shapes = {_published(family, name): tuple(parameter.shape) for name, parameter in model.named_parameters()}
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    _make_room(folder, sum(2 * _count(size) for size in shapes.values()))
    values.save_pretrained(target)
    _write_weights(shapes, target, norm_is_offset=family == "Gemma2")
    tokenizer = _tokenizer()
    if family in _PUBLISHED:
        _write_processor(tokenizer, target)
    else:
        tokenizer.save_pretrained(target)
    (target / _DONE).touch()
    return target


def _class_name(family: str) -> str:
    return f"{family}ForConditionalGeneration" if family in _PUBLISHED else f"{family}ForCausalLM"


def _published(family: str, name: str) -> str:
    for ours, theirs in _PUBLISHED.get(family, ()):
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _count(size: tuple[int, ...]) -> int:
    total = 1
    for length in size:
        total *= length
    return total


def _make_room(folder: Path, needed: int) -> None:
    """Delete finished checkpoints beside the new one until `needed` bytes fit on the disk."""
    for done in sorted(folder.glob(f"*/{_DONE}"), key=lambda path: path.stat().st_mtime):
        if shutil.disk_usage(folder).free > needed + 2 * 2**30:
            return
        shutil.rmtree(done.parent)


def _write_weights(shapes: dict[str, tuple[int, ...]], target: Path, *, norm_is_offset: bool) -> None:
    import torch
    from safetensors.torch import save_file

    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in shapes.items():
        if filled > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += 2 * _count(size)

    def values(name: str, generator: torch.Generator) -> torch.Tensor:
        size = shapes[name]
        if len(size) == 1:
            ones = name.endswith("weight") and not norm_is_offset
            return torch.full(size, float(ones), dtype=torch.bfloat16)
        tensor = torch.empty(size, dtype=torch.bfloat16, device=device)
        return tensor.normal_(0, 0.02, generator=generator).cpu()

    def write(index: int) -> None:
        generator = torch.Generator(device).manual_seed(index)
        tensors = {name: values(name, generator) for name in shards[index]}
        save_file(tensors, target / _shard_name(index, len(shards)), metadata={"format": "pt"})

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(len(shards))))
    if len(shards) > 1:
        weight_map = {name: _shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
        total = sum(2 * _count(size) for size in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (target / "model.safetensors.index.json").write_text(json.dumps(index))


def _shard_name(index: int, count: int) -> str:
    return "model.safetensors" if count == 1 else f"model-{index + 1:05}-of-{count:05}.safetensors"


def _tokenizer() -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        additional_special_tokens=SPECIAL_TOKENS[4:], model_max_length=131072,
    )  # fmt: skip


def _write_processor(tokenizer: Any, target: Path) -> None:
    """A Qwen2.5-VL processor, which libraries load with the model; without torchvision one that takes no videos."""
    import importlib.util

    from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor

    tokenizer.image_token, tokenizer.video_token = SPECIAL_TOKENS[IMAGE_TOKEN], SPECIAL_TOKENS[VIDEO_TOKEN]
    tokenizer.chat_template = template = (
        "{% for m in messages %}<s>{{ m['role'] }}\n{% for part in m['content'] %}{% if part['type'] == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}</s>\n"
        "{% endfor %}"
    )
    if importlib.util.find_spec("torchvision") is not None:
        from transformers import Qwen2VLVideoProcessor

        processor = Qwen2_5_VLProcessor(
            Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=template
        )
    else:
        parts = classmethod(lambda cls: ["image_processor", "tokenizer"])
        images_only = type("Qwen2_5_VLProcessor", (Qwen2_5_VLProcessor,), {"get_attributes": parts})
        processor = images_only(Qwen2VLImageProcessor(), tokenizer, chat_template=template)
    processor.save_pretrained(target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, choices=SHAPES)
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    started = time.perf_counter()
    target = checkpoint(options.model, options.folder)
    print(
        "RESULT " + json.dumps({"model": str(target), "seconds": round(time.perf_counter() - started, 1)}), flush=True
    )


if __name__ == "__main__":
    main()
