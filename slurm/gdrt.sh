#!/usr/bin/env bash
#SBATCH --job-name=gdrt
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@300
#
# Trains one run, on as many ranks as the job has GPUs (or tasks, without GPUs), over as many lives as it
# takes. Without arguments it is the quick start, on one CPU rank.
#
#   sbatch slurm/gdrt.sh
#   sbatch --nodes=4 --gpus-per-node=8 --ntasks-per-node=8 --cpus-per-task=8 --time=24:00:00 \
#          slurm/gdrt.sh --config configs/llama3_8b.yaml run.dir=runs/office dro.tau=0.5
#
# Before the time limit and before an eviction all ranks save the same step and the job requeues itself;
# after a dead node Slurm requeues it. Each life goes on from the newest valid checkpoint. A finished run
# never starts again, a mistake in the settings never requeues, and neither GDRT_MAX_REQUEUES (20) lives nor
# GDRT_MAX_STALLED (2) lives without a new checkpoint are exceeded. Settings and failures: docs/clusters.md.
set -euo pipefail
warned=${warned:-0} # sweep.sh may have been warned before it came here
STEP_PID=''
REPEATER=''
CODE=''

# shellcheck disable=SC2317 # called by the trap
on_warning() { # the time limit or an eviction is near
  export SIGNALLED=1 # tells await_step why `wait` returned
  [ "$warned" = 1 ] || printf 'gdrt: %s: asked to stop; the ranks save a checkpoint\n' "$(date +%T)"
  warned=1
  pass_on
}

# Tells the ranks, again and again until they end: a rank that is still starting ignores the signal.
pass_on() {
  [ -n "$STEP_PID" ] && [ -z "$REPEATER" ] || return 0
  while kill -USR1 "$STEP_PID" 2>/dev/null; do
    sleep 10
  done &
  REPEATER=$!
}

# After a preemption without a warning it does as above. At the time limit itself seconds are left, so it
# requeues first; ranks that save in time lose nothing.
# shellcheck disable=SC2317 # called by the trap
on_term() {
  on_warning
  [ -n "$STEP_PID" ] || return 0
  describe_state
  if [ "$REASON" = TimeLimit ]; then
    conclude 75 --early
  fi
}
trap on_warning USR1
trap on_term TERM

# Slurm runs a copy of this file, which cannot ask where it came from: the project is looked for.
for GDRT_HOME in "${GDRT_HOME:-}" "${SLURM_SUBMIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}/.."; do
  [ -f "$GDRT_HOME/slurm/common.sh" ] && break
  GDRT_HOME=
done
if [ -z "$GDRT_HOME" ]; then
  printf 'error: the project was not found from %s\n' "${SLURM_SUBMIT_DIR:-$PWD}" >&2
  printf '  fix: submit from its folder, or set GDRT_HOME\n' >&2
  exit 2
fi
GDRT_HOME=$(cd "$GDRT_HOME" && pwd)
# shellcheck source=slurm/common.sh disable=SC1091
. "$GDRT_HOME/slurm/common.sh"
[ -n "${SLURM_JOB_ID:-}" ] ||
  refuse "slurm/gdrt.sh was started outside a Slurm job" \
    "sbatch slurm/gdrt.sh ..., or: deepspeed gdrt_ds/train.py ..."
[[ " $* " == *" --config"* ]] || set -- --config "$DEFAULT_CONFIG" "$@"

running_jobs() { # the user's jobs that still have processes: "17 18 "
  squeue -h -u "$(id -u)" -t R,CG -o %A | tr '\n' ' '
}

prepare_environment
LIFE_TOOL=("${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" "$GDRT_HOME/slurm/lives.py")
RESTART=${SLURM_RESTART_COUNT:-0}
begun=$("${LIFE_TOOL[@]}" begin --job "$SLURM_JOB_ID" --restart "$RESTART" \
  --active "$(running_jobs)" -- "$@") || exit $?
eval "$begun" # VERDICT, RUN_DIR, LOGS, EXTRA (arguments for the trainer)
[ "$VERDICT" = finished ] && exit 0
describe_job
check_nodes "$RUN_DIR"
TRAIN=("${TRAINER[@]}" "$@" "${EXTRA[@]}")
if [ "$RESTART" = 0 ] && [ "${GDRT_PLAN:-1}" = 1 ]; then
  # A plan that is refused ends the job here, before any rank starts.
  "${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" "${TRAIN[@]}" --plan --world "$RANKS" || exit $?
fi
if [ "$warned" = 0 ]; then
  export GDRT_SIGNALS=caught GDRT_LIFE=$RESTART
  launch "$LOGS" "${TRAIN[@]}"
  [ "$warned" = 0 ] || pass_on # it came between the question above and the launch
  await_step
else
  STEP_CODE=75 # asked to stop before the ranks started
fi

describe_state
conclude "$STEP_CODE"
exit "$CODE"
