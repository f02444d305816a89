#!/usr/bin/env bash
# LoRA fine-tuning. Further arguments go to train.py (python deepspeed_ft/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B DATA_DIR=data NUM_GPUS=2 bash deepspeed_ft/run.sh --epochs 3
# Several GPUs or nodes: see utils/train/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/train/launch.sh"
launch deepspeed_ft/train.py --model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" --data_dir "${DATA_DIR:-data}" "$@"
