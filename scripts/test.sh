#!/usr/bin/env bash
# Every check of this project, on the CPU; options are passed on to pytest:
#   bash scripts/test.sh                       all (CONTRIBUTING.md says how long)
#   bash scripts/test.sh -m 'not slow' -x      the quick ones, up to the first failure
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

run() {
  say "$*"
  "$@"
}

prepare_environment dev
cd "$root"
run ruff check .
run ruff format --check .
run mypy
run lint-imports
run python -m pytest "$@"
