"""One class per tensor type: rows of weights to stored bytes and back."""

from __future__ import annotations

from ..tensor_types import TensorType
from .base import Quantizer
from .iq4 import IQ4_NLQuantizer, IQ4_XSQuantizer
from .k_affine import Q2_KQuantizer, Q4_KQuantizer, Q5_KQuantizer
from .k_signed import Q3_KQuantizer, Q6_KQuantizer
from .legacy import Q4_0Quantizer, Q4_1Quantizer, Q5_0Quantizer, Q5_1Quantizer, Q8_0Quantizer
from .plain import BF16Quantizer, F16Quantizer, F32Quantizer
from .shrinkage import regaining_factor

_QUANTIZERS: dict[str, Quantizer] = {
    quantizer.type.name: quantizer
    for quantizer in (
        F32Quantizer(),
        F16Quantizer(),
        BF16Quantizer(),
        Q8_0Quantizer(),
        Q4_0Quantizer(),
        Q4_1Quantizer(),
        Q5_0Quantizer(),
        Q5_1Quantizer(),
        Q2_KQuantizer(),
        Q3_KQuantizer(),
        Q4_KQuantizer(),
        Q5_KQuantizer(),
        Q6_KQuantizer(),
        IQ4_NLQuantizer(),
        IQ4_XSQuantizer(),
    )
}

__all__ = ["Quantizer", "quantizer_of", "regaining_factor"]


def quantizer_of(kind: TensorType) -> Quantizer:
    """The quantizer that writes `kind`."""
    return _QUANTIZERS[kind.name]
