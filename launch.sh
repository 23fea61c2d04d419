#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated model; `bash launch.sh --help` says more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"

usage() {
  cat <<'USAGE'
Usage: bash launch.sh [OPTION ...]

Trains UniDEC on the embedded corpus and evaluates it: about 10 minutes on two CPU cores. Makes
.venv, or uses the active environment, installs what is missing, and runs train.py under the
deepspeed launcher, on one GPU if there is one and on the CPU otherwise. A second run reuses what
is there and goes on where the first one stopped.

Every OPTION is passed on to train.py and replaces the default, which is

  --recipe quickstart
  --ds_config ds_configs/single_gpu_offload_bf16.json    with a GPU
              ds_configs/cpu_bf16.json                   without, on a CPU with bf16 matrix units
              ds_configs/cpu.json                        without either
  --resume auto

and the run directory is runs/RECIPE.

Examples:
  bash launch.sh --recipe lf-wordnet-84k
  bash launch.sh --set train.epochs=1 --output runs/short
  bash launch.sh --ds_config ds_configs/cpu_no_compiler.json --set classifier.kernel=torch

Needs Python 3.10, 3.11 or 3.12 and a C++ compiler; no root, no GPU. The first run downloads Python
packages. All options of train.py: `.venv/bin/python train.py --help`. Several GPUs, other
launchers: ds_configs/README.md. Tests: `bash scripts/test.sh`.
USAGE
}

own_ds_config=
for option in "$@"; do
  case $option in
    -h | --help)
      usage
      exit 0
      ;;
    --ds_config | --ds_config=*) own_ds_config=yes ;;
  esac
done

# The default ds_configs update weights with DeepSpeed's CPU kernel, which is compiled on first use.
check_compiler() {
  if ! command -v "${CXX:-c++}" >/dev/null; then
    fail "no C++ compiler (${CXX:-c++}). Install one (Debian, Ubuntu: g++; Fedora: gcc-c++; conda:" \
      "gxx), or train without one, more slowly:" \
      "bash launch.sh --ds_config ds_configs/cpu_no_compiler.json --set classifier.kernel=torch"
  fi
  "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' ||
    fail "$python has no headers (Python.h), which DeepSpeed's CPU kernel is compiled with." \
      "Install them (Debian, Ubuntu: python3-dev; Fedora: python3-devel), or train without:" \
      "bash launch.sh --ds_config ds_configs/cpu_no_compiler.json --set classifier.kernel=torch"
}

prepare_environment

free_port=$("$python" -c 'import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])')
launcher=(deepspeed --quiet --master_port "$free_port")
here=$root/
if [ "$PWD" -ef "$root" ]; then here=; fi
if "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  ds_config=${here}ds_configs/single_gpu_offload_bf16.json
  case ${CUDA_VISIBLE_DEVICES:-} in # the launcher would ignore it beside --num_accelerators
    "") launcher+=(--num_accelerators 1) ;;
    [0-9]*)
      launcher+=(--include "localhost:${CUDA_VISIBLE_DEVICES%%,*}")
      unset CUDA_VISIBLE_DEVICES
      ;;
    *) launcher=("$python") ;; # names of devices, which it does not know
  esac
else
  ds_config=${here}ds_configs/cpu.json
  if grep --quiet --no-messages --word-regexp amx_bf16 /proc/cpuinfo; then
    ds_config=${here}ds_configs/cpu_bf16.json
  fi
  launcher+=(--num_accelerators 1)
  export DS_ACCELERATOR=cpu
  if command -v nvidia-smi >/dev/null; then
    say "torch $(torch_version) cannot use this machine's NVIDIA GPU, so this trains on the CPU." \
      "For the GPU install a torch that fits its driver into $(dirname "$(dirname "$python")")" \
      "(https://pytorch.org/get-started/locally) and start again."
  fi
fi
[ -n "$own_ds_config" ] || check_compiler

command=("${launcher[@]}" "${here}train.py"
  --recipe quickstart --ds_config "$ds_config" --resume auto "$@")
say "${command[*]}"
# deepspeed leaves its ranks running when it is killed itself. In a process group of their own, all
# of them get the signal that ends this script.
set -m
"${command[@]}" &
trap 'kill -TERM -- "-$!" 2>/dev/null' INT TERM HUP
code=0
wait "$!" || code=$?
if ((code > 128)); then wait; fi # for the ranks to end
exit "$code"
