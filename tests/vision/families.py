"""Small models of vision-language families, without processors, and batches as those would make them."""

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    LlamaConfig,
    LlavaConfig,
    Mistral3Config,
    MistralConfig,
    MllamaConfig,
    PixtralVisionConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
)  # fmt: skip

IMAGE = 300
_TEXT = {
    "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_CLIP = CLIPVisionConfig(**_TOWER, image_size=16, patch_size=8, projection_dim=32)
_PIXTRAL = PixtralVisionConfig(**_TOWER, image_size=32, patch_size=4)
_PIXTRAL_SIZES = [[8, 24], [16, 8], [8, 8]]
_SIGLIP = SiglipVisionConfig(**_TOWER, image_size=16, patch_size=8, vision_use_head=False)
_QWEN = {
    "depth": 2, "hidden_size": 32, "out_hidden_size": 64, "intermediate_size": 48, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}  # fmt: skip


def llava(text, tower=_CLIP, layer=-1, **options):
    """LLaVA around any decoder. It takes the features of the tower's last layer, so that every layer is trained, or of
    others."""
    return LlavaConfig(
        vision_config=tower, text_config=text, image_token_index=IMAGE, vision_feature_layer=layer, **options
    )


FAMILIES = {
    "llava-llama": llava(LlamaConfig(**_TEXT)),
    "llava-qwen2": llava(Qwen2Config(**_TEXT), layer=[-2, -1]),
    "llava-siglip": llava(LlamaConfig(**_TEXT), _SIGLIP, vision_feature_select_strategy="full"),
    "pixtral": llava(
        MistralConfig(**_TEXT, head_dim=24), _PIXTRAL, vision_feature_select_strategy="full"
    ),
    "mistral3": Mistral3Config(
        vision_config=_PIXTRAL, text_config=MistralConfig(**_TEXT, sliding_window=20), image_token_index=IMAGE,
        vision_feature_layer=-1, spatial_merge_size=2,
    ),
    "gemma3": Gemma3Config(
        text_config={
            **_TEXT, "head_dim": 24, "sliding_window": 12, "query_pre_attn_scalar": 40,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        vision_config={**_TOWER, "image_size": 32, "patch_size": 8, "vision_use_head": False}, mm_tokens_per_image=4,
        image_token_index=IMAGE,
    ),
    "mllama": MllamaConfig(
        text_config={**_TEXT, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}, image_token_index=IMAGE,
        vision_config={
            **_TOWER, "attention_heads": 2, "num_global_layers": 1, "image_size": 16, "patch_size": 8,
            "max_num_tiles": 2, "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
            "intermediate_layers_indices": [1], "vision_output_dim": 64,
        },
    ),
    "qwen3_vl": Qwen3VLConfig(
        text_config={
            **_TEXT, "head_dim": 16, "rope_parameters": {
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True,
            },
        },
        vision_config=_QWEN, image_token_id=IMAGE, video_token_id=301, vision_start_token_id=302,
        vision_end_token_id=303, tie_word_embeddings=False,
    ),
}  # fmt: skip


def cross_attended(length, generator):
    """Llama 3.2 Vision's inputs: one image a row, of two tiles and of one; the last row's tokens look at none."""
    seen = torch.zeros(3, length, 1, 2, dtype=torch.long)
    seen[0, 5:], seen[1, 2:, :, :1] = 1, 1
    return {
        "pixel_values": torch.randn(3, 1, 2, 3, 16, 16, generator=generator), "cross_attention_mask": seen,
        "aspect_ratio_ids": torch.tensor([[2], [1], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]], [[1, 0]]]),
    }  # fmt: skip


def images(config, count, generator):
    """(the inputs of `count` images, the tokens of each)."""
    tower = config.vision_config
    if config.model_type == "qwen3_vl":
        grid = torch.tensor([[1, 4, 6]] * count)
        patches = torch.randn(count * 24, 3 * 2 * tower.patch_size**2, generator=generator)
        return {"pixel_values": patches, "image_grid_thw": grid}, [6] * count
    if tower.model_type == "pixtral":
        merged = tower.patch_size * (2 if config.model_type == "mistral3" else 1)
        sizes = torch.tensor(_PIXTRAL_SIZES[:count])
        pixels = torch.randn(count, 3, *sizes.amax(0), generator=generator)
        return {"pixel_values": pixels, "image_sizes": sizes}, (sizes.prod(1) // merged**2).tolist()
    pixels = torch.randn(count, 3, tower.image_size, tower.image_size, generator=generator)
    tokens = (
        config.mm_tokens_per_image if config.model_type == "gemma3" else (tower.image_size // tower.patch_size) ** 2
    )
    return {"pixel_values": pixels}, [tokens] * count


def batch(config, *, device="cpu", seed=2, length=45):
    """Three rows: one image; two, then padding on the right; none."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 290, (3, length), generator=generator)
    if config.model_type == "mllama":
        pictures, sizes = cross_attended(length, generator), [1] * 3
    else:
        pictures, sizes = images(config, 3, generator)
    labels = ids.clone()
    for row, start, size in zip((0, 1, 1), (5, 2, 4 + sizes[1]), sizes, strict=True):
        ids[row, start : start + size] = IMAGE
    mask = torch.ones_like(ids)
    mask[1, length - 4 :] = 0
    ids[mask == 0] = 0
    labels[(mask == 0) | (ids == IMAGE)] = -100
    labels[:, :2] = -100
    found = {"input_ids": ids, "attention_mask": mask, "labels": labels, **pictures}
    kinds = (ids == IMAGE).long()
    names = {"qwen3_vl": "mm_token_type_ids", "gemma3": "token_type_ids"}
    if config.model_type in names:
        found[names[config.model_type]] = kinds
    return {name: value.to(device) for name, value in found.items()}
