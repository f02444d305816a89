#!/usr/bin/env bash
# LoRA fine-tuning. Further arguments go to train.py (python deepspeed_ft/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B DATA_DIR=data NUM_GPUS=2 bash deepspeed_ft/run.sh --epochs 3
# Several nodes: HOSTFILE=hosts bash deepspeed_ft/run.sh   (lines such as `node1 slots=8`; needs pdsh and ssh)
set -euo pipefail
if [ -n "${HOSTFILE:-}" ]; then HOSTFILE="$(realpath "$HOSTFILE")"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if ! command -v deepspeed >/dev/null; then source ./setup_env.sh; fi

launcher=(python)
if [ -n "${HOSTFILE:-}" ]; then
    launcher=(deepspeed --hostfile "$HOSTFILE" ${NUM_GPUS:+--num_gpus "$NUM_GPUS"})
elif [ "${NUM_GPUS:-1}" != 1 ]; then
    launcher=(deepspeed --num_gpus "$NUM_GPUS")
fi
exec "${launcher[@]}" deepspeed_ft/train.py \
    --model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" --data_dir "${DATA_DIR:-data}" "$@"
