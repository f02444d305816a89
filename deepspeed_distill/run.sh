#!/usr/bin/env bash
# Distillation with LoRA. Further arguments go to train.py (python deepspeed_distill/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B TEACHER=deepseek-chat NUM_GPUS=2 bash deepspeed_distill/run.sh --epochs 3
# Several nodes: HOSTFILE=hosts bash deepspeed_distill/run.sh   (lines such as `node1 slots=8`; needs pdsh and ssh)
# LAUNCHER_ARGS are further arguments of DeepSpeed's launcher (deepspeed --help), which takes all GPUs if NUM_GPUS is
# not given. Two nodes without ssh, the first line on node1 and the second on node2:
#     HOSTFILE=hosts LAUNCHER_ARGS="--no_ssh --node_rank 0 --master_addr node1" bash deepspeed_distill/run.sh
#     HOSTFILE=hosts LAUNCHER_ARGS="--no_ssh --node_rank 1 --master_addr node1" bash deepspeed_distill/run.sh
set -euo pipefail
if [ -n "${HOSTFILE:-}" ]; then
    # DeepSpeed would go on without it, on this machine alone.
    if [ ! -f "$HOSTFILE" ]; then
        echo "HOSTFILE: no file $HOSTFILE, expected one with lines such as \`node1 slots=8\`." >&2
        echo "Correct its path and run this again, or leave HOSTFILE out to train on this machine alone." >&2
        exit 1
    fi
    HOSTFILE="$(realpath "$HOSTFILE")"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v deepspeed >/dev/null; then source ./setup_env.sh; fi

launcher=(python)
if [ -n "${HOSTFILE:-}${LAUNCHER_ARGS:-}" ] || [ "${NUM_GPUS:-1}" != 1 ]; then
    # LAUNCHER_ARGS without quotes: it is several words.
    launcher=(deepspeed ${HOSTFILE:+--hostfile "$HOSTFILE"} ${NUM_GPUS:+--num_gpus "$NUM_GPUS"} ${LAUNCHER_ARGS:-})
fi
exec "${launcher[@]}" deepspeed_distill/train.py \
    --student_model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" --teacher_model_name "${TEACHER:-deepseek-chat}" "$@"
