#!/usr/bin/env bash
# QLoRA: LoRA on 4-bit base weights, for cards of 8 GB. Environment and arguments as for run.sh.
#     MODEL=Qwen/Qwen2.5-3B bash deepspeed_pt/run_qlora.sh --data text/ --batch_size 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --train_bnb_enabled True "$@"
