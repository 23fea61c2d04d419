#!/usr/bin/env bash
# From a fresh clone to a trained and evaluated model; `bash launch.sh --help` says more.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/scripts/environment.sh"
source "$root/scripts/nodes.sh"
source "$root/scripts/supervise.sh"
trap '' USR1 # SLURM's early warning; until there is a launcher there is nothing to save

usage() {
  cat <<'USAGE'
Usage: bash launch.sh [OPTION ...] [OPTION OF train.py ...]

Trains UniDEC on the embedded corpus and evaluates it: about 10 minutes on two CPU cores. Makes
.venv, or uses the active environment, installs what is missing, and runs train.py under the
deepspeed launcher, on one GPU if there is one and on the CPU otherwise. A second run reuses what
is there and goes on where the first one stopped.

  --num_gpus N       processes on each node, a GPU each (or a part of the CPU's cores); default: 1,
                     what the hostfile says, or what SLURM gives the node
  --launcher L       deepspeed (default), accelerate or torchrun
  --hostfile FILE    several nodes: a line "HOST slots=GPUS" for each, the first is the main one
  --node_rank K      which line of FILE this node is; default: found by its name
  --master_port P    a port that is free on the main node
  --device D         gpu or cpu; default: gpu if there is one
  --install          only install
  --dry-run          print the commands instead of running them; installs nothing

In a SLURM job the nodes are known: `srun` starts this script on each of them.
docs/clusters.md has the commands for one GPU, eight, and two nodes of eight.

Every other option is passed on to train.py and replaces the default, which is

  --recipe quickstart
  --ds_config ds_configs/single_gpu_offload_bf16.json    with a GPU
              ds_configs/multi_gpu_zero2_bf16.json       with several
              ds_configs/cpu_bf16.json                   without, on a CPU with bf16 matrix units
              ds_configs/cpu.json                        without either
  --resume auto

and the run directory is runs/RECIPE.

Examples:
  bash launch.sh --recipe lf-wordnet-84k
  bash launch.sh --set train.epochs=1 --output runs/short
  bash launch.sh --num_gpus 8 --launcher torchrun --recipe lf-amazontitles-131k
  bash launch.sh --ds_config ds_configs/cpu_no_compiler.json --set classifier.kernel=torch

Needs Python 3.10, 3.11 or 3.12 and a C++ compiler; no root, no GPU. The first run downloads Python
packages. All options of train.py: `.venv/bin/python train.py --help`. Which ds_config to take:
ds_configs/README.md. Tests: `bash scripts/test.sh`.
USAGE
}

original=() # what every node of a SLURM job gets
for option in "$@"; do
  if [ "$option" != --dry-run ]; then original+=("$option"); fi
done
num_processes= hostfile= node_rank= master_port= device=
launcher=deepspeed own_ds_config= dry_run= only_install=
options=() # of train.py

needs_number() {
  [[ $2 =~ ^[0-9]+$ ]] && ((10#$2 >= $3)) || fail "$1: found '$2'; needs a number from $3"
}

while (($#)); do
  option=$1 value=
  case $option in
    --num_gpus | --launcher | --hostfile | --node_rank | --master_port | --device | --ds_config)
      (($# > 1)) || fail "$option needs a value"
      value=$2
      shift
      ;;
    --num_gpus=* | --launcher=* | --hostfile=* | --node_rank=* | --master_port=* | --device=* | \
      --ds_config=*)
      value=${option#*=}
      option=${option%%=*}
      ;;
  esac
  case $option in
    -h | --help)
      usage
      exit 0
      ;;
    --num_gpus)
      needs_number "$option" "$value" 1
      num_processes=$value
      ;;
    --launcher)
      case $value in
        deepspeed | accelerate | torchrun) launcher=$value ;;
        *) fail "--launcher: found '$value'; needs deepspeed, accelerate or torchrun" ;;
      esac
      ;;
    --hostfile) hostfile=$value ;;
    --node_rank)
      needs_number "$option" "$value" 0
      node_rank=$value
      ;;
    --master_port)
      needs_number "$option" "$value" 1
      master_port=$value
      ;;
    --device)
      [[ $value =~ ^(gpu|cpu)$ ]] || fail "--device: found '$value'; needs gpu or cpu"
      device=$value
      ;;
    --ds_config)
      own_ds_config=yes
      ds_config=$value
      ;;
    --install) only_install=yes ;;
    --dry-run) dry_run=yes ;;
    *) options+=("$option") ;;
  esac
  shift
done
[ -z "$node_rank" ] || [ -n "$hostfile" ] || fail "--node_rank needs --hostfile"

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

# Sets device, and ds_config where none was given.
choose_device() {
  local num_gpus=0
  if [ -z "$device" ] || [ -z "$dry_run" ]; then # loads torch: seconds
    num_gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null || echo 0)
  fi
  if [ -z "$device" ]; then
    device=gpu
    if ((num_gpus == 0)); then device=cpu; fi
    if [ "$device" = cpu ] && command -v nvidia-smi >/dev/null && [ -n "$(torch_version)" ]; then
      say "torch $(torch_version) cannot use this machine's NVIDIA GPU, so this trains on the CPU." \
        "For the GPU install a torch that fits its driver into $(dirname "$(dirname "$python")")" \
        "(https://pytorch.org/get-started/locally) and start again."
    fi
  fi
  if [ "$device" = gpu ] && [ -z "$dry_run" ] && ((num_processes > num_gpus)); then
    fail "--num_gpus: found $num_processes, but this node has $num_gpus"
  fi
  if [ -n "$own_ds_config" ]; then return; fi
  if [ "$device" = cpu ]; then
    ds_config=${here}ds_configs/cpu.json
    if grep --quiet --no-messages --word-regexp amx_bf16 /proc/cpuinfo; then
      ds_config=${here}ds_configs/cpu_bf16.json
    fi
  elif ((${#hosts[@]} > 1 || num_processes > 1)); then
    ds_config=${here}ds_configs/multi_gpu_zero2_bf16.json
  else
    ds_config=${here}ds_configs/single_gpu_offload_bf16.json
  fi
}

find_free_port() {
  "$python" -c 'import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    print(probe.getsockname()[1])'
}

# Sets command to the whole command of this node.
choose_command() {
  choose_launcher
  command+=("${here}train.py" --recipe quickstart --ds_config "$ds_config" --resume auto)
  command+=(${options[@]+"${options[@]}"})
  if ((${#settings[@]})); then command=(env "${settings[@]}" "${command[@]}"); fi
}

# Prints a command, quoted where a shell would not take a word as it is.
print_command() {
  local word line=
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=$(printf '%q' "$word")
    line+=" $word"
  done
  printf '%s\n' "${line# }"
}

print_node_commands() {
  if [ -n "$slurm_hostfile" ]; then
    printf "printf '%%s slots=%s\\\\n' %s >%q\n" "$num_processes" "${hosts[*]}" "$slurm_hostfile"
  fi
  choose_command
  print_command "${command[@]}"
}

print_commands() {
  if [ -z "$srun" ]; then
    print_node_commands
    return
  fi
  print_command "${srun[@]}"
  for node_rank in "${!slurm_nodes[@]}"; do
    echo "# which on ${slurm_nodes[node_rank]} runs:"
    print_node_commands
  done
}

if [ -n "$dry_run" ]; then
  look_for_environment
fi
find_nodes
srun=
if needs_srun; then # one task a node: this script again
  srun=(srun --nodes "${#slurm_nodes[@]}" --ntasks "${#slurm_nodes[@]}" --ntasks-per-node 1)
  srun+=(${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"} --kill-on-bad-exit=1)
  srun+=(bash "$root/launch.sh" ${original[@]+"${original[@]}"})
fi
if [ -z "$dry_run" ]; then
  # The nodes share one environment: only one of them may install into it.
  if ((${node_rank:-0} > 0)); then require_environment; else prepare_environment; fi
fi
if [ -n "$only_install" ]; then exit 0; fi
if [ -n "$srun" ] && [ -z "$dry_run" ]; then # the nodes have the GPUs, not this machine
  command=("${srun[@]}")
else
  master_port=${master_port:-$(find_free_port)}
  here=$root/
  if [ "$PWD" -ef "$root" ]; then here=; fi
  choose_device
  if [ -n "$dry_run" ]; then
    print_commands
    exit 0
  fi
  [ -n "$own_ds_config" ] || check_compiler
  if [ "$launcher" = deepspeed ] && ((${#hosts[@]})) && [ -z "$node_rank" ]; then
    command -v pdsh >/dev/null ||
      fail "the deepspeed launcher starts other nodes with pdsh, which is not installed; install it," \
        "or start this on every node with --node_rank 0, 1, ..."
  fi
  if [ -n "$slurm_hostfile" ]; then
    printf "%s slots=$num_processes\n" "${hosts[@]}" >"$slurm_hostfile"
  fi
  choose_command
fi
say "${command[*]}"
supervise "${command[@]}"
exit "$code"
