"""What frozen 4-bit weights were turned into, held from one pass over a layer to the next.

Dequantisation gives the same matrix every time, so a layer with memory to spare does it once. Only 4-bit weights are
held: dense ones can be edited in place through `.data`, which no version counter of torch's sees.
"""

from collections.abc import Sequence
from typing import Any

from .nf4 import Nf4Weight


class KeptForm:
    """One form (a buffer, or several) of a few 4-bit weights, valid as long as they and the layout asked for stay."""

    __slots__ = ("_form", "_key", "_weights", "nbytes")

    def __init__(self) -> None:
        self.clear()

    def find(self, weights: Sequence[Nf4Weight], layout: tuple) -> Any:
        """What `store` was given for the same weights and layout, else None; anything else held is let go of."""
        if self._form is not None and self._key != _key(weights, layout):
            self.clear()
        return self._form

    def store(self, weights: Sequence[Nf4Weight], layout: tuple, form: Any) -> None:
        """Hold `form`, made from `weights`: a tensor, or what has `nbytes` like one."""
        # Their memory is held too: freed, another tensor could take its address.
        self._weights = tuple(weights)
        self._key, self._form, self.nbytes = _key(weights, layout), form, form.nbytes

    def clear(self) -> None:
        self._form, self._key, self._weights, self.nbytes = None, None, (), 0


class KeptWeights:
    """The kept forms of one layer, by the name of the group."""

    def __init__(self) -> None:
        self._forms: dict[str, KeptForm] = {}
        self._is_closed = False

    def __reduce__(self) -> tuple:
        return KeptWeights, ()  # a copied or stored model makes its own

    def form(self, group: str) -> KeptForm | None:
        """Where the form of a group is held; None after `close`."""
        return None if self._is_closed else self._forms.setdefault(group, KeptForm())

    def held(self) -> list[Any]:
        """The forms that are held now, for whoever needs their memory to stay after `close`."""
        return [form._form for form in self._forms.values() if form._form is not None]

    @property
    def nbytes(self) -> int:
        return sum(form.nbytes for form in self._forms.values())

    def close(self) -> None:
        """Free everything, for good: a backward that is still to come makes its weights as if none had been kept."""
        self._is_closed = True
        self._forms.clear()


def _key(weights: Sequence[Nf4Weight], layout: tuple) -> tuple:
    """Equal for forms of the same memory in the same state; torch counts writes to a tensor in its version."""
    tensors = [
        (tensor.data_ptr(), tensor._version)
        for weight in weights
        for tensor in (
            weight.packed, weight.absmax, weight.code, weight.nested_absmax, weight.nested_code, weight.offset
        )
        if tensor is not None
    ]  # fmt: skip
    numbers = [(weight.shape, weight.blocksize, weight.nested_blocksize, weight.device) for weight in weights]
    return layout, tensors, numbers
