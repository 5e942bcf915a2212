"""The benchmark of dynamic quantization: its text, its judge, and all of it at toy size."""

import functools
import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import dynamic_quantization, gguf_export
from benchmarks.gguf_judge import compare, decoded_model
from benchmarks.library_text import byte_level_tokenizer, library_text, packed_rows
from benchmarks.trained_models import SHAPES, random_checkpoint


def test_held_out_files_are_neither_twice_nor_mostly_in_the_training_text(tmp_path):
    for i in range(40):
        lines = "\n".join(f"a line that only file number {i} has, number {j}" for j in range(30))
        (tmp_path / f"file_{i}.py").write_text(lines)
        (tmp_path / f"copy_{i}.py").write_text(lines)
        (tmp_path / f"nearly_{i}.md").write_text(f"{lines}\nand one more line, which makes it another file")
    (tmp_path / "binary.py").write_bytes(b"\xff" * 1000)
    text = library_text(60_000, 10_000, folders=[tmp_path])
    assert len({*text.training, *text.held_out}) == len(text.training) + len(text.held_out) > 20
    first_lines = {part.splitlines()[0] for part in text.training}
    assert text.held_out and not any(part.splitlines()[0] in first_lines for part in text.held_out)
    assert text == library_text(60_000, 10_000, folders=[tmp_path])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(["def f(x):\n    return x + 1\n" * 50], 300)


def test_rows_are_the_texts_one_after_the_other(tokenizer):
    rows = packed_rows(tokenizer, ["def f", "return x"] * 20, 8)
    assert rows.shape[1] == 8 and rows.dtype == torch.int64
    assert tokenizer.decode(rows.flatten()).startswith("def f</s>return x</s>def f</s>")


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_the_judge_puts_every_weight_in_its_place(tmp_path, tokenizer, family):
    """Q8_0 is all but exact, so a wrong place would show; the heads of llama's queries are interleaved in the file."""
    from transformers import AutoModelForCausalLM

    from fastllm import FastLanguageModel

    folder = random_checkpoint(family, SHAPES["toy"][family], tokenizer, tmp_path / "model")
    model, _ = FastLanguageModel.from_pretrained(str(folder), dtype=torch.float32, load_in_4bit=False)
    written = model.save_pretrained_gguf(tmp_path / "out", tokenizer, quantization_method=["q8_0", "q3_k_m"])
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = torch.randint(3, len(tokenizer), (4, 32), generator=torch.Generator().manual_seed(0))
    near, far = (compare(reference, decoded_model(reference, path), rows, batch=2) for path in written["gguf_files"])
    assert near["predictions"] == 4 * 31
    assert 0 < near["kl_mean"] < 1e-4 < 20 * near["kl_mean"] < far["kl_mean"] < 1
    assert near["kl_mean"] < near["kl_99"]
    assert near["perplexity"] == pytest.approx(near["perplexity_16_bit"], rel=1e-3)
    identical = compare(reference, reference, rows, batch=4)
    assert identical["kl_mean"] == pytest.approx(0, abs=1e-12) and identical["same_top_token"] == 1


def test_the_benchmark_at_toy_size(tmp_path, monkeypatch):
    """Every size both ways, in equal bytes, with the figures that the goal is about."""
    out = tmp_path / "out.json"
    monkeypatch.setattr(dynamic_quantization, "_CHUNKS", 8)
    library = functools.partial(library_text, folders=[Path(dynamic_quantization.__file__).parents[1] / "fastllm"])
    monkeypatch.setattr(dynamic_quantization, "library_text", library)
    monkeypatch.setattr(sys, "argv", ["dynamic_quantization", "--size", "toy", "--families", "llama", "--models",
                                      str(tmp_path / "models"), "--out", str(out), "--commit", "abc"])  # fmt: skip
    dynamic_quantization.main()
    evidence = json.loads(out.read_text())
    assert evidence["commit"] == "abc" and "benchmarks.dynamic_quantization --size toy" in evidence["command"]
    (result,) = evidence["families"]
    assert result["training"]["steps"] == SHAPES["toy"]["llama"].steps and len(result["files"]) == 8
    assert result["predictions"] > 400 and result["perplexity_16_bit"] > 1
    for size in ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k"):
        assert 0.95 < result["ratios"][size]["bytes"] <= 1
        assert result["ratios"][size]["kl_mean"] > 0
    assert evidence["summary"]["kl_99"]["mean"] <= evidence["summary"]["kl_99"]["largest"]


def test_the_time_of_an_export(tmp_path):
    found = gguf_export.measure("toy", tmp_path, "q4_k_m")
    assert found["file_bytes"] > 100_000
    assert found["quantize_s"] + found["read_s"] > 0 and found["export_s"] > 0
