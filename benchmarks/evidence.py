"""The result file: sessions, and what was measured in each.

    {"sessions": [{commit, date, gpu, versions, command, ceilings, ...}],
     "results": [...], "limits": [...], "curves": [...]}

Every entry names its session by number; a session is one run of the runner. A file may hold several, on several GPUs.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .cases import CASES, Step
from .limits import shares

PACKAGES = ("torch", "triton", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo")
LISTS = {"measure": "results", "limits": "limits", "curve": "curves"}
ROOT = Path(__file__).parents[1]


def environment(commit: str | None, machine: dict[str, Any], module: str = "run") -> dict[str, Any]:
    """What a figure of a benchmark `module` depends on. `machine` is the GPU with its rates."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT, check=False)
        return done.stdout.strip()

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "commit": commit or git("rev-parse", "HEAD") or "unknown",
        "clean": commit is not None or git("status", "--porcelain", "--untracked-files=no") == "",
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "versions": versions,
        "command": f"python -m benchmarks.{module} " + " ".join(sys.argv[1:]),
        **machine,
    }


class Evidence:
    """A result file, and the session that adds to it."""

    def __init__(self, path: Path, session: dict[str, Any]) -> None:
        self.path = path
        self.data: dict[str, Any] = {"sessions": [], "results": [], "limits": [], "curves": []}
        if path.is_file():
            self.data.update(json.loads(path.read_text(encoding="utf-8")))
        self.session = session
        self.number = len(self.data["sessions"])
        self.data["sessions"].append(session)

    def has(self, step: Step) -> bool:
        """Whether this step was measured on this GPU with these versions, and at this commit where it is fastllm's.

        A failure counts: it would fail again.
        """
        for entry in self.data[LISTS[step.kind]]:
            if _key(step.kind, entry) == step:
                then = self.data["sessions"][entry["session"]]
                same = all(then.get(name) == self.session.get(name) for name in ("gpu", "versions"))
                return same and (step.peer != "fastllm" or then["commit"] == self.session["commit"])
        return False

    def put(self, step: Step, found: dict[str, Any]) -> dict[str, Any]:
        """Write what was found for a step, in the place of what an earlier session found for it. Returns the entry."""
        entry = {name: value for name, value in step._asdict().items() if value and name != "kind"}
        entry = {**entry, "session": self.number, **found}
        name = LISTS[step.kind]
        self.data[name] = [old for old in self.data[name] if _key(step.kind, old) != step] + [entry]
        self._add_shares()
        self._write()
        return entry

    def _add_shares(self) -> None:
        """The share of the limit of each result, where both were measured on one GPU with one version of torch."""
        for result in self.data["results"]:
            for limit in self.data["limits"]:
                if "error" in result or "error" in limit or not _same_work(result["case"], limit["case"]):
                    continue
                then, there = (self.data["sessions"][entry["session"]] for entry in (result, limit))
                if then["gpu"] == there["gpu"] and then["versions"].get("torch") == there["versions"].get("torch"):
                    result["share"] = {**shares(result, limit), "limit_session": limit["session"]}

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps(self.data, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(self.path)


def _same_work(one: str, other: str) -> bool:
    return one == other or (one in CASES and other in CASES and CASES[one].work == CASES[other].work)


def _key(kind: str, entry: dict[str, Any]) -> Step:
    return Step(kind, entry["case"], entry.get("peer", ""), entry.get("way", ""))
