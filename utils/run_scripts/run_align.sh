#!/bin/sh
# Stage 2: alignment, the supervised training of a pretrained trunk on videos without real people.
# Defaults as published; change them with the environment variables below, and with Hydra overrides as arguments:
#   PRETRAINED_CHECKPOINT=RUN EXP_DIR=DIR sh utils/run_scripts/run_align.sh [overrides]
# Without a cluster: submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

DATASET=${DATASET:-inpk150} # ucf101, hmdb51, diving48, minissv2, ikea, uav, k150, inpk150, sim150 or inpk150_sim150
MODEL=${MODEL:-vitbase_ft}
BATCH_SIZE=${BATCH_SIZE:-16} # clips per step on each node
NUM_NODES=${NUM_NODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NOMINAL_BATCH=${NOMINAL_BATCH:-256} # global batch that the recipe's learning rate is tuned for
EPOCHS=${EPOCHS:-50}
NUM_WORKERS=${NUM_WORKERS:-6} # per rank
need EXP_DIR 'the run directory'
need PRETRAINED_CHECKPOINT 'the run directory or checkpoint of stage 1, or null for random weights'

train omnimae/omnimain_train_video_ft "mae_ft_${DATASET}_config" "pretrained_checkpoint_path=$PRETRAINED_CHECKPOINT" "$@"
