"""Where the images of a Qwen-VL batch stand: positions of the tokens, and windows and angles of the patches.

They follow from a few integers that lie on the device. transformers fetches those one by one, dozens of times in a
forward and mostly behind the vision tower, for whose end the host then waits. Here they come in one transfer before the
first launch; transformers' own functions make of them, on the host, what it takes as precomputed arguments.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from transformers.vision_utils import get_vision_cu_seqlens, get_vision_position_ids, get_vision_window_index

# Attribute of an inner model: how many patches its present batch has, if they were compared with the image tokens.
_COUNTED = "_fastllm_counted_images"
_NEEDED = ("input_ids", "mm_token_type_ids", "image_grid_thw")
# Whose presence leaves everything to transformers.
_OTHERS = (
    "attention_mask", "position_ids", "inputs_embeds", "past_key_values", "pixel_values_videos", "video_grid_thw",
)  # fmt: skip
_SERVED_ATTENTION = ("sdpa", "eager")


class ImageLayouts:
    """The layouts of the latest batches of one model."""

    def __init__(self, most: int = 16) -> None:
        self._most = most
        self._known: collections.OrderedDict[Hashable, Any] = collections.OrderedDict()

    def __reduce__(self) -> tuple:
        return ImageLayouts, (self._most,)

    def find(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make` gave for the key, if that was not long ago."""
        if key not in self._known:
            self._known[key] = make()
            if len(self._known) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]


def read_together(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Integer or bool tensors as int64 in host memory, in one transfer where they are of one device."""
    if len({tensor.device for tensor in tensors.values()}) != 1:
        return {name: tensor.cpu().long() for name, tensor in tensors.items()}
    flat = torch.cat([tensor.detach().reshape(-1).long() for tensor in tensors.values()]).cpu()
    parts = flat.split([tensor.numel() for tensor in tensors.values()])
    return {name: part.view(tensors[name].shape) for name, part in zip(tensors, parts, strict=True)}


def needed_on_host(model: Any, inputs: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The inputs that say where the images of a batch stand; none where `lay_out_images` leaves them to transformers,
    whatever comes of the mask."""
    inner = model.model
    if not hasattr(type(inner), "image_layouts") or inputs.get("pixel_values") is None:
        return {}
    implementations = (model.config.get_text_config(), inner.visual.config)
    if any(config._attn_implementation not in _SERVED_ATTENTION for config in implementations):
        return {}
    found = {name: inputs[name] for name in _NEEDED if inputs.get(name) is not None}
    is_alone = not any(inputs.get(name) is not None for name in _OTHERS[1:])
    return found if is_alone and len(found) == len(_NEEDED) else {}


def lay_out_images(model: Any, inputs: dict[str, Any], on_host: Mapping[str, torch.Tensor]) -> None:
    """Add to the inputs of a decoder the positions and boundaries that follow from `on_host`: copies of its tokens, of
    their types and of its grids, of as many tokens as the caller gave."""
    inner, device = model.model, inputs["input_ids"].device
    inner.__dict__.pop(_COUNTED, None)
    if not on_host or any(inputs.get(name) is not None for name in _OTHERS):
        return
    ids, types, grid = (on_host[name] for name in _NEEDED)
    merge = inner.visual.spatial_merge_size
    patches, tokens = int(grid.prod(-1).sum()), int((ids == model.config.image_token_id).sum())
    if tokens * merge**2 != patches or patches != inputs["pixel_values"].shape[0]:
        return  # transformers says what is wrong
    longer = inputs["input_ids"].shape[1] - ids.shape[1]
    ids, types = (torch.nn.functional.pad(tensor, (0, longer)) for tensor in (ids, types))
    layouts = inner.__dict__.setdefault("_fastllm_image_layouts", ImageLayouts())
    sizes = tuple(map(tuple, grid.tolist()))
    inputs["image_grid_thw"] = grid
    inputs |= layouts.find((sizes, device), lambda: _patch_layout(inner.visual, grid, device))
    inputs["position_ids"] = layouts.find(
        (sizes, device, types.numpy().tobytes(), types.shape),
        lambda: inner.get_rope_index(ids, mm_token_type_ids=types, image_grid_thw=grid)[0].to(device),
    )
    inner.__dict__[_COUNTED] = patches // merge**2


def placeholder_mask(otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """`get_placeholder_mask` that does not count on the device what was counted on the host."""

    def get_placeholder_mask(
        self: Any, input_ids: Any, inputs_embeds: Any, image_features: Any = None, video_features: Any = None
    ) -> Any:
        if image_features is not None and self.__dict__.pop(_COUNTED, None) == image_features.shape[0]:
            image_features = None
        return otherwise(
            self, input_ids, inputs_embeds=inputs_embeds, image_features=image_features, video_features=video_features
        )

    return get_placeholder_mask


def inner_model_class(original: Any) -> dict[type, type]:
    """The fast subclass of a model that joins tower and decoder, e.g. `Qwen2_5_VLModel`."""
    attributes = {
        "__module__": __name__,
        "get_placeholder_mask": placeholder_mask(original.get_placeholder_mask),
        "image_layouts": True,
    }
    return {original: type(original.__name__, (original,), attributes)}


def _patch_layout(tower: Any, grid: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
    """What a tower computes from its grid, by the names under which transformers takes it. Boundaries stay on the
    host, where the fast blocks read them."""
    merge = tower.spatial_merge_size
    layout = {
        "image_position_ids": get_vision_position_ids(grid, merge).to(device),
        "image_cu_seqlens": get_vision_cu_seqlens(grid),
    }
    if hasattr(tower, "window_size"):
        index, boundaries = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)
        layout |= {"image_window_index": index.to(device), "image_cu_window_seqlens": boundaries}
    return layout
