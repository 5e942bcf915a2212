"""The tower of Pixtral, which Mistral Small 3.1 sees with too: RMSNorm, a gated MLP, angles by row and column.

All images of a batch, of any sizes, lie end to end in one row. The tower tells its blocks where each begins; the dense
mask [S, S] that transformers makes for that would be read by every block, and grows with the square of all patches.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.models.pixtral import modeling_pixtral
from transformers.utils.output_capturing import capture_outputs

from ..blocks import Forward
from ..vision_tower import SERVED_ATTENTION, BlockNames, vision_classes


def tower_forward(otherwise: Forward) -> Forward:
    """The tower with `cu_seqlens` for its blocks, where their attention takes them."""

    @capture_outputs
    def end_to_end(
        self: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None = None, **kwargs: Any
    ) -> Any:
        images = self.patch_conv(pixel_values.to(self.patch_conv.weight.dtype))
        grids = _grids(self, pixel_values, image_sizes)
        patches = [image[:, :rows, :columns].flatten(1).T for image, (rows, columns) in zip(images, grids, strict=True)]
        hidden_states = self.ln_pre(torch.cat(patches).unsqueeze(0))
        positions = torch.cat([torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in grids])
        angles = self.patch_positional_embedding(hidden_states, positions.to(hidden_states.device))
        # On the host, where the blocks' kernels learn the lengths without waiting for the device.
        cu_seqlens = torch.tensor([0, *(rows * columns for rows, columns in grids)]).cumsum(0)
        return self.transformer(
            hidden_states, attention_mask=None, position_embeddings=angles, cu_seqlens=cu_seqlens, **kwargs
        )

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        run = end_to_end if self.config._attn_implementation in SERVED_ATTENTION else otherwise
        return run(self, *args, **kwargs)

    return forward


def _grids(tower: Any, pixel_values: torch.Tensor, image_sizes: torch.Tensor | None) -> list[tuple[int, int]]:
    """(rows, columns) of patches of each image, whose pixels are padded to the size of the largest."""
    if image_sizes is None:
        sizes = [list(pixel_values.shape[-2:])] * len(pixel_values)
    else:
        sizes = torch.as_tensor(image_sizes).tolist()
    return [(height // tower.patch_size, width // tower.patch_size) for height, width in sizes]


def tower_class(original: Any) -> dict[type, type]:
    """The fast subclass of `PixtralVisionModel`. transformers finds what a model can record, such as its hidden states,
    by the full name of its class, so it keeps the module too."""
    attributes = {"__module__": original.__module__, "forward": tower_forward(original.forward)}
    return {original: type(original.__name__, (original,), attributes)}


CLASSES = {
    **tower_class(modeling_pixtral.PixtralVisionModel),
    **vision_classes(
        modeling_pixtral, "PixtralAttentionLayer",
        BlockNames("attention_norm", "attention", "ffn_norm", "feed_forward", output="o_proj"),
    ),
}  # fmt: skip
