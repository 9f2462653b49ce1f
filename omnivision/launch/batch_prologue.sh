# Runs before submitit.setup and the tasks; omnivision_runs, omnivision_python and omnivision_checkout are set before it.
# The outer shell records an exit that the tasks could not; the inner shell runs setup, which may exit.
readonly omnivision_logs=${omnivision_runs%/*}
readonly omnivision_job=${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}
readonly omnivision_from=$PWD  # relative run directories start here
readonly omnivision_reached="$omnivision_logs/${omnivision_job}_setup"  # the line of submitit.setup that is running
omnivision_seen='for _ in $(seq 60); do [ -w "$1" ] && exit; sleep 1; done; echo "$(hostname) cannot write to $1"'
omnivision_comment() { echo "$1"; scontrol update JobId="$omnivision_job" Comment="$1"; }
omnivision_code() { export PYTHONPATH="$omnivision_checkout${PYTHONPATH:+:$PYTHONPATH}"; }
if [ -z "$omnivision_within" ]; then
  omnivision_blind=$(bash -c "$omnivision_seen" - "$omnivision_logs")
  [ -z "$omnivision_blind" ] || { omnivision_comment "$omnivision_blind"; exit 1; }
  exec >>"$omnivision_logs/${omnivision_job}_batch.log" 2>&1
  trap : TERM USR2  # continue after a signal, to record the exit
  : >"$omnivision_reached"
  omnivision_within=1 "$BASH" "$0"
  code=$?
  trap '' TERM USR2  # ignore further signals while recording
  why=$(cat "$omnivision_reached"; rm -f "$omnivision_reached")
  [ -z "$why" ] || echo "$why"
  [ "$code" != 0 ] || [ -z "$why" ] || code=1  # nothing was trained
  omnivision_code
  set -- "$omnivision_runs" "$omnivision_job" "$code" ${why:+"$why"}
  [ "$code" = 0 ] || ! "$omnivision_python" -m omnivision.launch.slurm_jobs ended "$@" || code=0
  exit "$code"
fi
unset omnivision_within
trap : TERM USR2
if [ "${SLURM_JOB_NUM_NODES:-1}" -gt 1 ]; then
  omnivision_blind=$(srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 bash -c "$omnivision_seen" - "$omnivision_logs")
  [ -z "$omnivision_blind" ] || { omnivision_comment "$omnivision_blind" >"$omnivision_reached"; exit 1; }
fi
