#!/usr/bin/env bash
#SBATCH --job-name=gdrt-sweep
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%A_%a.log
#SBATCH --signal=B:USR1@300
#
# Trains a grid of objectives, seeds and temperatures as a job array: one array task is one run, with
# everything gdrt.sh does. The first command lists the grid with its numbers, the second trains it.
#
#   python slurm/grid.py --objectives sft,gdrt --seeds 0,1 --taus 0.5,1
#   sbatch --array=0-5%2 slurm/sweep.sh --objectives sft,gdrt --seeds 0,1 --taus 0.5,1 \
#          --into runs/sweep -- --config configs/x.yaml [key=value ...]
#
# `%2` runs two at a time. Run folders are INTO/NAME, listed in INTO/runs.txt, which eval.sh takes as --runs.
trap 'warned=1' USR1 # replaced by gdrt.sh below; until then a warning must not end the shell
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
[ -n "${SLURM_ARRAY_TASK_ID:-}" ] ||
  refuse "slurm/sweep.sh is not part of a job array" \
    "sbatch --array=0-N%2 slurm/sweep.sh ...; slurm/grid.py lists the N"
prepare_environment
GRID_TOOL=("${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" "$GDRT_HOME/slurm/grid.py")
chosen=$("${GRID_TOOL[@]}" --index "$SLURM_ARRAY_TASK_ID" "$@") || exit $?
eval "set -- $chosen"
say "array task $SLURM_ARRAY_TASK_ID: $*"
# shellcheck source=slurm/gdrt.sh disable=SC1091
. "$GDRT_HOME/slurm/gdrt.sh"
