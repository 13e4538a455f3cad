#!/usr/bin/env bash
# The paper's setting as far as it is known: see README.md. 8 GPUs, one node. Not yet run on a GPU.
#   POOL=dapo.parquet VAL=val.jsonl ANSWERS=answers.jsonl MODEL=.../Qwen3-4B-Base \
#       bash recipes/dapo_math_qwen3_4b/run.sh runs/dapo
set -euo pipefail

RUN=${1:?the run directory}
here=$(cd "$(dirname "$0")" && pwd)
: "${POOL:?prompts in columns prompt and data_source}" "${MODEL:?a folder with Qwen3-4B-Base}"
: "${VAL:?validation prompts with their label}" "${ANSWERS:?pt_id and label, for the oracle alone}"

# Each stage can be killed and run again.
annotate() {  # what
    pivottrace annotate export "$RUN" "$RUN/queue/$1.jsonl" --what "$1"
    # The oracle plays the annotator; people would fill the exported file instead.
    pivottrace annotate fill "$RUN/queue/$1.jsonl" "$RUN/queue/$1-filled.jsonl" --answers "$ANSWERS"
    pivottrace annotate import "$RUN" "$RUN/queue/$1-filled.jsonl" --annotator oracle
}

pivottrace init "$RUN" --pool "$POOL" --model "$MODEL" --val "$VAL" --answers math
pivottrace score "$RUN" --rollouts 8 --max-prompt-tokens 1024 --max-tokens 8192
pivottrace probe "$RUN"
annotate probes
# 29.3% of the pool may be bought, probes included.
prompts=$(python -c "import json, sys; print(json.load(open(sys.argv[1]))['pool']['n_prompts'])" \
    "$RUN/manifest.json")
pivottrace triage "$RUN" --budget $((prompts * 293 / 1000))
annotate queue
pivottrace train "$RUN" --steps "${STEPS:-200}" --batch-size 128 --rollouts 8 \
    --learning-rate 1e-6 --val-samples 4 --save-every 20 --gpus-per-node 8 --nodes 1 \
    "hydra.searchpath=[pkg://verl.trainer.config,file://$here/config]" \
    +recipe=dapo_math_qwen3_4b trainer.test_freq=20 "${@:2}"
pivottrace report "$RUN"
