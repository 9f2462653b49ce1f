#!/bin/sh
# Stage 1: masked-autoencoder pretraining of a trunk on videos without labels.
# As published; change with the environment variables below, and Hydra overrides as arguments:
#   EXP_DIR=FOLDER sh utils/run_scripts/run_mae.sh [overrides]
# Here instead of on a cluster: submitit.use_cluster=false launcher.num_nodes=1 launcher.gpus_per_node=1
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

DATASET=${DATASET:-k150} # k150, inpk150, sim150 or inpk150_sim150
MODEL=${MODEL:-vitbase}
BATCH_SIZE=${BATCH_SIZE:-16} # clips of a step on each node
NUM_NODES=${NUM_NODES:-8}
GPUS_PER_NODE=${GPUS_PER_NODE:-1}
NOMINAL_BATCH=${NOMINAL_BATCH:-256} # global batch that the learning rate of the recipe is for
EPOCHS=${EPOCHS:-200}
NUM_WORKERS=${NUM_WORKERS:-6} # of each process
need EXP_DIR 'the folder of the run'

train omnimae/omnimain_train_video "mae_${DATASET}_config" "$@"
