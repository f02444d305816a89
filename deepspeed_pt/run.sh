#!/usr/bin/env bash
# Continued pre-training with LoRA. Further arguments go to train.py (python deepspeed_pt/train.py --help).
#     MODEL=Qwen/Qwen2.5-0.5B NUM_GPUS=2 bash deepspeed_pt/run.sh --data text/
# Several GPUs or nodes: see utils/train/launch.sh.
source "$(dirname "${BASH_SOURCE[0]}")/../utils/train/launch.sh"
launch deepspeed_pt/train.py --model_name "${MODEL:-Qwen/Qwen2.5-0.5B}" "$@"
