#!/bin/sh
# Stage 1: masked-autoencoder pretraining on unlabelled videos.
# Defaults as published; change them with the environment variables below, and with Hydra overrides as arguments:
#   EXP_DIR=DIR sh utils/run_scripts/run_mae.sh [overrides]
# Without a cluster: submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

DATASET=${DATASET:-k150} # k150, inpk150, sim150 or inpk150_sim150
MODEL=${MODEL:-vitbase}
BATCH_SIZE=${BATCH_SIZE:-16} # clips per step on each node
NUM_NODES=${NUM_NODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NOMINAL_BATCH=${NOMINAL_BATCH:-256} # global batch that the recipe's learning rate is tuned for
EPOCHS=${EPOCHS:-200}
NUM_WORKERS=${NUM_WORKERS:-6} # per rank
need EXP_DIR 'the run directory'

train omnimae/omnimain_train_video "mae_${DATASET}_config" "$@"
