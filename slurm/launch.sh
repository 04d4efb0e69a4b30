#!/usr/bin/env bash
# One job of megatron_r1, whatever it runs: which nodes do what, how they are started, and what happens when it ends.
#
#   launch.sh RECIPE WORDS...              a stage: WORDS are those of `megatron-r1 run RECIPE WORDS`
#   launch.sh evaluate WORDS...            `megatron-r1 evaluate WORDS`
#   launch.sh task COMMAND WORDS...        one process on one node, such as a conversion
#
# A job script of this folder calls it from inside the allocation, in the folder that the job was submitted from. Sites
# set what is theirs (account, partition, image, network) in slurm/site.sh, which is not in the repository, or in the
# environment; the variables are below. docs/cluster.md tells the rest.
#
# Ends with 0: done. 2: refused before or at the start (configuration, nodes, folders), not requeued. Anything else is
# requeued: when the time limit was near, always; a failure (a killed rank, 75 after a deadline that passed), at most
# MAX_FAILURES times without a step forward.
set -euo pipefail
: "${SLURM_JOB_ID:?launch.sh runs inside a job: sbatch slurm/grpo_671b.sh}"
[ $# -gt 0 ] || { echo "launch.sh: name a recipe" >&2; exit 2; }

# shellcheck source=/dev/null
[ ! -r slurm/site.sh ] || . slurm/site.sh

GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-8}} # slots of a node; on CPU nodes the processes of a node
PYTHON=${PYTHON:-python3}                    # in the container, or of VENV
VENV=${VENV:-}                               # a virtual environment, instead of a container
CONTAINER_IMAGE=${CONTAINER_IMAGE:-}         # a squashfs/registry image (pyxis) or a .sif file (apptainer)
CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-}       # more folders to mount, a:a,b:b; the submit folder always is
NETWORK_INTERFACE=${NETWORK_INTERFACE:-}     # interface for rendezvous and HTTP between nodes, such as ib0
MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
MAX_FAILURES=${MAX_FAILURES:-3}
STOP_SECONDS=${STOP_SECONDS:-60}             # from SIGTERM to SIGKILL for what is still running at the end
GRACE_SECONDS=${GRACE_SECONDS:-720}          # from the warning before the time limit to the end of ranks that go on
PREFLIGHT_SECONDS=${PREFLIGHT_SECONDS:-900}  # for all nodes to report, while the container image is pulled
FOLLOW_SECONDS=${FOLLOW_SECONDS:-15}         # after one rank failed, the others are given this long to say how they did
export FOLLOW_SECONDS

# ---------------------------------------------------------------------------------------------------------- network
# Every setting of NCCL and of the links between GPUs and nodes, in this one place. What is set already stays.
network_settings() {
    if [ -n "$NETWORK_INTERFACE" ]; then
        export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-$NETWORK_INTERFACE}   # NCCL's bootstrap; data goes over IB
        export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-$NETWORK_INTERFACE}
        export MEGATRON_R1_INTERFACE=$NETWORK_INTERFACE
    fi
    export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
    export NCCL_IB_TIMEOUT=${NCCL_IB_TIMEOUT:-22}                # 4.096 us * 2^22: a congested fabric is not a failure
    export NCCL_IB_QPS_PER_CONNECTION=${NCCL_IB_QPS_PER_CONNECTION:-2}   # all-to-all over several switch paths
    export NCCL_NVLS_ENABLE=${NCCL_NVLS_ENABLE:-0}               # NVLink SHARP buffers cost memory that 671B needs
    export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}   # a lost peer ends the rank
    export TORCH_NCCL_AVOID_RECORD_STREAMS=${TORCH_NCCL_AVOID_RECORD_STREAMS:-1}
    export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}   # Megatron orders its overlaps by it
    # NCCL_IB_HCA and NCCL_IB_GID_INDEX (RoCE) differ from site to site: set them in slurm/site.sh.
}

# ------------------------------------------------------------------------------------------------------------- runtime
# `runtime` holds the words that go between srun and python: a container, a virtual environment, or nothing.
runtime=()
container=()
runtime_settings() {
    if [ -n "$CONTAINER_IMAGE" ] && [ "${CONTAINER_IMAGE%.sif}" != "$CONTAINER_IMAGE" ]; then
        runtime=(apptainer exec --nv --bind "$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}" --pwd "$PWD" "$CONTAINER_IMAGE")
    elif [ -n "$CONTAINER_IMAGE" ]; then
        container=("--container-image=$CONTAINER_IMAGE" "--container-workdir=$PWD" --no-container-mount-home
            "--container-mounts=$PWD:$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}")
    elif [ -n "$VENV" ]; then
        PYTHON=$VENV/bin/python
    fi
    export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false OMP_WAIT_POLICY=PASSIVE PYTHONUNBUFFERED=1
    # glibc otherwise returns large tensors to the kernel and pays page faults for them at every step.
    export MALLOC_MMAP_THRESHOLD_=$((1 << 30)) MALLOC_TRIM_THRESHOLD_=$((1 << 34))
}

# Around each task: its exit status, however it ended, is left in exit/, because srun tells only the highest of all.
# shellcheck disable=SC2016  # expanded where the task runs
around='trap ended=1 TERM; "$@"; status=$?
[ "$status" -eq 0 ] || { echo "$status" >"$MEGATRON_R1_JOB/exit/$SLURM_STEP_ID.$SLURM_PROCID"; [ "${ended:-}" ] || sleep "$FOLLOW_SECONDS"; }
exit "$status"'

# step NAME NODES FIRST TASKS WORDS...: an srun step on NODES nodes of the job from node FIRST on. Its output goes to
# NAME-TASK.log. --kill-on-bad-exit: what ends one task ends them all.
step() {
    local name=$1 nodes=$2 first=$3 tasks=$4
    local per_node=$(((tasks + nodes - 1) / nodes))
    local cpus=$((${SLURM_CPUS_ON_NODE:-1} / per_node))
    shift 4
    exec srun --nodes="$nodes" --relative="$first" --ntasks="$tasks" --ntasks-per-node="$per_node" \
        --cpus-per-task=$((cpus > 0 ? cpus : 1)) --mem=0 --overlap --cpu-bind=none --kill-on-bad-exit=1 \
        --job-name="$name" --open-mode=append --output="$attempt/$name-%t.log" \
        ${container[@]+"${container[@]}"} bash -c "$around" around ${runtime[@]+"${runtime[@]}"} "$@"
}

say() { echo "$(date '+%F %T') launch: $*"; }

# --------------------------------------------------------------------------------------------------------------- ends
trainers='' servers='' preempted='' run_dir=''
# shellcheck disable=SC2317  # called by trap
on_usr1() {
    say "SIGUSR1: the time limit is near; asking the ranks to finish the step and write a checkpoint"
    [ -n "$preempted" ] || preempted=$SECONDS
}
# shellcheck disable=SC2317  # called by trap
on_term() {
    say "SIGTERM: ending the job"
    stop_step "$trainers"
    stop_step "$servers"
    exit 143
}

# stop_step PID: SIGTERM to the tasks of an srun, SIGKILL when they do not heed it.
stop_step() {
    [ -n "$1" ] && kill -0 "$1" 2>/dev/null || return 0
    kill -TERM "$1" 2>/dev/null || true
    for _ in $(seq $((STOP_SECONDS * 5))); do
        kill -0 "$1" 2>/dev/null || return 0
        sleep 0.2
    done
    kill -KILL "$1" 2>/dev/null || true
}

# ask_to_end: ask the ranks to finish the step, write a checkpoint and end. By a file in the run folder: a signal through
# srun would reach every process below the ranks, vLLM and graders too. Again and again, since a run that just begins
# takes such a file for an older one's. What has not ended GRACE_SECONDS after the warning, or cannot be asked, is ended;
# it goes on from its last checkpoint.
ask_to_end() {
    [ -n "$preempted" ] || return 0
    if [ -n "$run_dir" ] && [ $((SECONDS - preempted)) -lt "$GRACE_SECONDS" ]; then
        [ ! -e "$run_dir/run.json" ] || touch "$run_dir/stop"
    else
        stop_step "$trainers"
    fi
}

# wait_for PID: its exit status, through the signals that we trap.
wait_for() {
    local status
    while true; do
        status=0
        wait "$1" || status=$?
        kill -0 "$1" 2>/dev/null || return "$status"
    done
}

# exit_status STATUS: why the step ended. The highest status of all tasks is often that of one that was ended with the
# others; 2 (refused) and 75 (start again) are reasons.
exit_status() {
    local reason
    for reason in 2 75; do
        if grep -qsx "$reason" "$attempt"/exit/*; then
            echo "$reason"
            return
        fi
    done
    echo "$1"
}

# progress: the phase and step of the last heartbeat; nothing if there is none.
progress() { grep -oE '"(phase|step)": *("[^"]*"|[0-9]+)' "${run_dir:-.}/heartbeat.json" 2>/dev/null | tr -d '\n' || true; }

# failures_in_a_row STATUS: add this failure to the job's list and print how many there were since it last got further.
failures_in_a_row() {
    local here last
    here=$(progress)
    last=$(tail -n 1 "$folder/failures" 2>/dev/null | cut -d'|' -f2 || true)
    [ -z "$here" ] || [ "$here" = "$last" ] || : >"$folder/failures"
    echo "$(date '+%F %T') attempt $restarts status $1|$here" >>"$folder/failures"
    wc -l <"$folder/failures"
}

# requeue WHY never returns: the job is put back in the queue under the same number, and its next attempt goes on from the last
# checkpoint. 75 is for clusters with RequeueExit=75, where a user may not requeue.
requeue() {
    say "$1: requeued"
    scontrol requeue "$SLURM_JOB_ID" || exit 75
    sleep 300 # Slurm ends this script
    exit 75
}

finish() {
    local status failures
    status=$(exit_status "$1")
    [ "$status" -ne 0 ] || { say "done"; exit 0; }
    # Before 2: a conversion that is stopped ends with it, and goes on where it was.
    if [ -n "$preempted" ] && [ -n "$trainers" ]; then
        requeue "ended with status $status before the time limit"
    fi
    if [ "$status" -eq 2 ]; then
        say "refused: the configuration, the nodes or a folder must be mended first (not requeued)"
        exit 2
    fi
    failures=$(failures_in_a_row "$status")
    if [ "$failures" -le "$MAX_FAILURES" ]; then
        requeue "failed with status $status, $failures time(s) in a row of at most $MAX_FAILURES"
    fi
    say "failed with status $status, $failures times in a row: given up; mend it and submit again"
    exit "$status"
}

# --------------------------------------------------------------------------------------------------------------- main
restarts=${SLURM_RESTART_COUNT:-0}
folder=$PWD/logs/$SLURM_JOB_ID
attempt=$folder/$restarts
mkdir -p "$folder"
echo "logs: $folder"
exec >>"$folder/job.log" 2>&1
rm -rf "$attempt"
mkdir -m 700 "$attempt" # tokens and the ranks' meeting place
mkdir "$attempt"/{nodes,exit,stores}
export MEGATRON_R1_PREFLIGHT_SECONDS=$PREFLIGHT_SECONDS
export MEGATRON_R1_JOB=$attempt MEGATRON_R1_SLOTS_PER_NODE=$GPUS_PER_NODE MEGATRON_R1_MASTER_PORT=$MASTER_PORT
MEGATRON_R1_NODELIST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
export MEGATRON_R1_NODELIST
say "job $SLURM_JOB_ID, attempt $restarts, on $MEGATRON_R1_NODELIST: $*"
if [[ ! $PREFLIGHT_SECONDS =~ ^[1-9][0-9]*$ ]]; then
    say "PREFLIGHT_SECONDS is '$PREFLIGHT_SECONDS'; it must be whole seconds above 0, such as 900"
    exit 2
fi
network_settings
runtime_settings
trap on_usr1 USR1
trap on_term TERM

# attend: until the ranks have ended, and finish. Whatever ends first ends the other: ranks without servers could only
# wait.
attend() {
    local status=0
    while kill -0 "$trainers" 2>/dev/null; do
        ask_to_end
        if [ -n "$servers" ] && ! kill -0 "$servers" 2>/dev/null; then
            say "the servers' step has ended: ending the ranks"
            stop_step "$trainers"
        fi
        sleep 1 &
        wait $! || true
    done
    wait_for "$trainers" || status=$?
    stop_step "$servers"
    finish "$status"
}

if [ "$1" = task ]; then
    shift
    (step task 1 0 1 "$@") &
    trainers=$!
    attend
fi

command=(run)
words=("$@")
[ "$1" != evaluate ] || { command=(evaluate); words=("${@:2}"); }
main=("$PYTHON" -m megatron_r1)

# Checks on every node, by the first of them; it also says which node does what.
say "preflight: up to $PREFLIGHT_SECONDS s for all nodes to report; output: $attempt/preflight-0.log"
(step preflight "$SLURM_JOB_NUM_NODES" 0 "$SLURM_JOB_NUM_NODES" "${main[@]}" preflight "$@") &
status=0
wait_for $! || status=$?
cat "$attempt/preflight-0.log" 2>/dev/null || true
if [ "$status" -ne 0 ] && grep -qs 'megatron-r1: preflight:' "$attempt/preflight-0.log"; then
    status=2
fi
[ "$status" -eq 0 ] || finish "$status"
[ -z "$preempted" ] || finish 75 # the limit is too near to begin
while IFS='=' read -r name value; do
    case $name in
    world_size | trainer_nodes | first_server_node | server_nodes | threads | run_dir | done) declare "$name=$value" ;;
    esac
done <"$attempt/roles"
# shellcheck disable=SC2154  # read from the file
if [ "$done" = 1 ]; then
    say "this run is finished: nothing to do"
    exit 0
fi

# shellcheck disable=SC2154
if [ "$server_nodes" -gt 0 ]; then
    say "servers on $server_nodes node(s) from node $first_server_node on"
    (step servers "$server_nodes" "$first_server_node" "$server_nodes" "${main[@]}" serve "$@") &
    servers=$!
fi
# shellcheck disable=SC2154
say "$world_size rank(s) on $trainer_nodes node(s); output: $attempt/ranks-0.log"
(OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} step ranks "$trainer_nodes" 0 "$world_size" "${main[@]}" "${command[@]}" "${words[@]}") &
trainers=$!

attend
