#!/usr/bin/env bash
# Preference optimisation with LoRA. Further arguments go to train.py (python deepspeed_dpo/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B DATA_PATH=pairs.jsonl NUM_GPUS=2 bash deepspeed_dpo/run.sh --epochs 3
# Several GPUs or nodes: see utils/train/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/train/launch.sh"
launch deepspeed_dpo/train.py \
    --model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" --data_path "${DATA_PATH:-deepspeed_dpo/data}" "$@"
