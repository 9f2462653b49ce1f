#!/bin/sh
# The recipe in miniature, on films that it draws: MAE and alignment without real people, then "real" ones, with and without.
#   sh utils/run_scripts/run_demo.sh [overrides of every stage]        DEMO=folder (default: demo), DATA=folder of the films
# DEMO_DATA_ARGS=--quick draws a few films only: enough to see that everything runs, not to learn from.
set -eu
cd "$(dirname "$0")/../.."
DEMO=${DEMO:-demo}
DATA=${DATA:-$DEMO/data}
began=$(date +%s)

# stage NAME EXPERIMENT RECIPE START WHAT [overrides]: one run in the folder NAME, starting from other folders or null.
stage() {
    name=$1 experiment=$2 recipe=$3 start=$4
    printf '\n== %s: %s\n' "$name" "$5"
    shift 5
    python train_app_submitit.py "+experiments=demo/$experiment" "+trainer=$recipe" "data_root=$DATA" \
        "pretrained_checkpoint_path=$start" "launcher.experiment_log_dir=$DEMO/$name" "$@"
}

omnivision demo-data "$DATA" ${DEMO_DATA_ARGS:-}

stage mae mae mae_demo_config null \
    "a masked autoencoder learns from films without real people, without labels" "$@"
stage align_synthetic align mae_ft_demo_synthetic_config "$DEMO/mae" \
    "its trunk is aligned with the labels of drawn figures" "$@"
stage align_nohuman align mae_ft_demo_nohuman_config "$DEMO/mae" \
    "another copy of it, with those of scenes without a person" epochs=4 "$@"

stage scratch finetune mae_ft_demo_config null \
    "the target, which stands for real people: a randomly initialised trunk is fine-tuned" "$@"
stage finetune_mae finetune mae_ft_demo_config "$DEMO/mae" \
    "the masked autoencoder's trunk is fine-tuned" "$@"
stage finetune finetune mae_ft_demo_config "$DEMO/align_synthetic" \
    "the aligned trunk is fine-tuned" "$@"
stage probe probe mae_ft_demo_config "$DEMO/align_synthetic" \
    "the aligned trunk stays as it is, a linear head is trained" "$@"
stage average average mae_ft_demo_config "[$DEMO/align_synthetic,$DEMO/align_nohuman]" \
    "a learned average of both aligned trunks, and a linear head" "$@"

echo
omnivision runs --top1 "$DEMO"
cat <<END

The demo took $((($(date +%s) - began) / 60)) min $((($(date +%s) - began) % 60)) s. Look at
  $DEMO/mae/pictures/last.png: a film, what the autoencoder saw of it, and what it made of that (last.gif moves)
  $DEMO/finetune/pictures/confusion_target.png: which action is taken for which
  $DEMO/*/summary.json and logs/metrics.jsonl: how each run went
  tensorboard --logdir $DEMO
Stop it with Ctrl-C and run it again to see it go on; a new folder starts anew: make demo DEMO=another_folder
docs/demo.md tells what to expect, and how far it varies.
END
