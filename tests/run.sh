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

# A program, and the packages that bring it.
install() {
    if ! command -v "$1" >/dev/null && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        apt-get update -qq && apt-get install -y -qq "${@:2}" || echo "$1 could not be installed." >&2
    fi
}

if [ "${CI:-}" = true ]; then
    selection=()
    # Publishing is tested with the real git-lfs, the page in a real browser, whose screenshots show Chinese.
    install git-lfs git-lfs
    install chromedriver chromium chromium-driver fonts-wqy-zenhei
fi
ruff check .
# Two test files at a time: most tests use one core.
python -m pytest --numprocesses 2 --dist loadfile "${selection[@]}" "${arguments[@]}"
