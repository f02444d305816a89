#!/usr/bin/env bash
# Distillation with LoRA. Further arguments go to train.py (python deepspeed_distill/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B TEACHER=deepseek-chat NUM_GPUS=2 bash deepspeed_distill/run.sh --epochs 3
# Several GPUs or nodes: see utils/train/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/train/launch.sh"
launch deepspeed_distill/train.py \
    --student_model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" --teacher_model_name "${TEACHER:-deepseek-chat}" "$@"
