#!/bin/sh
# Resolves pyproject.toml's ranges in an empty environment and writes what pip chose. torch is held, so that a CPU file at hand is taken.
set -eu
python=${PYTHON:-python3.11}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
"$python" -m venv "$dir/env"
"$dir/env/bin/pip" install -q "torch==${TORCH:-2.13.0}"
"$dir/env/bin/pip" install -q ".[dev]" setuptools
{
    echo "# Exact versions, tested together on Python 3.11 and resolvable on 3.12 (Linux x86-64). Made by: make lock"
    "$dir/env/bin/pip" freeze --all --exclude pip --exclude dense2moe | sed 's/+cpu//'
} >requirements.lock
