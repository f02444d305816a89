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
if [ "${CI:-}" = true ]; then
    selection=()
    # Publishing is tested with the real one.
    if ! command -v git-lfs >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq git-lfs || echo "git-lfs could not be installed." >&2
    fi
fi
ruff check .
python -m pytest "${selection[@]}" "${arguments[@]}"
