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
    # Publishing is tested with the real git-lfs, the page in a real browser, whose screenshots need a Chinese font.
    packages=()
    command -v git-lfs >/dev/null || packages+=(git-lfs)
    command -v chromedriver >/dev/null || packages+=(chromium chromium-driver fonts-wqy-zenhei)
    if [ "${#packages[@]}" -gt 0 ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq "${packages[@]}" || echo "${packages[*]} could not be installed." >&2
    fi
fi
ruff check .
python -m pytest "${selection[@]}" "${arguments[@]}"
