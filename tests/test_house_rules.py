"""The rules of the house, read from the source: who imports whom, what code may not do, and what an import costs."""

import ast
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fastllm"
SOURCES = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("fastllm", "tests", "benchmarks", "examples")
ALL_PYTHON = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]

# Each room imports only from rooms on floors below its own, and from itself. The package's `__init__` resolves names
# of every floor when they are asked for; of it, rooms read the version.
FLOORS = [
    {"_errors", "_notices", "_device", "_compat", "_locked_memory"},
    {"kernels", "gguf", "text", "images"},
    {"chat_templates", "data", "packing", "videos", "vision_rows"},
    {"vision_data"},
    {"models"},
    {"compat", "save", "trainer"},
    {"cli"},
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Libraries that a room may use besides the standard one, where it may not use all.
LIBRARIES = {"kernels": {"torch", "triton", "xformers"}, "gguf": {"torch", "numpy", "gguf"}}
SOLE_IMPORTERS = {
    "bitsandbytes": ("models/quantized.py", "models/optimizers.py"),
    "triton": ("kernels/dispatch.py",),
    "xformers": ("kernels/xformers_attention.py",),
}
FORBIDDEN_CALLS = {"exec", "eval", "compile", "__import__", "os.system", "os.popen", "torch.compile"}
FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "subprocess", "pty"}
FORBIDDEN_ARGUMENTS = [("shell", True), ("weights_only", False), ("allow_pickle", True), ("trust_remote_code", True)]
# Puts attributes on another library's classes: TRL's trainers take the older keyword names through it.
PATCHES_ELSEWHERE = {"models/trl_shim.py"}
MAX_LINES = 500


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.relative_to(ROOT).as_posix())


def imports_of(path: Path) -> Iterator[str]:
    """Dotted names of everything that a file imports, at any depth, relative ones resolved."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            yield from (".".join((*base, *filter(None, (node.module, alias.name)))) for alias in node.names)


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an attribute chain, or an empty string."""
    if isinstance(node, ast.Attribute):
        owner = dotted(node.value)
        return f"{owner}.{node.attr}" if owner else ""
    return node.id if isinstance(node, ast.Name) else ""


@each(SOURCES)
def test_floors(path):
    room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in FLOOR_OF, f"{room} has no floor yet: name it in FLOORS"
    for imported in imports_of(path):
        top, _, rest = imported.partition(".")
        other = rest.partition(".")[0]
        if top == "fastllm" and other not in (room, "__version__"):
            assert FLOOR_OF.get(other, len(FLOORS)) < FLOOR_OF[room], f"{room} imports {imported}"


@each(SOURCES)
def test_libraries(path):
    room, name = path.relative_to(PACKAGE).parts[0], name_of(path)
    for library in {imported.partition(".")[0] for imported in imports_of(path)} - sys.stdlib_module_names:
        assert library in ("fastllm", *LIBRARIES.get(room, {library})), f"{room} does without {library}"
        assert name in SOLE_IMPORTERS.get(library, (name,)), f"only {SOLE_IMPORTERS[library]} imports {library}"


@each(SOURCES)
def test_no_code_from_data(path):
    """Nothing is executed, unpickled or handed to a shell."""
    found = {i for i in imports_of(path) if i.partition(".")[0] in FORBIDDEN_IMPORTS}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            found |= {dotted(node.func)} & FORBIDDEN_CALLS
            for keyword in node.keywords:
                value = keyword.value.value if isinstance(keyword.value, ast.Constant) else None
                found |= {f"{name}={bad}" for name, bad in FORBIDDEN_ARGUMENTS if (keyword.arg, value) == (name, bad)}
    assert not found


@each([path for path in SOURCES if name_of(path) not in PATCHES_ELSEWHERE])
def test_other_libraries_are_left_as_they_are(path):
    """No attribute of another library's module is assigned, by name or with setattr."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
            foreign |= {(alias.asname or alias.name).partition(".")[0] for alias in node.names}
    patched = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, ast.Call) and dotted(node.func) == "setattr":
            targets = [ast.Attribute(node.args[0], "?")]
        patched += [
            dotted(t) for t in targets if isinstance(t, ast.Attribute) and dotted(t).partition(".")[0] in foreign
        ]
    assert not patched


@each(ALL_PYTHON)
def test_files_are_small_and_finished(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_LINES
    assert not re.search(r"\b(TO[D]O|FIX[M]E|X[X]X)\b", text)
    assert path.stem not in ("utils", "helpers", "misc", "common"), "name the file for what it holds"


@each(sorted((PACKAGE / "kernels").glob("*.py")))
def test_kernels_are_documented(path):
    """Each file says what it computes, and each public function and class what it takes and gives."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    undocumented = [
        node.name
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not node.name.startswith("_")
        and not ast.get_docstring(node)
    ]
    assert not undocumented
    assert path.stem == "__init__" or ast.get_docstring(tree)


@each([path for path in SOURCES if "\n__all__" in path.read_text(encoding="utf-8")])
def test_public_names_resolve(path):
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    assert sorted(module.__all__) == sorted(set(module.__all__))
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


BREACHES = [
    (test_floors, "kernels/a.py", "from ..models import blocks"),
    (test_floors, "models/a.py", "def f():\n    from ..save import x"),
    (test_floors, "attic/a.py", ""),
    (test_libraries, "kernels/a.py", "import transformers"),
    (test_libraries, "models/a.py", "def f():\n    import bitsandbytes.nn"),
    (test_no_code_from_data, "models/a.py", "exec('1')"),
    (test_no_code_from_data, "models/a.py", "import os\nos.system('ls')"),
    (test_no_code_from_data, "models/a.py", "from subprocess import run"),
    (test_no_code_from_data, "models/a.py", "torch.load(path, weights_only=False)"),
    (test_other_libraries_are_left_as_they_are, "models/a.py", "import torch\ntorch.nn.Linear.forward = f"),
    (test_other_libraries_are_left_as_they_are, "models/a.py", "import peft\nsetattr(peft.LoraModel, 'a', 1)"),
    (test_files_are_small_and_finished, "models/a.py", "x = 1\n" * 501),
    (test_files_are_small_and_finished, "models/utils.py", ""),
    (test_kernels_are_documented, "kernels/a.py", '"""Sums."""\ndef total(x): ...'),
]


@pytest.mark.parametrize(("rule", "name", "source"), BREACHES)
def test_a_breach_is_noticed(rule, name, source, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path / "fastllm")
    path = tmp_path / "fastllm" / name
    path.parent.mkdir(parents=True)
    path.write_text(source, encoding="utf-8")
    with pytest.raises(AssertionError):
        rule(path)


IMPORT = """
import json, logging, os, sys, time, warnings
seen = []
before = dict(os.environ), list(warnings.filters), list(logging.root.handlers)
sys.addaudithook(lambda event, args: seen.append(event))
start = time.perf_counter()
import fastllm
seconds = time.perf_counter() - start
events = sorted({e for e in seen if e.startswith(("socket.", "subprocess.", "os.system", "urllib."))})
json.dump({
    "seconds": seconds, "events": events,
    "unchanged": before == (dict(os.environ), list(warnings.filters), list(logging.root.handlers)),
    "heavy": sorted({"torch", "triton", "transformers", "peft", "trl", "datasets", "numpy"} & set(sys.modules)),
}, sys.stdout)
"""


def test_import_is_quick_and_changes_nothing():
    runs = []
    for _ in range(4):
        done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
        assert done.stderr == ""
    assert all(run["events"] == [] and run["heavy"] == [] and run["unchanged"] for run in runs), runs
    assert min(run["seconds"] for run in runs) < 0.2
