# Sourced by launch.sh: runs a command and passes on the signals that come meanwhile.
#
#   supervise COMMAND ...     sets code, the command's exit code, when all its ranks have left
#
# SLURM sends its early warning, SIGUSR1, to the processes that it started itself, which is
# launch.sh. Some of its configurations send it to every process of a job step instead; a launcher
# would die of it. So it is ignored while the launcher is started, which launchers inherit and
# training does not heed, and then passed on to the ranks alone, wherever they are below the
# launcher: torchrun gives each a session of its own.

# Prints the processes below $launched that listen to SIGUSR1: ranks, once they are training.
listening_ranks() {
  local key value pid=0 ancestor bit parents=() caught=()
  bit=$(($(kill -l USR1) - 1))
  while read -r key value; do
    case $key in
      Pid:) pid=$value ;;
      PPid:) parents[pid]=$value ;;
      SigCgt:) caught[pid]=$value ;;
    esac
  done < <(grep --no-messages --no-filename --extended-regexp '^(Pid|PPid|SigCgt):' \
    /proc/[0-9]*/status)
  for pid in "${!caught[@]}"; do
    (((0x${caught[pid]} >> bit) & 1)) || continue
    ancestor=$pid
    while ((ancestor > 1 && ancestor != launched)); do ancestor=${parents[ancestor]:-0}; done
    if ((ancestor == launched)); then echo "$pid"; fi
  done
}

# One rank that notices is enough: they agree every step. Before the first one listens there is
# nothing to save, but there may be before the time is up.
warn_ranks() {
  local ranks
  until ranks=$(listening_ranks) && [ -n "$ranks" ]; do
    kill -0 "$launched" 2>/dev/null || return 0
    sleep 1
  done
  kill -USR1 $ranks 2>/dev/null || true # word by word; one may have left
}

# srun passes SIGUSR1 on to its tasks, each of which is this script again. What it does on SIGTERM
# is kill them.
warn() {
  is_interrupted=yes
  if [ "$command_name" = srun ]; then kill -USR1 "$launched" || true; else warn_ranks & fi
}

stop() {
  is_interrupted=yes is_asked=yes
  if [ "$command_name" = srun ]; then
    kill -USR1 "$launched" || true
  else # deepspeed leaves its ranks running when it is killed itself: all its group
    kill -TERM -- "-$launched" || true
  fi 2>/dev/null
}

supervise() {
  command_name=$1 is_asked= is_interrupted=yes
  trap '' USR1
  set -m # a process group of its own, which a terminal may not read from
  "$@" </dev/null &
  launched=$!
  set +m
  trap warn USR1
  trap stop INT TERM HUP
  while [ -n "$is_interrupted" ]; do # a signal that is passed on ends the wait
    is_interrupted=
    code=0
    wait "$launched" 2>/dev/null || code=$? # that a signal ended it is for its ranks to say
  done
  # The launcher may be gone before its ranks have saved.
  while [ -n "$is_asked" ] && kill -0 -- "-$launched" 2>/dev/null; do sleep 0.2; done
}
