#!/usr/bin/env bash
# One rank of a job step: srun starts it once per rank, with the command to run as arguments.
# It derives the rank variables from Slurm's and leaves the rank's exit status in
# $GDRT_RANK_LOGS/rank_N.exit (status, time, node).
set -u
if [ "${GDRT_SIGNALS:-}" = caught ]; then
  # The trainer installs its own handlers; until then a signal must not end it.
  trap '' USR1 TERM
fi

tasks_here() { # number of ranks on this node, from "2(x3),1" and the node's index
  local part count times index=0
  for part in ${SLURM_STEP_TASKS_PER_NODE//,/ }; do
    count=${part%%(*}
    times=1
    if [[ $part == *x* ]]; then
      times=${part##*x}
      times=${times%)}
    fi
    index=$((index + times))
    if [ "$SLURM_NODEID" -lt "$index" ]; then
      echo "$count"
      return
    fi
  done
}

export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID
LOCAL_WORLD_SIZE=$(tasks_here)
export LOCAL_WORLD_SIZE OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
"$@"
code=$?
printf '%s %s %s\n' "$code" "$(date +%s.%N)" "$(hostname)" > "$GDRT_RANK_LOGS/rank_$RANK.exit"
exit "$code"
