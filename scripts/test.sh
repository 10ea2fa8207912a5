#!/usr/bin/env bash
# Set up, check the style, run the tests.   bash scripts/test.sh [pytest arguments, e.g. --heavy]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh --torch tests/requirements.txt
.venv/bin/ruff check .
.venv/bin/ruff format --check --quiet .
exec .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
