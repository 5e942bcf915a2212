"""Names that scripts written for Unsloth or for older releases of TRL use, and what they do here.

`install_trl_shim` and `uninstall_trl_shim` are described in `fastllm.models.trl_shim`. The `Patch...` functions stand
for Unsloth's: TRL's trainers are used as they are, so there is nothing to patch, and calling them does no harm.
"""

from __future__ import annotations

from typing import Any

from ._notices import notice
from .models.trl_shim import install_trl_shim, uninstall_trl_shim


def PatchDPOTrainer() -> None:
    """Nothing: TRL's DPOTrainer trains models of fastllm unmodified."""
    _nothing_to_patch("PatchDPOTrainer")


def PatchKTOTrainer() -> None:
    """Nothing: TRL's KTOTrainer trains models of fastllm unmodified."""
    _nothing_to_patch("PatchKTOTrainer")


def PatchFastRL(algorithm: str | None = None, FastLanguageModel: Any = None) -> None:
    """Nothing: TRL's reinforcement trainers train models of fastllm unmodified. The arguments are not read."""
    _nothing_to_patch("PatchFastRL")


def _nothing_to_patch(name: str) -> None:
    install_trl_shim()
    notice(f"fastllm: {name} has nothing to do: TRL's trainers are used unmodified", once=f"compat:{name}")


__all__ = ["PatchDPOTrainer", "PatchFastRL", "PatchKTOTrainer", "install_trl_shim", "uninstall_trl_shim"]
