#!/usr/bin/env bash
# Full fine-tuning: every weight is trained. Environment and arguments as for run.sh.
#     MODEL=Qwen/Qwen2.5-0.5B NUM_GPUS=2 bash deepspeed_ft/run_full.sh --zero_stage 3 --offload optimizer
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --tuner full "$@"
