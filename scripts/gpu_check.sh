#!/usr/bin/env bash
# Holds the first steps on this machine's GPU against the CPU's, and says what they cost; the head of
# scripts/gpu_check.py says what is checked.
#   bash scripts/gpu_check.sh                  1.3 million labels, about ten minutes on one GPU
#   bash scripts/gpu_check.sh --cpu            the same flow, small, without a GPU
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

prepare_environment
cd "$root"
exec python scripts/gpu_check.py "$@"
