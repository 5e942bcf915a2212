"""Small vision-language checkpoints with their processors, made on the spot, and images to go with them."""

import importlib.util

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLProcessor,
)  # fmt: skip
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.models.conftest import make_tokenizer

VISION_TOKENS = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
# A chat template in the manner of the Qwen-VL families: text as it is, each image and video as its placeholder.
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PATCH = 4
CLASSES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}
PROCESSORS = {"qwen2_vl": Qwen2VLProcessor, "qwen2_5_vl": Qwen2_5_VLProcessor}
TOWERS = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "window_size": 16,
        "fullatt_block_indexes": [1],
    },
}  # fmt: skip


def make_processor(family):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": VISION_TOKENS})
    tokenizer.chat_template = TEMPLATE
    sizes = {"patch_size": PATCH, "merge_size": 2, "size": {"shortest_edge": (2 * PATCH) ** 2, "longest_edge": 48 * 48}}
    images, processor_class = Qwen2VLImageProcessorPil(**sizes), PROCESSORS[family]
    if importlib.util.find_spec("torchvision") is not None:
        from transformers import Qwen2VLVideoProcessor

        videos = Qwen2VLVideoProcessor(**sizes, cap_pixels_per_frame=False)
        return processor_class(images, tokenizer, videos, chat_template=TEMPLATE)
    remaining = classmethod(lambda cls: ["image_processor", "tokenizer"])
    without_videos = type(processor_class.__name__, (processor_class,), {"get_attributes": remaining})
    return without_videos(images, tokenizer, chat_template=TEMPLATE)


def make_vision_checkpoint(folder, family="qwen2_5_vl"):
    processor = make_processor(family)
    ids = {name: processor.tokenizer.convert_tokens_to_ids(token) for name, token in zip(
        ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), VISION_TOKENS, strict=True
    )}  # fmt: skip
    text = {
        "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096, "bos_token_id": 0,
        "eos_token_id": 5, "pad_token_id": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    tower = {
        "depth": 2, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2,
        **TOWERS[family],
    }  # fmt: skip
    config_class, model_class = CLASSES[family]
    torch.manual_seed(0)
    model = model_class(config_class(text_config=text, vision_config=tower, **ids))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(seed=0, width=32, height=24):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def row(seed=0, question="what is in it", answer="the lazy dog", **size):
    """One example in the form of the LaTeX-OCR script."""
    return {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "text", "text": question}, {"type": "image", "image": picture(seed, **size)}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
    }


@pytest.fixture(scope="session", params=list(CLASSES))
def family(request):
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("vision")
    return {family: make_vision_checkpoint(root / family, family) for family in CLASSES}


@pytest.fixture
def checkpoint(checkpoints, family):
    return checkpoints[family]


@pytest.fixture
def messages(capsys):
    """What fastllm has told since the last call."""
    from fastllm._notices import forget_notices

    forget_notices()
    return lambda: capsys.readouterr().out
