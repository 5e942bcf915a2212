"""What dynamic quantization gains at equal bytes, on models trained here to real skill.

    python -m benchmarks.dynamic_quantization [--minutes 7] [--families llama qwen3] [--out FILE]
    python -m benchmarks.dynamic_quantization --size small     # minutes on a CPU

A model is trained from scratch on the sources and documents of the installed packages, then exported at each size twice
in one run, with the same importance matrix: as the static mix, and with dynamic types in at most as many bytes. Both
are compared with the 16-bit model on files that neither training nor calibration has seen: the mean and the 99th
percentile of KL(16-bit || quantized). Results are written after each file that was judged.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

from .evidence import environment
from .library_text import byte_level_tokenizer, library_text, packed_rows
from .trained_models import SHAPES, random_checkpoint, train

ROOT = Path(__file__).parents[1]
SIZES = ("q3_k_m", "q4_k_m", "q5_k_m", "q6_k")
METHODS = [method for size in SIZES for method in (size, f"dynamic_{size}")]
# size -> characters to train on, characters held out, vocabulary, rows judged, seconds kept for what follows training
_SCALES = {
    "full": (120_000_000, 1_500_000, 24576, 64, 60),
    "small": (6_000_000, 300_000, 2048, 100, 60),
    "toy": (200_000, 40_000, 512, 8, 1),
}
_WEIGHTS = {"llama": 2.0}  # of the time; 1 for other families
_TOKENIZER_CHARACTERS = 20_000_000
_PROMPT = 128  # tokens before the one that llama.cpp predicts
_CHUNK, _CHUNKS = 512, 256  # tokens run at a time, and how often, to calibrate


def ratios(files: dict[str, dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Dynamic over static for each size that was judged both ways: of the mean, the 99th percentile and the bytes."""
    found = {}
    for size in SIZES:
        if size in files and f"dynamic_{size}" in files:
            static, dynamic = files[size], files[f"dynamic_{size}"]
            found[size] = {key: round(dynamic[key] / static[key], 4) for key in ("kl_mean", "kl_99", "bytes")}
    return found


def summary(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The mean and the largest ratio over all families and sizes."""
    rows = [row for result in results for row in ratios(result["files"]).values()]
    return {
        key: {"mean": round(sum(values) / len(values), 4), "largest": max(values)}
        for key in ("kl_mean", "kl_99", "bytes")
        if (values := [row[key] for row in rows])
    }


class Report:
    """The result file, written anew whenever something is known."""

    def __init__(self, path: Path, session: dict[str, Any]) -> None:
        self.path, self.data = path, {**session, "families": [], "summary": {}}

    def write(self) -> None:
        for result in self.data["families"]:
            result["ratios"] = ratios(result["files"])
        self.data["summary"] = summary(self.data["families"])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(self.path)


def export(checkpoint: Path, calibration: Any, folder: Path) -> tuple[list[Path], float]:
    """The file of each of `METHODS`, and the seconds that took."""
    import torch

    from fastllm import FastLanguageModel

    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(checkpoint), max_seq_length=calibration.shape[1], dtype=dtype, load_in_4bit=False
    )
    started = time.perf_counter()
    written = model.save_pretrained_gguf(
        folder / checkpoint.name, tokenizer, quantization_method=METHODS,
        calibration_dataset=[{"input_ids": row.tolist()} for row in calibration], max_seq_length=calibration.shape[1],
        num_calibration_samples=len(calibration),
    )  # fmt: skip
    return [Path(path) for path in written["gguf_files"]], round(time.perf_counter() - started, 1)


def judge(report: Report, result: dict[str, Any], checkpoint: Path, files: list[Path], rows: Any, options: Any) -> None:
    """Compare each file with the checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM

    from .gguf_judge import compare, compare_by_llama_cpp, decoded_model

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    weights = sum(p.numel() for p in model.parameters())
    for name, path in zip(METHODS, files, strict=True):
        found = compare(model, decoded_model(model, path), rows, batch=4)
        num_bytes = os.path.getsize(path)
        result["perplexity_16_bit"] = round(found.pop("perplexity_16_bit"), 4)
        result["predictions"] = found.pop("predictions")
        entry = {"bytes": num_bytes, "bits_per_weight": round(8 * num_bytes / weights, 3), **found}
        recipe = path.with_suffix(".recipe.json")
        if recipe.is_file():
            entry["expected_kl"] = json.loads(recipe.read_text(encoding="utf-8"))["notes"]["expected_divergence"]
        if options.llama_cpp:
            prompts = rows.reshape(-1, min(_PROMPT, rows.shape[1]))[: options.llama_cpp]
            entry["llama_cpp"] = compare_by_llama_cpp(model, path, prompts)
        result["files"][name] = entry
        report.write()
        print(f"  {name:15} {num_bytes:>12,} bytes  KL {found['kl_mean']:.3e}, 99 % {found['kl_99']:.3e}, "
              f"perplexity {found['perplexity']:.3f}", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SHAPES, default="full")
    parser.add_argument("--families", nargs="+", choices=SHAPES["full"], default=["llama", "qwen3"])
    parser.add_argument("--minutes", type=float, default=7.0, help="for everything; training takes what is left of it")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/dynamic_quantization", help="for models")
    parser.add_argument("--reuse", action="store_true", help="take the trained models that are in that folder")
    parser.add_argument("--llama-cpp", type=int, default=0, metavar="N", help="let llama.cpp judge N prompts as well")
    parser.add_argument("--out", type=Path, help="result file (default: by the GPU's name)")
    parser.add_argument("--commit", help="of these files, where they were copied here without their history")
    options = parser.parse_args()
    started = time.perf_counter()

    def left() -> float:
        return 60 * options.minutes - (time.perf_counter() - started)

    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    out = options.out or ROOT / f"benchmarks/results/dynamic_quantization_{gpu.lower().replace(' ', '_')}.json"
    report = Report(out, environment(options.commit, {"gpu": gpu}, "dynamic_quantization"))
    characters, held_out, vocabulary, judged, reserve = _SCALES[options.size]
    text = library_text(characters, held_out)
    tokenizer = byte_level_tokenizer(_first(text.training, _TOKENIZER_CHARACTERS), vocabulary)
    encoded: dict[int, tuple[Any, Any]] = {}
    for position, family in enumerate(options.families):
        shape = SHAPES[options.size][family]
        if shape.row not in encoded:
            encoded[shape.row] = tuple(
                packed_rows(tokenizer, part, shape.row) for part in (text.training, text.held_out)
            )
        rows, held = encoded[shape.row]
        weights = [_WEIGHTS.get(name, 1.0) for name in options.families[position:]]
        seconds = max(1.0, left() * weights[0] / sum(weights) - reserve)
        print(f"{family}: {rows.numel():,} tokens, {held.numel():,} held out, {left():.0f} s left, training for at "
              f"most {seconds:.0f} s", flush=True)  # fmt: skip
        folder = options.models / f"{family}-{options.size}"
        trained = folder / "16bit"
        if not (options.reuse and (trained / "config.json").is_file()):
            done = train(random_checkpoint(family, shape, tokenizer, folder / "random"), rows, shape, seconds, trained)
            (folder / "training.json").write_text(json.dumps(done) + "\n", encoding="utf-8")
        done = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        result: dict[str, Any] = {"family": family, "training": done, "files": {}}
        report.data["families"].append(result)
        report.write()
        calibration = rows.view(-1, min(_CHUNK, shape.row))[-_CHUNKS:]
        files, result["export_seconds"] = export(trained, calibration, folder)
        judge(report, result, trained, files, held[:judged], options)
    report.write()
    print(json.dumps(report.data["summary"]))
    print(f"written to {out} after {time.perf_counter() - started:.0f} s")


def _first(texts: list[str], characters: int) -> list[str]:
    """The first of `texts` of together at least `characters`."""
    total = 0
    for i, text in enumerate(texts):
        if total >= characters:
            return texts[:i]
        total += len(text)
    return texts


if __name__ == "__main__":
    main()
