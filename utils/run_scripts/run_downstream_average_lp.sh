#!/bin/sh
# Stage 3: linear probing of a learned average of several checkpoints.
# Defaults as published; change them with the environment variables below, and with Hydra overrides as arguments:
#   PRETRAINED_CHECKPOINT="[RUN,RUN]" EXP_DIR=DIR sh utils/run_scripts/run_downstream_average_lp.sh [overrides]
# Without a cluster: submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

DATASET=${DATASET:-ucf101} # ucf101, hmdb51, diving48, minissv2, ikea, uav, k150, inpk150, sim150 or inpk150_sim150
MODEL=${MODEL:-vitbase_average_ft}
BATCH_SIZE=${BATCH_SIZE:-8} # clips per step on each node
NUM_NODES=${NUM_NODES:-4}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NOMINAL_BATCH=${NOMINAL_BATCH:-32} # global batch that the recipe's learning rate is tuned for
EPOCHS=${EPOCHS:-30}
NUM_WORKERS=${NUM_WORKERS:-6} # per rank
need EXP_DIR 'the run directory'
need PRETRAINED_CHECKPOINT 'a list of run directories or checkpoints of stage 2, "[A,B]", or one file with a list in ensemble_weights'

train omnimae/omnimain_train_video_ensemble_ft "mae_ft_${DATASET}_config" "pretrained_checkpoint_path=$PRETRAINED_CHECKPOINT" "$@"
