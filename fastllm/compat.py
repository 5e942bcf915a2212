"""Compatibility with scripts written for older releases of TRL: see `fastllm.models.trl_shim`."""

from .models.trl_shim import install_trl_shim, uninstall_trl_shim

__all__ = ["install_trl_shim", "uninstall_trl_shim"]
