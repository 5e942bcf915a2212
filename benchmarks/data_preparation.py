"""Chats to token ids and labels: fastllm beside TRL, on the same cores, rows and chat template.

    python benchmarks/data_preparation.py --tokenizer FOLDER [--rows 100000] [--repeats 3]

The sides take turns, each time in a process of its own, pinned to 1 and then 2 cores; what counts is the median. TRL is
`SFTTrainer(assistant_only_loss=True)` up to its prepared data set, with as many `dataset_num_proc` as cores; fastllm is
`tokenize_chats`. Both must give the same `input_ids`; the labels differ in the line breaks around an answer, which the
template of TRL trains. A third run reads a stream of the rows and records the memory it needs. FOLDER holds a Qwen 2
or 2.5 tokenizer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "data_preparation.json"
MAX_LENGTH = 1024


def chats(rows: int) -> Iterator[dict[str, Any]]:
    """Chats of two turns, cut from the text of Python's own documentation; always the same."""
    from pydoc_data.topics import topics

    words = " ".join(text for _, text in sorted(topics.items())).split()
    chance = random.Random(0)

    def text(low: int, high: int) -> str:
        length = chance.randint(low, high)
        start = chance.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    for _ in range(rows):
        turns = [text(5, 30), text(20, 80), text(5, 20), text(20, 80)]
        yield {"messages": [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]}


def load_tokenizer(folder: str) -> Any:
    import trl
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    templates = Path(trl.__file__).parent / "chat_templates"
    tokenizer.chat_template = (templates / "qwen2_5.jinja").read_text(encoding="utf-8")
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"
    return tokenizer


def prepare_with_trl(data: Any, tokenizer: Any, cores: int) -> Callable[[], Any]:
    """The call that prepares the data. The model is as small as TRL accepts."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    shape = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **shape))
    config = SFTConfig(
        output_dir=os.path.join(os.environ.get("TMPDIR", "/tmp"), "data_preparation"), use_cpu=True, bf16=False,
        report_to="none", assistant_only_loss=True, max_length=MAX_LENGTH,
        dataset_num_proc=cores if cores > 1 else None,
    )  # fmt: skip
    return lambda: SFTTrainer(model, args=config, train_dataset=data, processing_class=tokenizer).train_dataset


def prepare_with_fastllm(data: Any, tokenizer: Any, cores: int) -> Callable[[], Any]:
    from fastllm.data import tokenize_chats

    return lambda: tokenize_chats(data, tokenizer, max_length=MAX_LENGTH, progress=False)


def measure(side: str, folder: str, rows: int, cores: int) -> dict[str, Any]:
    """One side, in this process."""
    import datasets

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(folder)
    data = datasets.Dataset.from_list(list(chats(rows)))
    prepare = {"trl": prepare_with_trl, "fastllm": prepare_with_fastllm}[side]
    run = prepare(data, tokenizer, cores)
    work, start = cpu_seconds(), time.perf_counter()
    result = run()
    seconds, work = time.perf_counter() - start, cpu_seconds() - work
    digest, tokens, trained = hashlib.sha256(), 0, 0
    for row in result:
        digest.update(json.dumps(row["input_ids"]).encode())
        tokens += len(row["input_ids"])
        trained += len(row["labels"]) - row["labels"].count(-100)
    return {
        "seconds": round(seconds, 2), "cpu_seconds": round(work, 2), "rows_per_second": round(rows / seconds),
        "tokens": tokens, "trained_tokens": trained, "input_ids_sha256": digest.hexdigest()[:16],
    }  # fmt: skip


def cpu_seconds() -> float:
    """Processor time of this process and those it has waited for; steadier than the clock on a busy machine."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def measure_stream(folder: str, rows: int) -> dict[str, Any]:
    """Peak memory of this process after a tenth of a stream and after all of it."""
    from datasets import IterableDataset

    from fastllm.data import tokenize_chats

    stream = IterableDataset.from_generator(chats, gen_kwargs={"rows": rows})
    peaks, count, start = [], 0, time.perf_counter()
    for count, _ in enumerate(tokenize_chats(stream, load_tokenizer(folder), max_length=MAX_LENGTH), start=1):
        if count in (rows // 10, rows):
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return {
        "rows": count, "seconds": round(time.perf_counter() - start, 2),
        "peak_mib_after_a_tenth": peaks[0], "peak_mib_after_all": peaks[-1],
    }  # fmt: skip


def in_a_process(side: str, options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """One measurement in a process of its own, pinned to the first `cores` cores."""
    command = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--rows", str(options.rows)]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAYON_NUM_THREADS": str(cores),
        "TOKENIZERS_PARALLELISM": "true" if cores > 1 and side != "trl" else "false",
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }  # fmt: skip
    done = subprocess.run(
        [*command, "--side", side, "--cores", str(cores)], env=environment, check=True, capture_output=True, text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )  # fmt: skip
    return json.loads(done.stdout.strip().splitlines()[-1])


def processor() -> str:
    """The name of the processor, as Linux gives it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown processor"
    )


def compare(options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {
        "command": f"python benchmarks/data_preparation.py {' '.join(sys.argv[1:])}", "commit": commit(),
        "rows": options.rows, "repeats": options.repeats, "python": sys.version.split()[0],
        "versions": {name: version(name) for name in ("trl", "transformers", "tokenizers", "datasets")},
        "machine": f"{processor()}, {os.cpu_count()} cores",
    }  # fmt: skip
    for cores in (1, 2):
        results[f"{cores} core{'s' if cores > 1 else ''}"] = by_turns(options, cores)
    results["stream"] = in_a_process("stream", options, 1)
    return results


def by_turns(options: argparse.Namespace, cores: int) -> dict[str, Any]:
    """Both sides, one after the other, `repeats` times: all measurements, and how many times fastllm is faster."""
    runs: dict[str, list[dict[str, Any]]] = {"trl": [], "fastllm": []}
    for _ in range(options.repeats):
        for side, measured in runs.items():
            measured.append({"load_before": round(os.getloadavg()[0], 1), **in_a_process(side, options, cores)})
    if len({run["input_ids_sha256"] for measured in runs.values() for run in measured}) > 1:
        raise SystemExit(f"the two sides gave different tokens: {runs}")
    middle = {
        (side, unit): statistics.median(run[unit] for run in measured)
        for side, measured in runs.items()
        for unit in ("seconds", "cpu_seconds")
    }
    faster = {
        f"times_faster_in_{unit}": round(middle["trl", unit] / middle["fastllm", unit], 2)
        for unit in ("seconds", "cpu_seconds")
    }
    return {**faster, **runs}


def commit() -> str:
    """The commit measured, with `+` where the library differs from it."""
    root = Path(__file__).parents[1]
    head, changes = (
        subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
        for arguments in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "fastllm/text"])
    )
    return head + ("+" if changes else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--side", choices=("trl", "fastllm", "stream"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cores", type=int, default=1)
    options = parser.parse_args()
    if options.side == "stream":
        print(json.dumps(measure_stream(options.tokenizer, options.rows)))
    elif options.side:
        print(json.dumps(measure(options.side, options.tokenizer, options.rows, options.cores)))
    else:
        results = compare(options)
        options.output.parent.mkdir(exist_ok=True)
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
