#!/bin/sh
# Make a virtual environment and install this checkout into it, in the versions that a constraints file names.
# Usage: scripts/install.sh VENV EXTRAS [CONSTRAINTS]   (default: requirements/tested.txt)
set -eu
venv=$1 extras=$2 constraints=${3:-requirements/tested.txt}
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip install --quiet --disable-pip-version-check"

# Without a GPU the CPU build of torch is wanted: it saves gigabytes. Its wheels bear the label +cpu where an index or
# a folder that pip is told about has them; elsewhere the plain release is taken.
pin=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' "$constraints")
if [ -n "$pin" ] && ! "$venv/bin/python" -c "
from importlib.metadata import version
raise SystemExit(version('torch').partition('+')[0] != '$pin')" 2>/dev/null; then
    if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
        $pip "torch==$pin"
    else
        $pip "torch==$pin+cpu" 2>/dev/null || $pip "torch==$pin"
    fi
fi
$pip --constraint "$constraints" --editable ".[$extras]"
