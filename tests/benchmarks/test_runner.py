"""The benchmark runner: the smallest plan from end to end, what it skips and repeats, and how it spends its time."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from trl import pack_dataset

from benchmarks import run
from benchmarks.cases import CASES, CHECKPOINTING, PLANS, Step, steps
from benchmarks.evidence import Evidence
from benchmarks.trainer_steps import rows as rows_of

ROOT = Path(__file__).parents[2]
SESSION = {"commit": "a", "gpu": "none", "versions": {"torch": "2"}, "date": "2026-01-01"}
MEASURED = {"step_s": 0.5, "tokens_per_s": 100, "peak_reserved_gib": 1.0, "load_s": 1.0, "first_step_s": 1.0,
            "losses": [7.0], "steps": 1, "floor_s": 0.25, "floor_recompute_s": 0.4}  # fmt: skip


def benchmark(*options: object) -> dict:
    """Run the runner as a user does. Returns the evidence."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.run", *map(str, options)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1500, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(Path(options[options.index("--out") + 1]).read_text())


def test_a_case_from_end_to_end(tmp_path):
    """Two libraries train one tiny case in processes of their own; their losses agree and the file says how."""
    options = ("--cases", "smoke", "--ways", "least", "--peers", "fastllm", "hf", "--profile")
    evidence = benchmark(*options, "--models", tmp_path / "models", "--out", tmp_path / "out.json")
    ours, theirs = evidence["results"]
    assert (ours["peer"], theirs["peer"]) == ("fastllm", "hf")
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    assert ours["trainable"] == theirs["trainable"] and ours["first_grad_norm"] > 0
    assert "2 of 2 decoder layers fused" in ours["report"]
    assert {"gemm", "attention"} <= set(ours["profile"]["classes_ms"])
    (limit,) = evidence["limits"]
    assert ours["share"]["of_floor"] == pytest.approx(limit["floor_s"] / ours["step_s"], abs=1e-3)
    (session,) = evidence["sessions"]
    assert session["gpu"] == "none" and "--cases smoke" in session["command"] and session["versions"]["peft"]
    assert [path.name for path in tmp_path.glob("out*")] == ["out.json"]


def test_a_case_through_the_trainer(tmp_path):
    """Steps of an unmodified SFTTrainer, each of four batches, on the same rows for each library."""
    options = ("--cases", "smoke-trainer", "--ways", "least", "--peers", "fastllm", "hf", "--profile")
    ours, theirs = benchmark(*options, "--models", tmp_path / "models", "--out", tmp_path / "out.json")["results"]
    assert ours["trainer"] and ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    assert len(ours["losses"]) == 3 and ours["step_s"] > 0
    assert ours["trainable"] == theirs["trainable"] and ours["first_grad_norm"] > 0
    assert {"gemm", "attention"} <= set(ours["profile"]["classes_ms"])


def test_documents_of_a_packed_case_fill_the_rows_of_its_steps():
    case = CASES["smoke-packed"]
    documents = rows_of(case, 100)
    assert all(8 <= len(ids) <= 24 for ids in documents["input_ids"])
    packed = pack_dataset(documents, case.sequence)
    assert len(packed) >= (case.warmup + case.steps) * case.batch
    assert statistics.mean(len(ids) for ids in packed["input_ids"]) > 0.8 * case.sequence


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_smoke_plan(tmp_path):
    options = ("--plan", "smoke", "--peers", "fastllm", "hf", "--models", tmp_path / "models")
    evidence = benchmark(*options, "--out", tmp_path / "out.json")
    assert not [entry for name in ("results", "limits", "curves") for entry in evidence[name] if "error" in entry]
    assert {(r["case"], r["peer"]) for r in evidence["results"]} == {
        (case, peer) for case in ("smoke", "smoke-trainer", "smoke-packed", "smoke-vl") for peer in ("fastllm", "hf")
    }
    curves = [curve["losses"] for curve in evidence["curves"]]
    assert len(curves) == 2 and curves[0] == pytest.approx(curves[1], rel=1e-3)
    again = benchmark(*options, "--out", tmp_path / "out.json")
    assert again == evidence  # everything is there already


def test_every_plan_names_cases_and_ways_that_exist():
    for rows in PLANS.values():
        for step in steps(rows, CHECKPOINTING):
            assert step.kind == "curve" or step.case in CASES
            assert step.kind != "measure" or step.way in CHECKPOINTING[step.peer]


def test_cases_of_the_same_work_have_one_limit():
    plan = list(steps((("qlora-8b", ("least",)), ("qlora-8b-24g", ("least",)), ("lora-8b", ("least",))), ["hf"]))
    assert [step.case for step in plan if step.kind == "limits"] == ["qlora-8b", "lora-8b"]


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """Calls the runner with its processes replaced. Returns what it asked of them, and the evidence."""

    def call(*options, answers=lambda module, arguments: MEASURED):
        asked = []

        def child(self, module, **arguments):
            if module == "limits" and not arguments:
                return {"gpu": "none", "ceilings": {}}
            asked.append((module, arguments.get("case", "curves"), arguments.get("peer", "")))
            return dict(answers(module, arguments))

        monkeypatch.setattr(run.Session, "child", child)
        monkeypatch.setattr(run, "is_made", lambda model, folder: True)
        monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: name)
        out, models = tmp_path / "out.json", tmp_path / "models"
        monkeypatch.setattr(
            sys, "argv", ["run", "--out", str(out), "--models", str(models), "--commit", "a", *map(str, options)]
        )
        run.main()
        return asked, json.loads(out.read_text()) if out.is_file() else None

    return call


def test_a_second_command_goes_on_where_the_first_stopped(runner):
    options = ("--plan", "long", "--peers", "fastllm", "unsloth")
    first, evidence = runner(*options, "--minutes", 5)
    assert ("worker", "qlora-8b-32k", "fastllm") in first and ("worker", "qlora-8b-128k", "unsloth") not in first
    second, evidence = runner(*options)
    assert second and not set(first) & set(second)
    assert [result["session"] for result in evidence["results"]] == sorted(r["session"] for r in evidence["results"])
    assert len(evidence["sessions"]) == 2
    assert runner(*options)[0] == []
    assert set(runner(*options, "--again")[0]) == {*first, *second}


def test_failures_are_kept_and_stop_nothing(runner):
    def answers(module, arguments):
        return {"error": "CUDA out of memory"} if arguments.get("peer") == "hf" else MEASURED

    _, evidence = runner("--plan", "vision", "--peers", "hf", "fastllm", answers=answers)
    errors = [result for result in evidence["results"] if "error" in result]
    assert {result["peer"] for result in errors} == {"hf"} and len(errors) < len(evidence["results"])
    assert all(("share" in result) == ("error" not in result) for result in evidence["results"])


def test_a_measurement_that_the_session_ends_in_is_no_failure(runner):
    def answers(module, arguments):
        raise run.OutOfTime

    asked, evidence = runner("--cases", "smoke", "--peers", "hf", answers=answers)
    assert asked and evidence is None


@pytest.mark.parametrize(
    ("change", "peer", "measured_again"),
    [({}, "fastllm", False), ({"commit": "b"}, "fastllm", True), ({"commit": "b"}, "hf", False),
     ({"gpu": "another"}, "hf", True), ({"versions": {"torch": "3"}}, "hf", True)],
)  # fmt: skip
def test_what_counts_as_measured(tmp_path, change, peer, measured_again):
    step = Step("measure", "smoke", peer, "least")
    Evidence(tmp_path / "out.json", dict(SESSION)).put(step, dict(MEASURED))
    later = Evidence(tmp_path / "out.json", {**SESSION, **change})
    assert later.has(step) is not measured_again
    later.put(step, {**MEASURED, "step_s": 0.4})
    (result,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert result["session"] == 1 and result["step_s"] == 0.4


def test_limits_of_another_gpu_give_no_share(tmp_path):
    Evidence(tmp_path / "out.json", {**SESSION, "gpu": "another"}).put(Step("limits", "smoke"), dict(MEASURED))
    entry = Evidence(tmp_path / "out.json", dict(SESSION)).put(Step("measure", "smoke", "hf", "least"), dict(MEASURED))
    assert "share" not in entry
