#!/usr/bin/env bash
# Fetches what a machine needs that has PyTorch, transformers and peft but no network, into benchmarks/output/wheels
# (23 MB): copy that folder along with the repository and name it, WHEELS=benchmarks/output/wheels bash .../run.sh.
#     bash benchmarks/gpu/wheels.sh                       # for Python 3.12 on Linux x86-64 with CUDA 13.0
#     PYTHON_VERSION=3.11 CUDA=128 bash benchmarks/gpu/wheels.sh
# Versions are those of requirements.txt. bitsandbytes is thinned out: its wheel has a library for each CUDA version.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source ./setup_env.sh
wheels="$PWD/benchmarks/output/wheels"
rm -rf "$wheels" "$PWD/benchmarks/output/site"
mkdir -p "$wheels"

pin() { grep -oE "^$1==[^ ;]+" requirements.txt; }
fetch() {
    local folder="$1" platforms=()
    for platform in manylinux_2_{28,27,24,17}_x86_64 manylinux2014_x86_64 manylinux1_x86_64; do
        platforms+=(--platform "$platform")
    done
    shift
    python -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --implementation cp \
        --python-version "${PYTHON_VERSION:-3.12}" "${platforms[@]}" --dest "$folder" "$@"
}

fetch "$wheels" "$(pin transformers)" "$(pin peft)"
fetch "$wheels" "$(pin pydantic)" pydantic-core==2.50.5 annotated-types==0.8.0 typing-inspection==0.4.5 hjson==3.1.0
fetch "$wheels" liger-kernel==0.8.5    # What the padded loop is given, as other tools have it.
# DeepSpeed is published as source alone; without compiled parts its wheel is plain Python.
build="$(mktemp -d)"
trap 'rm -rf "$build"' EXIT
python -m venv --system-site-packages "$build/env"
"$build/env/bin/python" -m pip install --quiet --disable-pip-version-check setuptools==84.2.1 wheel==0.48.0
DS_BUILD_OPS=0 "$build/env/bin/python" -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation \
    --wheel-dir "$wheels" "$(pin deepspeed)"
fetch "$build" "$(pin bitsandbytes)"
"$build/env/bin/python" -m wheel unpack --dest "$build" "$build"/bitsandbytes-*.whl >/dev/null
rm "$build"/bitsandbytes-*.whl
find "$build"/bitsandbytes-* -name 'libbitsandbytes_*' ! -name "*cuda${CUDA:-130}.so" ! -name '*cpu.so' -delete
"$build/env/bin/python" -m wheel pack --dest-dir "$wheels" "$build"/bitsandbytes-* >/dev/null
du -ch "$wheels"/*.whl
