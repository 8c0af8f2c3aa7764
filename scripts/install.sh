#!/bin/sh
# Make a virtual environment and install this checkout into it. Usage: scripts/install.sh VENV EXTRAS
set -eu
venv=$1 extras=$2
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"

# Without a GPU the CPU build of torch is wanted: it saves gigabytes. Its wheels bear the label +cpu where an index or
# a folder that pip is told about has them; elsewhere the plain release is taken.
if ! "$venv/bin/python" -c "import torch" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        $pip "torch>=2.10"
    else
        $pip "torch==2.13.0+cpu" 2>/dev/null || $pip "torch==2.13.0"
    fi
fi
$pip --editable ".[$extras]"
