#!/usr/bin/env bash
# Every weight is trained, embeddings too, as a larger vocabulary needs. Environment and arguments as for run.sh.
#     MODEL=Qwen/Qwen2.5-0.5B NUM_GPUS=2 bash deepspeed_pt/run_full.sh --data text/ --zero_stage 3 --offload optimizer
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" --tuner full "$@"
