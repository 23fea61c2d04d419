# Sourced by launch.sh: on which nodes, with how many processes each, and what starts them.
#
#   find_nodes          hostfile or SLURM -> hosts (none: this machine alone), slurm_nodes,
#                       num_processes, node_rank, master_port
#   choose_launcher     the above, device and launcher -> command, settings (for `env`)
#
# Input: hostfile, num_processes, node_rank, master_port, launcher, device (cpu or gpu), ds_config.

# Whether this is a task that srun started, not the batch script or an interactive shell.
in_slurm_step() {
  [ -n "${SLURM_STEP_ID:-}" ] && ((SLURM_STEP_ID < 4294967290))
}

# Whether srun has yet to start this script on the job's nodes: there are several, or `salloc` has
# left the shell on another machine.
needs_srun() {
  ((${#slurm_nodes[@]})) && ! in_slurm_step || return 1
  ((${#slurm_nodes[@]} > 1)) ||
    ! { [ "${slurm_nodes[0]}" = "${SLURMD_NODENAME:-}" ] || is_this_machine "${slurm_nodes[0]}"; }
}

# Whether a host's name or address is this machine's.
is_this_machine() {
  if [ -z "${own_names:-}" ]; then
    own_names=" localhost 127.0.0.1 ::1 $HOSTNAME $(hostname 2>/dev/null || true)"
    own_names+=" $(hostname -s 2>/dev/null || true) $(hostname -f 2>/dev/null || true)"
    own_names+=" $(hostname -I 2>/dev/null || true) "
  fi
  [[ $own_names == *" $1 "* ]]
}

find_nodes() {
  hosts=()
  slurm_nodes=() # of the job, also where it has only one
  slurm_hostfile=
  if [ -n "$hostfile" ]; then
    read_hostfile
  elif [ -n "${SLURM_JOB_ID:-}" ]; then
    read_slurm
  fi
  if [ -z "$num_processes" ]; then num_processes=1; fi
  if [ -n "$node_rank" ] && ((node_rank >= ${#hosts[@]})); then
    fail "--node_rank: found $node_rank, but there are ${#hosts[@]} nodes; needs 0 to" \
      "$((${#hosts[@]} - 1))"
  fi
  # Given a hostfile, deepspeed starts the other nodes itself; the others are started on each.
  if [ -z "$node_rank" ] && [ -n "$hostfile" ] &&
    { [ "$launcher" != deepspeed ] || ((${#hosts[@]} == 1)); }; then
    find_node_rank
  fi
  if ((${#hosts[@]} < 2)); then # one machine
    hosts=()
    node_rank=
    return
  fi
  master_port=${master_port:-29500}
}

# The format of the `deepspeed` launcher: "HOST slots=N" a line, # for comments.
read_hostfile() {
  [ -f "$hostfile" ] || fail "--hostfile: there is no file $hostfile"
  local line number=0 slots= other
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    line=${line%%#*}
    [ -n "${line//[[:space:]]/}" ] || continue
    [[ $line =~ ^[[:space:]]*([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] ||
      fail "$hostfile:$number: found '$line'; needs 'HOST slots=NUMBER_OF_GPUS'"
    if [ -n "$slots" ] && [ "$slots" != "${BASH_REMATCH[2]}" ] && [ -z "$num_processes" ]; then
      fail "$hostfile:$number: $slots slots above and ${BASH_REMATCH[2]} here; give the number to" \
        "use on every node with --num_gpus"
    fi
    slots=${BASH_REMATCH[2]}
    for other in ${hosts[@]+"${hosts[@]}"}; do
      [ "$other" != "${BASH_REMATCH[1]}" ] ||
        fail "$hostfile:$number: $other is there twice; needs one line a host, with all its slots"
    done
    hosts+=("${BASH_REMATCH[1]}")
  done <"$hostfile"
  ((${#hosts[@]})) || fail "--hostfile: $hostfile names no host"
  num_processes=${num_processes:-$slots}
}

read_slurm() {
  if [ -z "$num_processes" ]; then count_slurm_gpus; fi
  local nodes=${SLURM_JOB_NODELIST:-} num_nodes=${SLURM_JOB_NUM_NODES:-1}
  if in_slurm_step; then
    nodes=$SLURM_STEP_NODELIST num_nodes=$SLURM_STEP_NUM_NODES
    ((${SLURM_STEP_NUM_TASKS:-$num_nodes} == num_nodes)) ||
      fail "srun started $SLURM_STEP_NUM_TASKS tasks on $num_nodes nodes; needs one a node, which" \
        "starts the others there: srun --ntasks-per-node=1"
  fi
  slurm_nodes=(${nodes:+"$nodes"})
  ((num_nodes > 1)) || return 0
  mapfile -t slurm_nodes < <(scontrol show hostnames "$nodes")
  hosts=("${slurm_nodes[@]}")
  ((${#hosts[@]} == num_nodes)) || fail "scontrol names ${#hosts[@]} hosts of '$nodes', not $num_nodes"
  master_port=${master_port:-$((20000 + SLURM_JOB_ID % 20000))} # the same on every node
  if in_slurm_step; then node_rank=$SLURM_NODEID; fi
  if [ "$launcher" = deepspeed ]; then # which wants a file
    slurm_hostfile=${TMPDIR:-/tmp}/unidec_ds-hosts-$SLURM_JOB_ID
  fi
}

# Sets num_processes to a node's GPUs: "8", "a100:8", "a100:4,v100:2". Without any it stays unset.
count_slurm_gpus() {
  local gpus=${SLURM_GPUS_ON_NODE:-${SLURM_GPUS_PER_NODE:-0}} total=0 part
  for part in ${gpus//,/ }; do
    [[ ${part##*:} =~ ^[0-9]+$ ]] ||
      fail "SLURM says that a node has '$gpus' GPUs; say how many to use with --num_gpus"
    total=$((total + 10#${part##*:}))
  done
  if ((total)); then num_processes=$total; fi
}

# Finds this machine's place among the hosts of the hostfile by its names and addresses.
find_node_rank() {
  local place
  for place in "${!hosts[@]}"; do
    if ! is_this_machine "${hosts[place]}"; then continue; fi
    [ -z "$node_rank" ] ||
      fail "both ${hosts[node_rank]} and ${hosts[place]} of $hostfile are this machine; say which" \
        "of them this is with --node_rank"
    node_rank=$place
  done
  if [ -n "$node_rank" ]; then return; fi
  if ((${#hosts[@]} == 1)); then
    fail "this machine ($HOSTNAME) is not ${hosts[0]}, the only host of $hostfile; start this there"
  fi
  fail "this machine ($HOSTNAME) is not in $hostfile; start the same command on every node that" \
    "is, or say which of them this is: --node_rank 0 to $((${#hosts[@]} - 1))"
}

# Sets command, all up to train.py, and settings, what it needs in its environment.
choose_launcher() {
  settings=()
  if [ "$device" = cpu ]; then settings+=(DS_ACCELERATOR=cpu); fi
  if [ "$launcher" != deepspeed ] && ((num_processes > 1)) && [ -z "${OMP_NUM_THREADS:-}" ]; then
    local cores # these two launchers would leave one thread to each process
    cores=$(nproc)
    settings+=("OMP_NUM_THREADS=$((cores > num_processes ? cores / num_processes : 1))")
  fi
  "choose_$launcher"
}

choose_deepspeed() {
  command=(deepspeed --quiet)
  if ((${#hosts[@]})); then
    command+=(--hostfile "${hostfile:-$slurm_hostfile}" --num_accelerators "$num_processes")
    command+=(--master_addr "${hosts[0]}" --master_port "$master_port")
    if [ -n "$node_rank" ]; then command+=(--no_ssh --node_rank "$node_rank"); fi
    return
  fi
  command+=(--master_port "$master_port")
  if [ "$device" = cpu ]; then
    command+=(--num_accelerators "$num_processes")
    return
  fi
  local visible=
  case ${CUDA_VISIBLE_DEVICES:-} in # the launcher would ignore it beside --num_accelerators
    "") command+=(--num_accelerators "$num_processes") ;;
    [0-9]*)
      visible=$(cut -d , -f "1-$num_processes" <<<"$CUDA_VISIBLE_DEVICES")
      command+=(--include "localhost:$visible")
      settings+=(-u CUDA_VISIBLE_DEVICES)
      ;;
    *) # names of devices, which it does not know
      ((num_processes == 1)) ||
        fail "the deepspeed launcher does not know the GPUs of CUDA_VISIBLE_DEVICES" \
          "($CUDA_VISIBLE_DEVICES) by name; use --launcher torchrun"
      command=("$python")
      ;;
  esac
}

choose_torchrun() {
  command=(torchrun --nproc_per_node "$num_processes")
  if ((${#hosts[@]})); then
    local is_host=false
    if [ "$node_rank" = 0 ]; then is_host=true; fi
    command+=(--nnodes "${#hosts[@]}" --rdzv_backend c10d)
    command+=(--rdzv_endpoint "${hosts[0]}:$master_port" --rdzv_conf "is_host=$is_host")
    command+=(--rdzv_id "${SLURM_JOB_ID:-unidec_ds}")
  else
    command+=(--nnodes 1 --master_addr 127.0.0.1 --master_port "$master_port")
  fi
}

choose_accelerate() {
  local num_nodes=${#hosts[@]}
  if ((num_nodes == 0)); then num_nodes=1; fi
  command=(accelerate launch --use_deepspeed --deepspeed_config_file "$ds_config")
  command+=(--zero3_init_flag false --mixed_precision no --dynamo_backend no)
  command+=(--num_machines "$num_nodes" --num_processes "$((num_nodes * num_processes))")
  if ((${#hosts[@]})); then
    command+=(--machine_rank "$node_rank" --main_process_ip "${hosts[0]}")
    command+=(--deepspeed_multinode_launcher standard)
  fi
  command+=(--main_process_port "$master_port")
}
