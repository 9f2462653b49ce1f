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
job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
logs=/runs/mae/submitit_logs
for _ in $(seq 60); do [ -d "$logs" ] && break; sleep 1; done
if ! [ -d "$logs" ]; then
  scontrol update JobId="$job" Comment="$(hostname) does not see the folder of the run: $logs"
  exit 1
fi
exec >>"$logs/${job}_batch.log" 2>&1
failed() { code=$?; why="submitit.setup failed: $1"; echo "$why"; PYTHON -m omnivision.job_record ended "$logs" "$job" "$code" "$why"; exit "$code"; }
export PYTHONPATH=CHECKOUT${PYTHONPATH:+:$PYTHONPATH}
{ module load cuda
} || failed 'module load cuda'
trap : TERM USR2  # a job that is ended, too, comes to its last lines

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /runs/mae/submitit_logs/%j_%t_log.out --error /runs/mae/submitit_logs/%j_%t_log.err --cpus-per-task=10 --kill-on-bad-exit=1 --wait=300 PYTHON -u -m submitit.core._submit /runs/mae/submitit_logs


# teardown
code=$?
[ "$code" = 0 ] || PYTHON -m omnivision.job_record ended "$logs" "$job" "$code"
exit "$code"
