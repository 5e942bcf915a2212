"""Every kernel compiles, without a GPU, for every target that the README names, and fits it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that one thread block may have.
SHARED_MEMORY = {
    "sm_75": 64 * 1024, "sm_80": 163 * 1024, "sm_86": 99 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024,
    "sm_100": 227 * 1024, "gfx942": 64 * 1024,
}  # fmt: skip
# Triton compiles for them as for sm_86, whose shared memory is the smallest of the three.
LIKE_SM_86 = ("sm_80", "sm_89")


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_SM_86)) for name in SHARED_MEMORY]
)
def test_every_kernel_compiles_and_fits(target, tmp_path):
    """A process of its own: here Triton may be in interpreter mode, which is settled at import."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.kernels.ahead_of_time", target]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    compiled = result["compiled"]
    missing = set(result["kernels"]) - {entry["kernel"] for entry in compiled}
    assert not missing, f"ahead_of_time.py launches no {missing}"
    for entry in compiled:
        assert entry["shared"] <= SHARED_MEMORY[target], entry
        assert entry["spilled"] == 0, entry
        # Triton has no tensor cores before sm_80: there, matrix products belong to cuBLAS.
        assert target != "sm_75" or not entry["has_dot"], entry
