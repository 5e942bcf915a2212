"""Which type each tensor of a model gets.

A `StaticMix` is one of llama-quantize's named mixes; the choice per tensor is llama.cpp's (llama-quant.cpp,
`llama_tensor_get_type_impl`), so that a file called Q4_K_M is what everybody calls Q4_K_M. An `ExplicitRecipe` names
types tensor by tensor, as the dynamic allocation does, and is a readable JSON file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from .._errors import UnsupportedError, nearest
from .._notices import notice
from .atomic import atomic_file
from .container import GGUFError
from .tensor_types import (
    BF16,
    F16,
    F32,
    IQ4_NL,
    IQ4_XS,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    TensorType,
    tensor_type,
)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What the choice of types depends on beside the tensors themselves."""

    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    num_experts: int = 0

    @property
    def queries_per_value(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def is_70b(self) -> bool:
        """llama.cpp calls every 80-layer Llama or Qwen2 so: eight heads share a small and sensitive attn_v."""
        if self.num_layers != 80:
            return False
        return self.architecture == "qwen2" or (self.architecture == "llama" and self.num_heads != self.num_kv_heads)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands in its model."""

    layer: int
    model: ModelShape
    has_importance: bool


Rule: TypeAlias = Callable[[Place], TensorType | None]


def _base(place: Place) -> None:
    return None


def _always(kind: TensorType) -> Rule:
    return lambda place: kind


def _first(denominator: int, kind: TensorType, otherwise: TensorType | None = None) -> Rule:
    """`kind` in the first 1/denominator of the layers."""
    return lambda place: kind if place.layer < place.model.num_layers // denominator else otherwise


def _first_layers(count: int, kind: TensorType, otherwise: TensorType | None = None) -> Rule:
    return lambda place: kind if place.layer < count else otherwise


def _every_third(kind: TensorType) -> Rule:
    """`kind` in the first and last eighth of the layers and in every third one between."""

    def rule(place: Place) -> TensorType | None:
        layer, eighth = place.layer, place.model.num_layers // 8
        is_outer = layer < eighth or layer >= 7 * place.model.num_layers // 8
        return kind if is_outer or (layer - eighth) % 3 == 2 else None

    return rule


def _if_shared(kind: TensorType, otherwise: TensorType | None = None) -> Rule:
    """`kind` where at least four query heads share a value head."""
    return lambda place: kind if place.model.queries_per_value >= 4 else otherwise


def _if_importance(wanted: bool, rule: Rule) -> Rule:
    return lambda place: rule(place) if place.has_importance is wanted else None


@dataclass(frozen=True, slots=True)
class StaticMix:
    """A named mix of llama-quantize: a base type and the exceptions from it.

    `file_type` is the id in `general.file_type`. `attn_output_of_8_experts` replaces `attn_output` in models with
    eight experts.
    """

    name: str
    file_type: int
    base: TensorType
    attn_v: Rule = _base
    ffn_down: Rule = _base
    attn_output: Rule = _base
    attn_output_of_8_experts: TensorType | None = None

    def choose(self, name: str, width: int, is_output: bool, place: Place) -> TensorType:
        """The type of a tensor that may be quantized; `is_output`: the head, or the embedding that serves as it."""
        if not self.base.is_quantized:
            return self.base
        if is_output:
            return Q8_0 if self.base is Q8_0 or width % self.base.block_size else Q6_K
        has_8_experts = place.model.num_experts == 8
        role = name.split(".")[-2]
        if role in ("attn_v", "attn_qkv"):
            kind = self.attn_v(place) or self.base
            if place.model.is_70b and kind in (Q3_K, Q4_K):
                kind = Q5_K
            return Q8_0 if has_8_experts else kind
        if role == "attn_k" and has_8_experts:
            return Q8_0
        if role == "attn_output":
            return (self.attn_output_of_8_experts if has_8_experts else self.attn_output(place)) or self.base
        if role.startswith("ffn_down"):
            return self.ffn_down(place) or self.base
        return self.base


STATIC_MIXES: dict[str, StaticMix] = {
    mix.name: mix
    for mix in (
        StaticMix("f32", 0, F32),
        StaticMix("f16", 1, F16),
        StaticMix("bf16", 32, BF16),
        StaticMix("q8_0", 7, Q8_0),
        StaticMix("q6_k", 18, Q6_K),
        StaticMix("q5_k_m", 17, Q5_K, attn_v=_every_third(Q6_K), ffn_down=_every_third(Q6_K)),
        StaticMix("q5_k_s", 16, Q5_K),
        StaticMix("q5_1", 9, Q5_1),
        # The first ffn_down go wrong with importance and a scale alone; without it, with a minimum as well.
        StaticMix("q5_0", 8, Q5_0, ffn_down=_if_importance(True, _first(8, Q5_1))),
        StaticMix(
            "q4_k_m",
            15,
            Q4_K,
            attn_v=_every_third(Q6_K),
            ffn_down=_every_third(Q6_K),
            attn_output_of_8_experts=Q5_K,
        ),
        StaticMix(
            "q4_k_s",
            14,
            Q4_K,
            attn_v=_first_layers(4, Q5_K),
            ffn_down=_first(8, Q5_K),
            attn_output_of_8_experts=Q5_K,
        ),
        StaticMix("q4_1", 3, Q4_1),
        StaticMix("q4_0", 2, Q4_0, ffn_down=_if_importance(True, _first(8, Q4_1))),
        StaticMix(
            "iq4_nl",
            25,
            IQ4_NL,
            attn_v=_if_shared(Q5_K),
            ffn_down=_if_importance(False, _first(8, Q5_K)),
            attn_output_of_8_experts=Q5_K,
        ),
        StaticMix(
            "iq4_xs",
            30,
            IQ4_XS,
            attn_v=_if_shared(Q5_K),
            ffn_down=_if_importance(False, _first(8, Q5_K)),
            attn_output_of_8_experts=Q5_K,
        ),
        StaticMix("q3_k_l", 13, Q3_K, attn_v=_always(Q5_K), ffn_down=_always(Q5_K), attn_output=_always(Q5_K)),
        StaticMix(
            "q3_k_m",
            12,
            Q3_K,
            attn_v=_first_layers(2, Q5_K, Q4_K),
            ffn_down=_first(16, Q5_K, Q4_K),
            attn_output=_always(Q4_K),
            attn_output_of_8_experts=Q5_K,
        ),
        StaticMix("q3_k_s", 11, Q3_K, attn_output_of_8_experts=Q5_K),
        StaticMix(
            "q2_k",
            10,
            Q2_K,
            attn_v=_if_shared(Q4_K, Q3_K),
            ffn_down=_always(Q3_K),
            attn_output=_always(Q3_K),
            attn_output_of_8_experts=Q5_K,
        ),
    )
}
_ALIASES = {
    "quantized": "q4_k_m",
    "fast_quantized": "q8_0",
    "q3_k": "q3_k_m",
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
}


@dataclass(frozen=True, slots=True)
class ExplicitRecipe:
    """Types by tensor name; tensors that are not named get what the static mix `base` gives them.

    `notes` are kept in the file for the reader: how the recipe was made, what it should cost.
    """

    name: str
    base: str
    types: Mapping[str, str]
    notes: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        static_mix(self.base)
        for kind in self.types.values():
            tensor_type(kind)

    def save(self, path: str | os.PathLike[str]) -> None:
        content = {"name": self.name, "base": self.base, "notes": dict(self.notes), "types": dict(self.types)}
        text = json.dumps(content, indent=2, ensure_ascii=False).encode() + b"\n"
        with atomic_file(path, len(text)) as file:
            file.write_at(0, text)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ExplicitRecipe:
        """Raises `GGUFError` for a file that is not a recipe."""
        try:
            content = json.loads(Path(path).read_bytes())
            types = content["types"]
            if not all(isinstance(text, str) for pair in types.items() for text in pair):
                raise TypeError("types must map names to names")
            return cls(content["name"], content["base"], types, content.get("notes", {}))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise GGUFError(f"not a recipe: {error}", where=os.fspath(path)) from error


Recipe: TypeAlias = StaticMix | ExplicitRecipe


def static_mix(name: str, model_dtype: str = "float16") -> StaticMix:
    """The mix called `name` (any case, or an alias). `not_quantized` is the 16-bit type of the model.

    Raises `UnsupportedError` with the nearest name.
    """
    key = name.lower().replace("-", "_").replace(" ", "_")
    if key == "not_quantized":
        key = "bf16" if model_dtype == "bfloat16" else "f16"
    found = STATIC_MIXES.get(_ALIASES.get(key, key))
    if found is None:
        raise UnsupportedError(
            f"no quantization method {name!r} {nearest(key, [*STATIC_MIXES, *_ALIASES, 'not_quantized'])}".rstrip(),
            where="gguf",
            fix=f"methods: {', '.join([*STATIC_MIXES, *_ALIASES, 'not_quantized'])}",
        )
    return found


def may_quantize(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a matrix of weights; norms, biases, routers and rope factors stay F32."""
    num_dimensions = next((i for i, size in enumerate(shape) if size > 1), len(shape) - 1)
    return (
        len(shape) - num_dimensions >= 2
        and name.endswith("weight")
        and not name.endswith("_norm.weight")
        and "ffn_gate_inp.weight" not in name
    )


# What a type becomes where a row does not hold whole blocks of it.
_NARROWER = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0, IQ4_XS: IQ4_NL}


def fitting_type(kind: TensorType, width: int) -> TensorType:
    """`kind`, or the type llama.cpp takes in its place for rows of `width` weights."""
    if width % kind.block_size:
        kind = _NARROWER.get(kind, kind)
    return F16 if width % kind.block_size else kind


def choose_types(
    recipe: Recipe, tensors: Iterable[tuple[str, tuple[int, ...]]], model: ModelShape, has_importance: bool = False
) -> dict[str, TensorType]:
    """The type of each (name, shape) of a model, in llama.cpp's names.

    Raises `GGUFError` where an explicit recipe names a tensor that the model does not have.
    """
    tensors = list(tensors)
    names = [name for name, _ in tensors]
    explicit = dict(recipe.types) if isinstance(recipe, ExplicitRecipe) else {}
    unknown = [name for name in explicit if name not in names]
    if unknown:
        raise GGUFError(f"the recipe names {unknown[0]!r} {nearest(unknown[0], names)}".rstrip(), where=recipe.name)
    mix = static_mix(recipe.base) if isinstance(recipe, ExplicitRecipe) else recipe
    output = "output.weight" if "output.weight" in names else "token_embd.weight"
    wanted, chosen = {}, {}
    for name, shape in tensors:
        if not may_quantize(name, shape):
            wanted[name] = chosen[name] = F32
            continue
        layer = int(name.split(".")[1]) if name.startswith("blk.") else 0
        if name in explicit:
            wanted[name] = tensor_type(explicit[name])
        else:
            wanted[name] = mix.choose(name, shape[-1], name == output, Place(layer, model, has_importance))
        chosen[name] = fitting_type(wanted[name], shape[-1])
    tell_narrowed(wanted, chosen)
    return chosen


def tell_narrowed(wanted: Mapping[str, TensorType], chosen: Mapping[str, TensorType]) -> None:
    """Tell which tensors got another type than `wanted`, by `fitting_type`."""
    narrowed = [f"{name} {w.name} -> {chosen[name].name}" for name, w in wanted.items() if chosen[name] is not w]
    if narrowed:
        listed = f"{', '.join(narrowed[:4])}{', ...' if len(narrowed) > 4 else ''}"
        notice(f"fastllm: rows of {len(narrowed)} tensors do not hold whole blocks: {listed}", once=f"blocks: {listed}")
