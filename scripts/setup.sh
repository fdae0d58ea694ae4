#!/usr/bin/env bash
# Make .venv where there is none and install jaxmerge into it: `bash scripts/setup.sh train,viz` (extras of pyproject.toml).
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:-dev}

if [ ! -x .venv/bin/python ]; then
  for python in "${PYTHON:-}" python3 python3.13 python3.12 python3.11; do
    if [ -n "$python" ] && "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then break; fi
    python=""
  done
  if [ -z "$python" ]; then
    echo "setup: jaxmerge needs Python 3.11 or newer and none was found; install one, or name it: PYTHON=/path/to/python" >&2
    exit 1
  fi
  echo "setup: making .venv with $("$python" --version)"
  "$python" -m venv .venv
fi

# Install again only when what is asked for has changed.
stamp=.venv/.installed
wanted="$extras $(cksum < pyproject.toml)"
if ! grep -qxF "$wanted" "$stamp" 2>/dev/null; then
  echo "setup: installing jaxmerge[$extras]"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$extras]"
  echo "$wanted" >> "$stamp"
fi
