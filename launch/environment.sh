# Sourced by the launch scripts and in shells, from the repository root: makes .venv once, with the
# pinned packages and the given extras, and activates it. PYTHON chooses the interpreter.
# `return`, for `exit` would close the shell of whoever types it.
extras=${1:?extras to install, for example test}
python=${PYTHON:-python3}

if ! "$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; then
    echo "error: $python is no Python 3.11 or newer with venv; install one or set PYTHON" >&2
    return 2
fi
# A virtual environment without pip is one whose making was cut off.
[ -x .venv/bin/pip ] || "$python" -m venv --clear .venv || return 1
source .venv/bin/activate

stamp=".venv/installed-$extras"
wanted=$(cat pyproject.toml constraints.txt | sha256sum)
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "installing dtr-scale[$extras] into .venv (a few minutes, about 7 GB)"
    pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]" || return 1
    echo "$wanted" > "$stamp"
fi
unset extras python stamp wanted
