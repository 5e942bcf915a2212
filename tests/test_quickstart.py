"""The quickstart runs from start to end as a user runs it; in its full length it teaches what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "examples" / "quickstart.py"


def run(output: Path, *options: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--output", str(output), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_a_short_run_goes_through_every_stage(tmp_path):
    told = run(tmp_path, "--base-steps", "20", "--steps", "10")
    assert "NF4 with double quantization" in told and "4 of 4 decoder layers fused" in told
    assert "of 16 answers the same as before saving" in told
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    again = run(tmp_path / "again", "--model", str(tmp_path / "merged"), "--steps", "5")
    assert f"Fine-tune {tmp_path / 'merged'}" in again and "learns" not in again


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_answers_are_right_that_were_not(tmp_path):
    told = run(tmp_path)
    before, after = map(int, re.search(r"right: (\d+) of 16 before, (\d+) of 16 after", told).groups())
    assert before == 0 and after >= 8
    first, last = map(float, re.findall(r"loss ([\d.]+) -> ([\d.]+)", told)[1])
    assert last < first / 3
    assert "the adapter on its 4-bit base: 16 of 16" in told
    assert int(re.search(r"merged 16-bit model: (\d+) of 16", told).group(1)) >= 10
