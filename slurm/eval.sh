#!/usr/bin/env bash
#SBATCH --job-name=gdrt-eval
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#SBATCH --signal=B:USR1@60
#
# Evaluates a run, with the users split over the ranks; every argument goes to `python -m eval.run`.
# With --runs FILE, an array task evaluates one line of the file, which is a run folder.
#
#   sbatch --gpus-per-node=4 --ntasks-per-node=4 --cpus-per-task=8 \
#          slurm/eval.sh --run runs/office [--base] [--split test] ...
#   sbatch --array=0-5%2 slurm/eval.sh --runs runs/sweep/runs.txt ...
#
# Finished users are kept: a requeued evaluation goes on where it ended, and before the time limit it
# requeues itself.
set -euo pipefail
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
  refuse "slurm/eval.sh was started outside a Slurm job" \
    "sbatch slurm/eval.sh ..., or: python -m eval.run ..."

last_line() { # last_line FILE: the number of its last line, counted from 0
  echo $(($(grep -c . "$1") - 1))
}

if [ "${1:-}" = --runs ]; then
  [ -n "${SLURM_ARRAY_TASK_ID:-}" ] ||
    refuse "--runs needs an array" "sbatch --array=0-$(last_line "$2") slurm/eval.sh --runs $2"
  run=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$2")
  [ -n "$run" ] ||
    refuse "$2 has no line for array task $SLURM_ARRAY_TASK_ID" "sbatch --array=0-$(last_line "$2") ..."
  shift 2
  set -- --run "$run" "$@"
fi
logs=$PWD/gdrt-eval-logs/job_$SLURM_JOB_ID
for ((i = 1; i <= $#; i++)); do
  next=$((i + 1))
  if [ "${!i}" = --run ]; then
    [ -f "${!next:-}/config.yaml" ] ||
      refuse "--run ${!next:-}: not a run folder (it has no config.yaml)" \
        "run.dir of a training, e.g. runs/office"
    logs=$(cd "${!next}" && pwd)/logs/slurm/job_$SLURM_JOB_ID
  fi
done
prepare_environment
describe_job
mkdir -p "$logs"
check_nodes "$logs"
requeue_on_warning
run_ranks "$logs" -m eval.run "$@"
