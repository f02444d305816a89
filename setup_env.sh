# Makes or updates .venv from requirements.txt and puts it on PATH. Sourced by the other scripts: `source setup_env.sh`.
# Nothing is installed when requirements.txt has not changed since the last time.

ENV_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
ENV_STAMP="$ENV_ROOT/.venv/requirements.sha256"

env_fits() { "$1" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null; }

# The status says whether there is an environment: callers run under `set -e`, an interactive shell must stay open.
env_setup() {
    local env_python="$ENV_ROOT/.venv/bin/python" python
    if ! env_fits "$env_python" || ! "$env_python" -c 'import pip' 2>/dev/null; then
        for python in python3.11 python3.12 python3 none; do
            if env_fits "$python"; then break; fi
        done
        if [ "$python" = none ]; then
            echo "setup_env.sh: needs Python 3.11 or 3.12, found $(python3 --version 2>&1)." >&2
            echo "Install one (Debian, Ubuntu: apt-get install python3.11 python3.11-venv; conda: conda create -n llm python=3.11) and run this again." >&2
            return 1
        fi
        echo "Making .venv with $("$python" --version) ..."
        # What is there and does not work is cleared. A link, even to a folder that is gone, goes on pointing there.
        if ! "$python" -m venv --clear "$(realpath -m "$ENV_ROOT/.venv")"; then
            echo "setup_env.sh: could not make .venv (Debian, Ubuntu: apt-get install python3-venv), run this again." >&2
            return 1
        fi
    fi
    if ! (cd "$ENV_ROOT" && sha256sum --check --status "$ENV_STAMP") 2>/dev/null; then
        echo "Installing requirements.txt (once; about 2 GB of downloads on a machine with a GPU) ..."
        if ! "$env_python" -m pip install --quiet --disable-pip-version-check -r "$ENV_ROOT/requirements.txt"; then
            echo "setup_env.sh: the installation failed, see the message above. With a slow or blocked index, name a mirror:" >&2
            echo "    PIP_INDEX_URL=<mirror> bash setup_env.sh" >&2
            return 1
        fi
        (cd "$ENV_ROOT" && sha256sum requirements.txt >"$ENV_STAMP")
    fi
    export PATH="$ENV_ROOT/.venv/bin:$PATH"
}

env_setup || return 1 2>/dev/null || exit 1
