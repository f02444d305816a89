#!/usr/bin/env bash
# Sets up .venv if need be and runs the tests. `--slow` (or CI=true) adds the long ones; other arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh

selection=(-m "not slow")
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(); else arguments+=("$argument"); fi
done
if [ "${CI:-}" = true ]; then selection=(); fi
ruff check .
python -m pytest "${selection[@]}" "${arguments[@]}"
