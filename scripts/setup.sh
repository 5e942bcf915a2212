#!/bin/sh
# Make a virtual environment with fastllm, its test tools and the right torch for this machine.
# Usage: scripts/setup.sh [FOLDER]
set -eu
venv=${1:-.venv}
"${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check"

if command -v nvidia-smi >/dev/null 2>&1 || command -v rocminfo >/dev/null 2>&1 || [ "$(uname -s)" = Darwin ]; then
    $pip install -q -e ".[dev]"
else
    # torch's CPU build: from a local wheel where pip is configured with one, else from PyTorch's own index. The
    # registry's default build would bring gigabytes of CUDA libraries that this machine can't use.
    torch=$(grep '^torch==' constraints/cpu.txt)
    "$venv/bin/python" -c 'import torch' 2>/dev/null ||
        $pip install -q --no-index --no-deps "$torch" 2>/dev/null ||
        $pip install -q --no-deps --index-url https://download.pytorch.org/whl/cpu "$torch"
    $pip install -q -c constraints/cpu.txt -e ".[dev]"
fi
