"""The tensor types that fastllm writes: their ids in a GGUF file and the size of their blocks.

Ids and sizes: ggml's `ggml_type` and `type_traits`, the definition of the format.
"""

from __future__ import annotations

from dataclasses import dataclass

from .._errors import UnsupportedError, nearest


@dataclass(frozen=True, slots=True)
class TensorType:
    """One storage type: `block_size` weights of a row lie together in `block_bytes` bytes."""

    name: str
    id: int
    block_size: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block_size

    @property
    def is_quantized(self) -> bool:
        return self.block_size > 1

    def num_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of `shape` (PyTorch order); its last dimension must hold whole blocks."""
        rows = 1
        for size in shape[:-1]:
            rows *= size
        if shape[-1] % self.block_size:
            raise ValueError(f"rows of {shape[-1]} weights do not hold whole {self.name} blocks of {self.block_size}")
        return rows * (shape[-1] // self.block_size) * self.block_bytes


F32 = TensorType("F32", 0, 1, 4)
F16 = TensorType("F16", 1, 1, 2)
Q4_0 = TensorType("Q4_0", 2, 32, 18)
Q4_1 = TensorType("Q4_1", 3, 32, 20)
Q5_0 = TensorType("Q5_0", 6, 32, 22)
Q5_1 = TensorType("Q5_1", 7, 32, 24)
Q8_0 = TensorType("Q8_0", 8, 32, 34)
Q2_K = TensorType("Q2_K", 10, 256, 84)
Q3_K = TensorType("Q3_K", 11, 256, 110)
Q4_K = TensorType("Q4_K", 12, 256, 144)
Q5_K = TensorType("Q5_K", 13, 256, 176)
Q6_K = TensorType("Q6_K", 14, 256, 210)
IQ4_NL = TensorType("IQ4_NL", 20, 32, 18)
IQ4_XS = TensorType("IQ4_XS", 23, 256, 136)
BF16 = TensorType("BF16", 30, 1, 2)

TENSOR_TYPES: dict[str, TensorType] = {
    kind.name: kind
    for kind in (F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, IQ4_NL, IQ4_XS, Q3_K, Q2_K)
}
TENSOR_TYPES_BY_ID: dict[int, TensorType] = {kind.id: kind for kind in TENSOR_TYPES.values()}


def tensor_type(name: str) -> TensorType:
    """The type called `name` (any case), e.g. `q4_k`. Raises `UnsupportedError` with the nearest name."""
    found = TENSOR_TYPES.get(name.upper())
    if found is None:
        raise UnsupportedError(
            f"no tensor type {name!r} {nearest(name.upper(), TENSOR_TYPES)}".rstrip(),
            where="gguf",
            fix=f"types that are written: {', '.join(TENSOR_TYPES)}",
        )
    return found
