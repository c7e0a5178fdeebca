#!/usr/bin/env bash
#SBATCH --job-name=gdrt-prepare
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
#
# Does what a large job would wait for: converts the model, tokenises the data and scores the relevance of
# every target token. The arguments are those of gdrt.sh; run it with the same ones, on as few GPUs as hold
# the model.
#
#   sbatch --gpus-per-node=1 --cpus-per-task=8 \
#          slurm/prepare.sh --config configs/llama3_70b.yaml run.dir=runs/office
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
  refuse "slurm/prepare.sh was started outside a Slurm job" \
    "sbatch slurm/prepare.sh ..., or: python -m gdrt_ds.prepare ..."
[[ " $* " == *" --config"* ]] || set -- --config "$DEFAULT_CONFIG" "$@"
prepare_environment
LIFE_TOOL=("${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" "$GDRT_HOME/slurm/lives.py")
begun=$("${LIFE_TOOL[@]}" look -- "$@") || exit $?
eval "$begun" # VERDICT, RUN_DIR
[ "$VERDICT" = finished ] && exit 0
describe_job
check_nodes "$RUN_DIR"
run_ranks "$RUN_DIR/logs/slurm/job_$SLURM_JOB_ID" -m gdrt_ds.prepare "$@"
