#!/bin/sh
# Stage 3: linear probing on an action-recognition set; the trunk stays as it is.
# As published; change with the environment variables below, and Hydra overrides as arguments:
#   PRETRAINED_CHECKPOINT=RUN EXP_DIR=FOLDER sh utils/run_scripts/run_downstream_lp.sh [overrides]
# Here instead of on a cluster: submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

DATASET=${DATASET:-ucf101} # ucf101, hmdb51, diving48, minissv2, ikea, uav, k150, inpk150, sim150 or inpk150_sim150
MODEL=${MODEL:-vitbase_ft}
BATCH_SIZE=${BATCH_SIZE:-8} # clips of a step on each node
NUM_NODES=${NUM_NODES:-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NOMINAL_BATCH=${NOMINAL_BATCH:-32} # global batch that the learning rate of the recipe is for
EPOCHS=${EPOCHS:-30}
NUM_WORKERS=${NUM_WORKERS:-6} # of each process
need EXP_DIR 'the folder of the run'
need PRETRAINED_CHECKPOINT 'the run folder or checkpoint of stage 1 or 2, or null to probe a randomly initialised trunk'

train omnimae/omnimain_train_video_lp "mae_ft_${DATASET}_config" "pretrained_checkpoint_path=$PRETRAINED_CHECKPOINT" "$@"
