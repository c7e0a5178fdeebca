#!/usr/bin/env bash
#SBATCH --job-name=gdrt-compare
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Compares evaluation folders on one CPU; every argument goes to `python -m eval.compare`.
#
#   sbatch slurm/compare.sh runs/sft/eval/test-renormalised runs/gdrt/eval/test-renormalised \
#          --output runs/comparison
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
  refuse "slurm/compare.sh was started outside a Slurm job" \
    "sbatch slurm/compare.sh ..., or: python -m eval.compare ..."
prepare_environment
exec "${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" -m eval.compare "$@"
