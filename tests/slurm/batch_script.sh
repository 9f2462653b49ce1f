#!/bin/bash

# Parameters
#SBATCH --account=vision
#SBATCH --comment='for the paper'
#SBATCH --constraint='a100&80gb'
#SBATCH --cpus-per-task=10
#SBATCH --dependency=afterok:12:13
#SBATCH --error=/dev/null
#SBATCH --exclude=node7
#SBATCH --gpus-per-node=4
#SBATCH --job-name=mae
#SBATCH --kill-on-invalid-dep=yes
#SBATCH --mem=66048M
#SBATCH --nodelist='node[1-4]'
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --open-mode=append
#SBATCH --output=/dev/null
#SBATCH --partition=gpu
#SBATCH --qos=long
#SBATCH --requeue
#SBATCH --reservation=paper
#SBATCH --signal=USR2@300
#SBATCH --time=1200
#SBATCH --wckey=submitit

# setup
readonly omnivision_runs=/runs/mae/submitit_logs/TOKEN_runs.json
readonly omnivision_python=PYTHON
readonly omnivision_checkout=CHECKOUT
# (batch_prologue.sh)
echo 'submitit.setup ended the job, and nothing was trained: module load cuda' >"$omnivision_reached"
{ module load cuda
} || exit
: >"$omnivision_reached"
cd "$omnivision_from" || exit
omnivision_code

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/mae/submitit_logs/%j_%t_log.out --error /runs/mae/submitit_logs/%j_%t_log.err --cpus-per-task=10 --kill-on-bad-exit=1 --wait=300 --export=ALL PYTHON -u -m omnivision.launch.slurm_task /runs/mae/submitit_logs/TOKEN_runs.json

