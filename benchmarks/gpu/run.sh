#!/usr/bin/env bash
# Measures the project on this machine's card in about six minutes; see README.md beside this. Arguments go to run.py:
#     bash benchmarks/gpu/run.sh              # on a card; results in benchmarks/gpu/results/
#     bash benchmarks/gpu/run.sh --dry        # without one: tiny shapes, to try the kit
#     bash benchmarks/gpu/run.sh --parts gradients attention --out results.jsonl
# .venv is used and, if need be, made. On a machine without network that has PyTorch, transformers and the rest:
#     WHEELS=benchmarks/output/wheels bash benchmarks/gpu/run.sh     # python3, and before what it has what wheels.sh fetched
# PYTHON names another interpreter that has the packages.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
output="$PWD/benchmarks/output"
if [ -n "${WHEELS:-}" ]; then
    python="${PYTHON:-python3}" site="$output/site"
    if [ ! -e "$site/.complete" ]; then
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --upgrade --target "$site" "$WHEELS"/*.whl
        touch "$site/.complete"
    fi
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
elif [ -n "${PYTHON:-}" ]; then
    python="$PYTHON"
else
    source ./setup_env.sh
    python=python
fi
# Kernels that one part compiles are there for the next.
export TORCHINDUCTOR_CACHE_DIR="$output/inductor" TRITON_CACHE_DIR="$output/triton" PYTHONUNBUFFERED=1
exec "$python" benchmarks/gpu/run.py "$@"
