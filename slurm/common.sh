# shellcheck shell=bash
# Shared by the batch scripts of this folder, which source it on the batch node: environment, checks, and
# the launch of the ranks.
# Every setting is an environment variable that starts with GDRT_ (docs/clusters.md lists them).

say() { printf 'gdrt: %s\n' "$*"; }

refuse() { # refuse PROBLEM FIX: the user's mistake, exit status 2
  printf 'error: %s\n  fix: %s\n' "$1" "$2" >&2
  exit 2
}

# ---- the code: a checkout, or scripts that `gdrt-init --slurm` wrote beside an installed wheel ---

# shellcheck disable=SC2034 # DEFAULT_CONFIG is read by the scripts that source this file
if [ -d "$GDRT_HOME/gdrt_ds" ]; then
  export PYTHONPATH="$GDRT_HOME${PYTHONPATH:+:$PYTHONPATH}"
  TRAINER=("$GDRT_HOME/gdrt_ds/train.py")
  DEFAULT_CONFIG=$GDRT_HOME/configs/quickstart.yaml
else
  # A folder eval/ of the user's must not hide the installed one (Python 3.11 and newer).
  export PYTHONSAFEPATH=1
  TRAINER=(-m gdrt_ds.train)
  DEFAULT_CONFIG=configs/quickstart.yaml
fi

# ---- the software: modules, a set-up file, a virtual environment or a container ------------------

load_modules() { # GDRT_MODULES: environment modules of the site
  [ -n "${GDRT_MODULES:-}" ] || return 0
  type module >/dev/null 2>&1 ||
    refuse "GDRT_MODULES = $GDRT_MODULES, but this node has no command \`module\`" \
      "source the site's module set-up in a file and name it in GDRT_SETUP"
  set +eu # module files are not written for strict shells
  # shellcheck disable=SC2086
  module load $GDRT_MODULES ||
    refuse "GDRT_MODULES: \`module load $GDRT_MODULES\` failed" "see \`module avail\`"
  set -eu
}

source_setup() { # GDRT_SETUP: a shell file of the user's
  [ -n "${GDRT_SETUP:-}" ] || return 0
  [ -f "$GDRT_SETUP" ] ||
    refuse "GDRT_SETUP = $GDRT_SETUP: no such file" "name a shell file that every node can read"
  set +eu
  # shellcheck disable=SC1090
  . "$GDRT_SETUP"
  set -eu
}

choose_python() { # sets PYTHON: the first that is named or found, in this order
  if [ -n "${GDRT_PYTHON:-}" ]; then
    PYTHON=$GDRT_PYTHON
  elif [ -n "${GDRT_CONTAINER:-}" ]; then
    PYTHON=python3
  elif [ -n "${GDRT_VENV:-}" ]; then
    PYTHON=$GDRT_VENV/bin/python
  elif [ -x "$GDRT_HOME/.venv/bin/python" ]; then
    PYTHON=$GDRT_HOME/.venv/bin/python
  elif [ -n "${VIRTUAL_ENV:-}" ]; then
    PYTHON=$VIRTUAL_ENV/bin/python
  elif [ -n "${CONDA_PREFIX:-}" ]; then
    PYTHON=$CONDA_PREFIX/bin/python
  else
    refuse "no Python environment: $GDRT_HOME/.venv does not exist, and none was active at submission" \
      "run \`make install\` in $GDRT_HOME, or set GDRT_VENV, GDRT_PYTHON or GDRT_CONTAINER"
  fi
  if [ -z "${GDRT_CONTAINER:-}" ] && ! command -v "$PYTHON" >/dev/null; then
    refuse "the Python interpreter $PYTHON does not exist on $(hostname)" \
      "check GDRT_VENV or GDRT_PYTHON; the path must exist on every node"
  fi
}

check_packages() { # the interpreter finds the project and what it needs; the large packages are not imported
  local complaint
  local probe='import gdrt_ds, yaml, pydantic
from importlib.util import find_spec
needed = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes")
missing = [name for name in needed if find_spec(name) is None]
if missing:
    raise SystemExit("missing packages: " + ", ".join(missing))'
  complaint=$("${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" -c "$probe" 2>&1) ||
    refuse "$PYTHON cannot run gdrt_ds on $(hostname): ${complaint##*$'\n'}" \
      "install the project into that environment (make install), or set GDRT_VENV"
}

prepare_environment() {
  export GDRT_HOME PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
  load_modules
  source_setup
  read -r -a GDRT_CONTAINER_WORDS <<< "${GDRT_CONTAINER:-}"
  choose_python
  check_packages
  say "python: ${GDRT_CONTAINER:+$GDRT_CONTAINER }$PYTHON"
}

# ---- the shape of the job: ranks and where they run ----------------------------------------------

expand_counts() { # "2(x3),1" -> "2 2 2 1"
  local part count times
  for part in ${1//,/ }; do
    count=${part%%(*}
    times=1
    if [[ $part == *x* ]]; then
      times=${part##*x}
      times=${times%)}
    fi
    while [ "$times" -gt 0 ]; do
      printf '%s ' "$count"
      times=$((times - 1))
    done
  done
}

# Sets NUM_NODES, RANKS, RANKS_PER_NODE (0: not the same on every node), CPUS_PER_RANK, STEP_OPTIONS,
# MASTER_ADDR and MASTER_PORT.
describe_job() {
  local -a tasks cpus
  local index share
  read -r -a tasks <<< "$(expand_counts "$SLURM_TASKS_PER_NODE")"
  read -r -a cpus <<< "$(expand_counts "$SLURM_JOB_CPUS_PER_NODE")"
  NUM_NODES=$SLURM_JOB_NUM_NODES
  RANKS=0
  RANKS_PER_NODE=${tasks[0]}
  CPUS_PER_RANK=0
  STEP_OPTIONS=()
  local gpus=${SLURM_GPUS_ON_NODE:-0}
  for ((index = 0; index < NUM_NODES; index++)); do
    # One rank per GPU, whatever the number of tasks that was asked for.
    [ "$gpus" -gt 0 ] && tasks[index]=$gpus
    RANKS=$((RANKS + tasks[index]))
    [ "${tasks[index]}" = "${tasks[0]}" ] || RANKS_PER_NODE=0
    share=$((cpus[index] / tasks[index]))
    if [ "$index" = 0 ] || [ "$share" -lt "$CPUS_PER_RANK" ]; then
      CPUS_PER_RANK=$share
    fi
  done
  [ "$gpus" -gt 0 ] && RANKS_PER_NODE=$gpus
  if [ "$CPUS_PER_RANK" = 0 ]; then
    say "warning: fewer CPUs than ranks on a node ($SLURM_JOB_CPUS_PER_NODE CPUs); ranks share cores." \
      "Ask for --ntasks-per-node=${RANKS_PER_NODE} --cpus-per-task=N"
    CPUS_PER_RANK=1
    STEP_OPTIONS=(--overcommit)
  fi
  [ "$RANKS_PER_NODE" -gt 0 ] && STEP_OPTIONS+=("--ntasks-per-node=$RANKS_PER_NODE")
  MASTER_ADDR=${GDRT_MASTER_ADDR:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
  # Another port in every life: a rank that survived its job must not meet the next life's ranks.
  MASTER_PORT=${GDRT_MASTER_PORT:-$((20000 + (SLURM_JOB_ID * 7 + ${SLURM_RESTART_COUNT:-0} * 101) % 10000))}
  export MASTER_ADDR MASTER_PORT
  if [ -n "${GDRT_INTERFACE:-}" ]; then
    export NCCL_SOCKET_IFNAME=$GDRT_INTERFACE GLOO_SOCKET_IFNAME=$GDRT_INTERFACE
  fi
  say "job $SLURM_JOB_ID: $RANKS rank(s) on $NUM_NODES node(s) ($SLURM_JOB_NODELIST)," \
    "${gpus} GPU(s) per node, $CPUS_PER_RANK CPU(s) per rank," \
    "rendezvous $MASTER_ADDR:$MASTER_PORT, interface ${GDRT_INTERFACE:-chosen by the library}"
}

# What check_nodes runs once on every node, with the arguments FOLDER PYTHON CONTAINER. It prints one line:
# name, number of GPUs, whether the folder is writable, whether the interpreter exists, the name's address.
# shellcheck disable=SC2016 # expanded on the node
NODE_PROBE='
gpus=${SLURM_STEP_GPUS:-${CUDA_VISIBLE_DEVICES:-${ROCR_VISIBLE_DEVICES:-}}}
IFS=, read -r -a list <<< "$gpus"
name=$(hostname)
probe=$1/.probe_$name
writable=no
{ : > "$probe" && rm -f "$probe"; } 2>/dev/null && writable=yes
python=no
{ [ -n "$3" ] || command -v "$2" >/dev/null; } && python=yes
address=$(getent hosts "$name" | { read -r a _; echo "${a:-none}"; })
echo "$name ${#list[@]} $writable $python $address"'

gpus_by_node() { # gpus_by_node REPORT: "node1 has 8,node2 has 4"
  sort <<< "$1" | sed 's/^\([^ ]*\) \([0-9]*\) .*/\1 has \2/' | paste -sd,
}

resolves_to_itself() { # resolves_to_itself ADDRESS: other nodes cannot reach a node under this address
  [[ $1 == 127.* ]] || [ "$1" = none ]
}

# check_nodes FOLDER: every node sees the folder and the interpreter, and has as many GPUs as the others
check_nodes() {
  local folder=$1 report
  report=$(srun --nodes="$NUM_NODES" --ntasks="$NUM_NODES" --ntasks-per-node=1 --cpus-per-task=1 \
    --export=ALL --kill-on-bad-exit=1 \
    bash -c "$NODE_PROBE" probe "$folder" "$PYTHON" "${GDRT_CONTAINER:-}") ||
    refuse "the nodes $SLURM_JOB_NODELIST could not start a step: $report" "see the messages of srun above"
  local name gpus writable python address first=""
  while read -r name gpus writable python address; do
    [ "$writable" = yes ] ||
      refuse "the run folder $folder is not writable on $name" \
        "put run.dir on a file system that all nodes share"
    [ "$python" = yes ] ||
      refuse "the Python interpreter $PYTHON does not exist on $name" \
        "put the environment on a file system that all nodes share"
    [ -n "$first" ] || first=$gpus
    [ "$gpus" = "$first" ] ||
      refuse "unequal GPUs per node: $(gpus_by_node "$report")" \
        "ask for --gpus-per-node=N instead of --gpus=N, so that every node has the same number"
    if [ "$NUM_NODES" -gt 1 ] && [ -z "${GLOO_SOCKET_IFNAME:-}" ] && resolves_to_itself "$address"; then
      say "warning: on $name its own name resolves to $address;" \
        "if ranks fail with \"Connection refused\", set GDRT_INTERFACE=<network interface>"
    fi
  done <<< "$(sort <<< "$report")"
}

# ---- the ranks -----------------------------------------------------------------------------------

# launch LOG_FOLDER COMMAND...: starts the ranks in the background; STEP_PID is srun, rank 0 is echoed here
launch() {
  local folder=$1
  shift
  mkdir -p "$folder"
  : >> "$folder/rank_0.log"
  export GDRT_RANK_LOGS=$folder
  srun --nodes="$NUM_NODES" --ntasks="$RANKS" --cpus-per-task="$CPUS_PER_RANK" "${STEP_OPTIONS[@]}" \
    --distribution=block --export=ALL --kill-on-bad-exit=1 --wait=60 \
    --open-mode=append --output="$folder/rank_%t.log" \
    bash "$GDRT_HOME/slurm/rank.sh" "${GDRT_CONTAINER_WORDS[@]}" "$PYTHON" "$@" &
  STEP_PID=$!
  tail --pid="$STEP_PID" -s 0.5 -n +1 -F "$folder/rank_0.log" 2>/dev/null &
  TAIL_PID=$!
}

await_step() { # waits for the step through any number of trapped signals; STEP_CODE is its exit status
  local code
  STEP_CODE=0
  while :; do
    SIGNALLED=0
    code=0
    wait "$STEP_PID" || code=$?
    [ "$code" = 127 ] || STEP_CODE=$code # 127: it had been collected just before the signal came
    [ "$SIGNALLED" = 1 ] || break
  done
  wait "$TAIL_PID" 2>/dev/null || true
}

# ---- the next life (gdrt.sh) ---------------------------------------------------------------------

describe_state() { # what Slurm thinks of this job: STATE, REASON
  local job
  STATE=RUNNING
  REASON=None
  job=$(scontrol -o show job "$SLURM_JOB_ID") || return 0
  if [[ $job =~ JobState=([A-Z_]+) ]]; then
    STATE=${BASH_REMATCH[1]}
  fi
  if [[ $job =~ Reason=([A-Za-z_]+) ]]; then
    REASON=${BASH_REMATCH[1]}
  fi
  if [[ $job =~ Restarts=([0-9]+) ]] && [ "${BASH_REMATCH[1]}" -gt "$RESTART" ]; then
    STATE=REPLACED # this life was cut off; another one has the job
  fi
}

# conclude STEP_CODE [--early]: asks lives.py what follows and does it, once; CODE is the job's exit status
conclude() {
  [ -z "$CODE" ] || return 0
  local ended code=$1 by_hand="go on by hand: sbatch slurm/gdrt.sh ${TRAIN[*]:${#TRAINER[@]}}"
  shift
  ended=$("${LIFE_TOOL[@]}" end --job "$SLURM_JOB_ID" --restart "$RESTART" --run-dir "$RUN_DIR" \
    --code "$code" --state "$STATE" --reason "$REASON" "$@") || exit $?
  eval "$ended" # VERDICT, CODE
  case $VERDICT in
    requeue) scontrol requeue "$SLURM_JOB_ID" || say "Slurm refused to requeue; $by_hand" ;;
    hold) scontrol requeuehold "$SLURM_JOB_ID" || say "Slurm refused to hold the job; $by_hand" ;;
  esac
}

# ---- work that starts anew when the job is requeued (eval.sh, prepare.sh) ------------------------

# shellcheck disable=SC2317,SC2329 # called by the trap
requeue_this_job() {
  SIGNALLED=1 # tells await_step why `wait` returned
  local allowed=${GDRT_MAX_REQUEUES:-20}
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "$allowed" ]; then
    say "asked to stop: the job requeues itself"
    scontrol requeue "$SLURM_JOB_ID"
  else
    say "asked to stop, and $allowed requeues are used up (GDRT_MAX_REQUEUES)"
  fi
}

requeue_on_warning() { # before the time limit: the job leaves and comes back, GDRT_MAX_REQUEUES times at most
  trap requeue_this_job USR1
}

run_ranks() { # run_ranks LOG_FOLDER COMMAND...
  launch "$@"
  await_step
  if [ "$STEP_CODE" != 0 ]; then
    say "a rank failed (exit status $STEP_CODE); logs of every rank: $1"
    exit "$STEP_CODE"
  fi
}
