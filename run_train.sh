#!/usr/bin/env bash
# Train: NGPU=8 CONFIG_FILE=my.toml LOG_RANK=0 ./run_train.sh --training.steps 10
#
#   NGPU           processes on this machine (default: the visible CUDA devices, else 1)
#   CONFIG_FILE    TOML file; a,b layers several; so does --job.config_file, given once for each
#                  (default: the embedded data set, train_configs/emoji_tiny.toml)
#   LOG_RANK       ranks of this machine whose output is shown, as 0 or 0,1 (default 0)
#   NNODES, RDZV_ENDPOINT    several machines: their number, and host:port of one of them
#   PYTHON         interpreter (default python3)
#
# All arguments are settings; --help lists them. Paths are relative to the folder it is called from; only the default
# run, which names the repository's own files, moves there first.
set -euo pipefail

PYTHON=${PYTHON:-python3}
NNODES=${NNODES:-1}
LOG_RANK=${LOG_RANK:-0}
for word in "$@"; do
    case $word in
        -h | --help) exec "$PYTHON" -m flux_trainer config "$@" ;;
        --job.config_file | --job.config_file=*) own_file=1 ;;
    esac
done
refuse() {
    echo "$1" >&2
    exit 2
}
for name in NGPU NNODES; do
    [[ ${!name:-1} =~ ^[1-9][0-9]{0,5}$ ]] || refuse "$name=${!name}: expected an integer >= 1"
done
[[ $LOG_RANK =~ ^[0-9]{1,6}(,[0-9]{1,6})*$ ]] || refuse "LOG_RANK=$LOG_RANK: expected ranks such as 0 or 0,1"
if [ "$NNODES" -gt 1 ] && [ -z "${RDZV_ENDPOINT:-}" ]; then
    refuse "NNODES=$NNODES machines need RDZV_ENDPOINT=HOST:PORT, the same on each of them: where they meet"
fi

if [ -z "${CONFIG_FILE:-}${own_file:-}" ]; then
    cd "$(dirname "${BASH_SOURCE[0]}")"
    CONFIG_FILE=./train_configs/emoji_tiny.toml
fi
if [ -n "${CONFIG_FILE:-}" ]; then
    set -- --job.config_file "$CONFIG_FILE" "$@"
fi

if [ -z "${NGPU:-}" ]; then
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        NGPU=$(printf '%s' "$CUDA_VISIBLE_DEVICES" | awk -F, '{ print NF }')
    else
        NGPU=$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU' || true)
    fi
    [ "${NGPU:-0}" -ge 1 ] || NGPU=1
fi

if [ "$NGPU" -gt 1 ]; then
    for rank in ${LOG_RANK//,/ }; do
        [ "$rank" -lt "$NGPU" ] || refuse "LOG_RANK=$LOG_RANK: this machine has the ranks 0 to $((NGPU - 1))"
    done
fi

# Mistakes in the settings are answered here, before torch is imported anywhere.
"$PYTHON" -m flux_trainer config --quiet --ngpu "$((NGPU * NNODES))" "$@"

# On a CPU, keep freed memory: glibc hands large blocks back to the system at once, and each step takes them anew.
if ! nvidia-smi -L >/dev/null 2>&1; then
    export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}
fi
# Less fragmentation where image sizes or phases (training, validation) alternate.
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF:-expandable_segments:True}
# The ranks get a store of their own: the launcher's keeps the addresses of ranks that died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=${TORCH_DISABLE_SHARE_RDZV_TCP_STORE:-1}
# Seconds between SIGTERM and SIGKILL, in which a checkpoint is written. The variable, not --shutdown-timeout:
# torch 2.11 knows neither (30 s there), and would refuse the flag.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# torchrun of the interpreter that made the check above, with a last word of its own.
launch=(--nnodes "$NNODES" --nproc_per_node "$NGPU" --rdzv_backend c10d --rdzv_id "${RDZV_ID:-flux_trainer}"
    --rdzv_endpoint "${RDZV_ENDPOINT:-localhost:0}")
if [ "$NGPU" -gt 1 ]; then
    # Output of several ranks needs a filter and prefixes; one alone keeps the terminal.
    launch+=(--local-ranks-filter "$LOG_RANK" --role rank --tee 3)
    # torchrun would give each process one thread; share the cores instead.
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    threads=$((cores / NGPU))
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
fi
exec "$PYTHON" -m flux_trainer.launch "${launch[@]}" -m flux_trainer.train "$@"
