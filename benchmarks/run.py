"""Measure fastllm beside the libraries that are installed here, and write the evidence.

    python -m benchmarks.run                                  the whole plan, every installed peer
    python -m benchmarks.run --plan speed --peers fastllm unsloth
    python -m benchmarks.run --cases qlora-8b --ways least
    python -m benchmarks.run --minutes 9                      what fits; the same command again goes on from there

Each measurement is a process of its own, one after the other, on random weights of real shapes and random tokens. The
result file is written after each; what it holds already, for this GPU, these versions and this commit, is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .cases import CASES, PLANS, TEXT_PEERS, WAYS, Step, steps
from .evidence import ROOT, Evidence, environment
from .models import is_made
from .peers import MODULES

# Guesses of time are for fastllm. A peer that compiles its kernels first, or is slower, takes this many times as long.
PEER_FACTOR = {"hf": 1.5, "liger": 1.5, "unsloth": 1.5}
CURVE_SECONDS, CHECKPOINT_SECONDS = 90, 40
# Nothing is fetched, and no statistics of use are sent, while something is measured.
QUIET = {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}


class OutOfTime(Exception):
    """The session's time ended during a measurement."""


class Session:
    """Runs the steps of a plan while time lasts. No GPU is touched by this process itself."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.deadline = time.monotonic() + 60 * options.minutes if options.minutes else float("inf")
        options.models.mkdir(parents=True, exist_ok=True)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def child(self, module: str, **arguments: Any) -> dict[str, Any]:
        """What a module of the benchmarks prints when it is run with these arguments, or why it printed nothing."""
        command = [sys.executable, "-m", f"benchmarks.{module}"]
        for name, value in arguments.items():
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)] if value else []
        timeout = min(self.options.timeout, self.left())
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            # Some libraries write caches into the folder that they are run in.
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=max(1.0, timeout), check=False,
                cwd=self.options.models, env={**os.environ, **QUIET, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
            output, errors = done.stdout, done.stderr
        except subprocess.TimeoutExpired as expired:
            if timeout < self.options.timeout:
                raise OutOfTime from None
            output, errors = _text(expired.stdout), f"no result in {self.options.timeout} s"
        lines = [line for line in output.splitlines() if line.startswith("RESULT ")]
        if lines:
            return json.loads(lines[-1].removeprefix("RESULT "))
        return {"error": (errors.strip().splitlines() or ["no output"])[-1][:300]}

    def seconds(self, step: Step) -> float:
        """A guess of the time that a step takes, so that none is started that can't end."""
        if step.kind == "curve":
            return CURVE_SECONDS
        case = CASES[step.case]
        if step.kind == "limits":
            return case.seconds / 3
        making = 0 if is_made(case.model, self.options.models) else CHECKPOINT_SECONDS
        return making + case.seconds * PEER_FACTOR.get(step.peer, 1.0)

    def run(self, step: Step) -> dict[str, Any]:
        models = self.options.models.resolve()
        if step.kind == "limits":
            return self.child("limits", case=step.case)
        if step.kind == "curve":
            size = "toy" if self.options.plan == "smoke" else "small"
            return self.child("quality", peer=step.peer, way=step.way, size=size, models=models)
        model = CASES[step.case].model
        if not is_made(model, models):
            made = self.child("models", model=model, folder=models)
            if "error" in made:
                return made
        return self.child(
            "worker", case=step.case, peer=step.peer, way=step.way, model=models / model, profile=self.options.profile
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="all", help="which measurements, in order of their worth")
    parser.add_argument("--cases", nargs="+", choices=CASES, help="these cases instead of a plan")
    parser.add_argument("--peers", nargs="+", choices=MODULES, default=list(TEXT_PEERS), help="(default: all)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="of holding activations")
    parser.add_argument("--minutes", type=float, help="start nothing that does not end in this time")
    parser.add_argument(
        "--profile", action="store_true", help="add a breakdown of a step by kernel class to each result"
    )
    parser.add_argument("--again", action="store_true", help="measure also what the result file holds")
    parser.add_argument("--models", type=Path, default=ROOT / "outputs/benchmark_models", help="for checkpoints")
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/<gpu>.json)")
    parser.add_argument("--commit", help="of these files, where they were copied here without their history")
    parser.add_argument("--timeout", type=int, default=600, help="seconds a measurement may take")
    parser.add_argument("--dry-run", action="store_true", help="print the plan")
    options = parser.parse_args()

    rows = [(case, tuple(options.ways)) for case in options.cases] if options.cases else PLANS[options.plan]
    installed = [peer for peer in options.peers if importlib.util.find_spec(MODULES[peer]) is not None]
    plan = [step for step in steps(rows, installed) if step.kind != "measure" or step.way in options.ways]
    session = Session(options)
    if options.dry_run:
        for step in plan:
            print(f"{session.seconds(step):5.0f} s  {_head(step)}")
        return
    machine = session.child("limits")
    if "error" in machine:
        raise SystemExit(f"the machine could not be measured: {machine['error']}")
    out = options.out or ROOT / f"benchmarks/results/{machine['gpu'].lower().replace(' ', '_')}.json"
    evidence = Evidence(out, environment(options.commit, machine))
    left_out = []
    for step in plan:
        if not options.again and evidence.has(step):
            continue
        if session.seconds(step) > session.left():
            left_out.append(step)
            continue
        try:
            found = session.run(step)
        except OutOfTime:
            left_out.append(step)
            continue
        print(_line(step, evidence.put(step, found)), flush=True)
    print(f"written to {out}")
    if left_out:
        print(f"{len(left_out)} left out for lack of time; the same command goes on with {_head(left_out[0])}")


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _head(step: Step) -> str:
    words = f"{step.case:16} {step.peer:8} {step.way:8}"
    return words if step.kind == "measure" else f"{words} {step.kind}"


def _line(step: Step, entry: dict[str, Any]) -> str:
    head = _head(step)
    if "error" in entry:
        return f"{head} {entry['error']}"
    if step.kind == "limits":
        return (
            f"{head}: at least {entry['floor_s']:.3f} s a step, {entry['floor_recompute_s']:.3f} s with recomputation"
        )
    if step.kind == "curve":
        return f"{head}: loss {entry['losses'][0]:.3f} -> {entry['losses'][-1]:.3f} in {entry['steps']} steps"
    return (
        f"{head} {entry['tokens_per_s']:>7,} tokens/s, peak {entry['peak_reserved_gib']:6.2f} GiB reserved, "
        f"load {entry['load_s']:5.1f} s, first step {entry['first_step_s']:5.2f} s, loss {entry['losses'][0]:.4f}"
        + (f", {entry['share']['of_floor']:.0%} of the limit" if "share" in entry else "")
    )


if __name__ == "__main__":
    main()
