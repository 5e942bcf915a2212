"""Proof that a saved model is the trained one: its files are read back as a stranger would read them.

1. Every tensor is there in its dtype and shape, and every tensor of the base checkpoint still is.
2. Tensors without an edit hold the base's bytes.
3. Edited ones hold the bytes that were written, differ from the base, and agree with a float64 merge row by row.
4. The saved model, loaded by plain transformers, predicts what the model in memory predicts.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from .._errors import ModelError
from .._notices import notice, warn
from .adapted_weights import adapters_off, training_precision
from .checkpoints import Checkpoint
from .embedding_offload import device_of
from .merge_plan import MergePlan, Weight
from .nf4_encoder import Nf4Encoder
from .vision_layout import has_vision
from .weight_edits import LowRank, Shift, WeightDecomposed

# Largest divergence of the saved model from the trained one, in nats a token, that rounding explains: of the weights to
# 16 bits and of the activations of a model that runs in 16 bits; of 32-bit weights; of 4-bit weights.
KL_LIMIT_16BIT = 0.02
KL_LIMIT_32BIT = 1e-4
KL_LIMIT_4BIT = 0.5
# Above this size of its files a model that does not fit into memory is not run from the disk: it would take minutes.
STREAMED_PROBE_BYTES = 40_000_000_000
_PROBE_TOKENS = 64
_PROBE_TEXT = (
    "The library opens at nine and closes at half past five. On Sunday, 14 March, it stays shut: why? "
    "Because the roof is repaired. def area(width, height): return width * height  # 3 x 4 = 12\n"
    "La biblioteca abre a las nueve; 图书馆九点开门。 Please answer in one short sentence."
)
_SAMPLED_ROWS = 16


def check_files(plan: MergePlan, folder: Path, checksums: Mapping[str, int]) -> None:
    """Raise `ModelError` that names the first tensor in `folder` that is not what the plan and `checksums` (CRC-32 of
    what was written) say. Warns where an update is too small for the dtype to hold."""
    saved = Checkpoint(folder)
    try:
        expected = {entry.name: entry for weight in plan.weights.values() for entry in plan.outputs(weight)}
        _require_same_names(plan, saved, set(expected))
        for name, entry in expected.items():
            if saved.entries[name] != entry:
                raise _wrong(name, f"it is {saved.entries[name]} and not {entry}")
        lost = [weight.name for weight in plan.weights.values() if not _check_weight(plan, weight, saved, checksums)]
    finally:
        saved.close()
    if lost:
        warn(
            f"the update of {len(lost)} of {len(plan.edited)} adapted tensors is smaller than their dtype can hold and"
            f" is lost by the merge ({', '.join(lost[:3])}{', ...' if len(lost) > 3 else ''}); the adapter keeps it"
        )


def _require_same_names(plan: MergePlan, saved: Checkpoint, expected: set[str]) -> None:
    needed = set(expected)
    if plan.base is not None:
        base = Checkpoint(plan.base)
        needed |= set(base.entries)
        base.close()
    missing, surplus = needed - set(saved.entries), set(saved.entries) - expected
    if missing or surplus:
        raise _wrong(
            ", ".join(sorted(missing | surplus)[:4]), f"{len(missing)} tensors are missing, {len(surplus)} are too many"
        )


def _check_weight(plan: MergePlan, weight: Weight, saved: Checkpoint, checksums: Mapping[str, int]) -> bool:
    """False where an update, although there is one, changes no stored value."""
    for entry in plan.outputs(weight):
        if zlib.crc32(saved.data(entry.name).numpy().data) != checksums[entry.name]:
            raise _wrong(entry.name, "its bytes on the disk are not the bytes that were written")
    if plan.encoder is not None and plan.encoder.is_quantized(weight.name):
        return _check_quantized(plan.encoder, weight, saved)
    if not weight.edits:
        if not torch.equal(saved.data(weight.name), weight.data()):
            raise _wrong(weight.name, "nothing was trained in it, and it is not the base's")
        return True
    stored = saved.tensor(weight.name)
    _check_rows(weight, torch.atleast_1d(stored))
    before = weight.stored()
    if before.dtype != stored.dtype or not torch.equal(before, torch.atleast_1d(stored)):
        return True
    if _expects_change(weight, before):
        raise _wrong(weight.name, "it has an adapter, and is still the base's tensor")
    return not _has_update(weight)


def _check_quantized(encoder: Nf4Encoder, weight: Weight, saved: Checkpoint) -> bool:
    """The 4-bit codes of a weight are those of the base exactly where its update is too small to change one."""
    before = weight.stored().double()
    codes = saved.data(weight.name)

    def encoded(values: torch.Tensor) -> torch.Tensor:
        return encoder.encode(weight.name, values.float())[weight.name].flatten().cpu().view(torch.uint8)

    is_base = torch.equal(codes, encoded(before))
    if not weight.edits and not is_base:
        raise _wrong(weight.name, "nothing was trained in it, and it is not the base's")
    if not weight.edits or not is_base:
        return True
    if any(not torch.equal(codes, encoded(before + _added(edit))) for edit in _updates(weight)):
        raise _wrong(weight.name, "it has an adapter, and is still the base's tensor")
    return not _has_update(weight)


def _check_rows(weight: Weight, saved: torch.Tensor) -> None:
    """Some rows against their merge in float64: equal but for the rounding."""
    before, rows = weight.stored(), saved.shape[0]
    info = torch.finfo(saved.dtype)
    for row in sorted({int(i * (rows - 1) / max(1, _SAMPLED_ROWS - 1)) for i in range(_SAMPLED_ROWS)}):
        expected = weight.merge_rows(before[row : row + 1].double(), row)
        found = saved[row : row + 1].double()
        # One unit of the dtype, and fp32's rounding of sums of terms that are larger than the result.
        allowed = info.eps * expected.abs() + 2e-6 * expected.abs().max() + info.smallest_normal * info.eps
        if not bool(((found - expected).abs() <= allowed).all()):
            raise _wrong(
                weight.name, f"row {row} differs by {float((found - expected).abs().max()):.3g} from its merge"
            )


def _updates(weight: Weight) -> list[LowRank | Shift]:
    edits = [edit.low_rank if isinstance(edit, WeightDecomposed) else edit for edit in weight.edits]
    return [edit for edit in edits if isinstance(edit, (LowRank, Shift))]


def _has_update(weight: Weight) -> bool:
    return any(bool(_added(edit).any()) for edit in _updates(weight))


def _expects_change(weight: Weight, before: torch.Tensor) -> bool:
    """Whether an update is large enough to show after rounding, by arithmetic of its own."""
    return any(bool(((before.double() + _added(edit)).to(before.dtype) != before).any()) for edit in _updates(weight))


def _added(edit: LowRank | Shift) -> torch.Tensor:
    if isinstance(edit, Shift):
        return edit.values.detach().double().cpu() * edit.scale
    return edit.left.detach().double().cpu() @ edit.right.detach().double().cpu() * edit.scale


def _wrong(name: str, cause: str) -> ModelError:
    return ModelError(
        f"the saved model was read back and is wrong: {cause}",
        where=name,
        fix="nothing was replaced; save again, and report this with the traceback if it happens twice",
    )


@dataclass(frozen=True)
class Divergence:
    """KL divergence of the saved model from the one in memory: mean over the probe's tokens, in nats; its limit."""

    mean: float
    limit: float
    explained: str = ""

    def __str__(self) -> str:
        return f"KL {self.mean:.2g} nats a token on {_PROBE_TOKENS} tokens (limit {self.limit:.2g}{self.explained})"


def check_logits(model: Any, plan: MergePlan, folder: Path, tokenizer: Any) -> Divergence | None:
    """Compare what the saved and the adapted model predict; None, told with the reason, where the saved one is too
    large to be run.

    Raises:
        ModelError: the divergence is above the limit. A model that was trained on quantized weights and is merged into
            16-bit ones may differ by twice what the two bases differ without adapters.
    """
    ids = probe_ids(model, tokenizer)
    saved = _folder_logits(model, plan, folder, ids)
    if saved is None:
        notice(
            f"fastllm: the saved model, {plan.num_bytes / 1e9:.0f} GB, does not fit into memory and was not run; its"
            " tensors were all checked"
        )
        return None
    device = device_of(model)
    mean, limit, explained = divergence(_logits(model, ids.to(device)), saved), _limit(plan), ""
    if plan.base is not None and plan.encoder is None and any(t.is_quantized for t in plan.adapters.loaded.values()):
        base = _folder_logits(model, plan, plan.base, ids)
        if base is not None:
            with adapters_off(model):
                between = divergence(_logits(model, ids.to(device)), base)
            limit += 2 * between
            explained = f"; the quantized base it was trained on is {between:.2g} from the 16-bit one"
    result = Divergence(mean, limit, explained)
    if not mean <= limit:  # also for NaN
        raise _wrong(str(folder.parent), f"{result}: it does not predict what the model in memory predicts")
    return result


def _limit(plan: MergePlan) -> float:
    if plan.encoder is not None:
        return KL_LIMIT_4BIT
    wide = plan.dtype in (torch.float32, torch.float64)
    runs_wide = all(t.raw.dtype in (torch.float32, torch.float64) for t in plan.adapters.loaded.values())
    return KL_LIMIT_32BIT if wide and runs_wide else KL_LIMIT_16BIT


def divergence(p_logits: torch.Tensor, q_logits: torch.Tensor) -> float:
    """Mean KL(p || q) in nats over the tokens of logits [tokens, vocabulary]; over the ids that both have."""
    vocabulary = min(p_logits.shape[-1], q_logits.shape[-1])
    p, q = (F.log_softmax(logits[:, :vocabulary].double(), dim=-1) for logits in (p_logits, q_logits))
    return float((p.exp() * (p - q)).sum(-1).mean())


def probe_ids(model: Any, tokenizer: Any) -> torch.Tensor:
    """Token ids [1, tokens]: a short text of several kinds, or fixed random ids where there is no tokenizer."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    text = getattr(tokenizer, "tokenizer", tokenizer)
    encoded = [] if text is None else text(_PROBE_TEXT, verbose=False)["input_ids"]
    ids = [i for i in encoded if i < vocabulary]
    generator = torch.Generator().manual_seed(0)
    filler = torch.randint(vocabulary, (_PROBE_TOKENS,), generator=generator).tolist()
    return torch.tensor([(ids + filler)[:_PROBE_TOKENS]])


def _logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """[tokens, vocabulary] fp32 on the CPU, in evaluation mode whatever the present mode."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad(), training_precision(model):
            return model(input_ids=ids, use_cache=False).logits[0].float().cpu()
    finally:
        model.train(was_training)


def _folder_logits(model: Any, plan: MergePlan, folder: Path, ids: torch.Tensor) -> torch.Tensor | None:
    """Logits of the model in `folder`, run by plain transformers on the CPU in fp32: from memory where it fits, else
    layer by layer from its files; None where neither will do."""
    import psutil
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    auto_class: Any = AutoModelForImageTextToText if has_vision(model) else AutoModelForCausalLM
    four_bit = plan.encoder is not None
    fits = 1.2 * plan.num_bytes * (1 if four_bit else 4 / plan.dtype.itemsize) < psutil.virtual_memory().available
    # Weights that transformers restacks on loading (experts) would be written to the disk a second time.
    streams = not four_bit and not plan.restacks and plan.num_bytes < STREAMED_PROBE_BYTES
    if not fits and not streams:
        return None
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.get_text_config().rope_parameters = plan.twin.config.get_text_config().rope_parameters
    with tempfile.TemporaryDirectory() as unused:
        loaded = auto_class.from_pretrained(
            folder, config=config, dtype=plan.dtype if four_bit else torch.float32, local_files_only=True,
            device_map={"": "cpu" if fits else "disk"}, offload_folder=unused,
            attn_implementation=model.config._attn_implementation,
        )  # fmt: skip
        return _logits(loaded, ids)
