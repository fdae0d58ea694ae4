#!/usr/bin/env bash
# Lint, types and tests. Makes .venv where there is none.
#
#   bash scripts/test.sh              what CI runs: everything but the slow tests
#   bash scripts/test.sh --slow       the slow tests alone (several processes, packaging, long runs)
#   bash scripts/test.sh ARGS...      pytest's own arguments: files, -k, -m, -x
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh dev
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}

case "${1:-}" in
  --slow) shift; exec .venv/bin/python -m pytest -m slow "$@" ;;
  "")
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/pyright
    exec .venv/bin/python -m pytest -m "not slow" -n 2 --dist loadscope --durations 10 ;;
  *) exec .venv/bin/python -m pytest "$@" ;;
esac
