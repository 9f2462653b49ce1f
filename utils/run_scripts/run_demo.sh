#!/bin/sh
# The recipe in miniature, on rendered videos: MAE and alignment without real people, then a "real" domain.
#   sh utils/run_scripts/run_demo.sh [overrides of every stage]        DEMO=DIR of the runs (default: demo), DATA=DIR of the videos
# MINUTES=60 renders more figures to learn from, for a run of about 60 minutes on two cores; the default is 6.
# DEMO_DATA_ARGS=--quick renders only a few videos: enough to test that everything runs, too few to learn from.
set -eu
cd "$(dirname "$0")/../.."
DEMO=${DEMO:-demo}
DATA=${DATA:-$DEMO/data}
MINUTES=${MINUTES:-6} # all but two go with the number of drawn figures: rendering, stage 1 and alignment
case $MINUTES in [1-9] | [1-9][0-9] | [1-9][0-9][0-9]) ;; *) MINUTES=0 ;; esac
[ "$MINUTES" -gt 2 ] || { echo "MINUTES must be a whole number from 3 to 999." >&2; exit 2; }
start_time=$(date +%s)
# glibc keeps freed memory instead of returning it to the kernel: steps on a CPU take a sixth less (docs/performance.md).
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=34359738368
export OMP_NUM_THREADS=1 # a model this small is slower with more, beside its data worker

# stage NAME EXPERIMENT RECIPE START DESCRIPTION [overrides]: one run in $DEMO/NAME, starting from other run directories or null.
stage() {
    name=$1 experiment=$2 recipe=$3 start=$4
    printf '\n== %s: %s\n' "$name" "$5"
    shift 5
    python train_app_submitit.py "+experiments=demo/$experiment" "+trainer=$recipe" "data_root=$DATA" \
        "pretrained_checkpoint_path=$start" "launcher.experiment_log_dir=$DEMO/$name" "$@"
}

# part NUMBER WHAT: say what begins, and after how long.
part() { printf '\n== Part %s of 5, after %s: %s\n' "$1" "$(elapsed)" "$2"; }
elapsed() { seconds=$(($(date +%s) - start_time)) && echo "$((seconds / 60)) min $((seconds % 60)) s"; }

# A run keeps one core busy, so runs that do not need one another go side by side.
# beside NAME COMMAND...: start a command whose output is shown later, by `finish`.
beside() {
    log=$DEMO/$1.log names="$names $1"
    echo "Beside it: $1, whose output comes at the end of this part (until then in $log)"
    shift
    "$@" > "$log" 2>&1 &
    running="$running $!"
}
names='' running=''

# finish: wait for these commands and show what they said. Fails if one of them failed.
finish() {
    failed=0
    for process in $running; do wait "$process" || failed=$?; done
    running=''
    for name in $names; do cat "$DEMO/$name.log"; done
    names=''
    return $failed
}

# Processes in the background do not see Ctrl-C. On SIGTERM a run saves and stops.
stop() { for process in $running; do kill $(pgrep -P "$process") "$process" 2>/dev/null || :; done; }
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

mkdir -p "$DEMO"
part 1 "render videos"
omnivision demo-data "$DATA" ${DEMO_DATA_ARGS:---synthetic $((125 * (MINUTES - 2)))}

part 2 "stage 1"
beside scratch stage scratch finetune mae_ft_demo_config null \
    "fine-tune a random trunk on the target, which stands for real people" "$@"
stage mae mae mae_demo_config null \
    "pretrain a masked autoencoder on videos without real people, without labels" "$@"
finish

part 3 "alignment"
beside align_nohuman stage align_nohuman align mae_ft_demo_nohuman_config "$DEMO/mae" \
    "align another copy with the labels of scenes without a person" epochs=10 "$@"
beside finetune_mae stage finetune_mae finetune mae_ft_demo_config "$DEMO/mae" \
    "fine-tune the masked autoencoder's trunk" "$@"
stage align_synthetic align mae_ft_demo_synthetic_config "$DEMO/mae" \
    "align its trunk with the labels of drawn figures" "$@"
finish

part 4 "the target"
beside probe stage probe probe mae_ft_demo_config "$DEMO/align_synthetic" \
    "train a linear head on the frozen aligned trunk" "$@"
beside average stage average average mae_ft_demo_config "[$DEMO/align_synthetic,$DEMO/align_nohuman]" \
    "train a linear head on a learned average of both aligned trunks" "$@"
stage finetune finetune mae_ft_demo_config "$DEMO/align_synthetic" \
    "fine-tune the aligned trunk" "$@"
finish

part 5 "what are the frozen trunks worth on the target, and what do the models look at?"
for run in align_synthetic align_nohuman finetune; do
    beside "xray_$run" omnivision xray "$DEMO/$run" --clips 1 --crops 1 --workers 1
done
omnivision probe "$DEMO/mae" random "$DEMO/align_synthetic" "$DEMO/align_nohuman" --data target --crops 1 --workers 1
finish

echo
omnivision runs --top1 "$DEMO"
python -m omnivision_demo.report "$DEMO"
cat <<END

The demo took $(elapsed). Look at
  $DEMO/report.html: what was trained, what it learned and looks at, and all results (open it in a browser)
  $DEMO/*/summary.json and logs/metrics.jsonl: the metrics of each run
  tensorboard --logdir $DEMO
Stop it with Ctrl-C and run it again to see it resume. To start from scratch: make demo DEMO=another_folder
docs/demo.md describes the expected results and how much they vary.
END
