# Functions shared by the scripts in this folder. Settings are environment variables with defaults in each script; arguments
# are Hydra overrides and take precedence.

# need NAME MEANING: fail if a variable is unset.
need() {
    eval "value=\${$1:-}"
    if [ -z "$value" ]; then
        echo "error: $1 is not set ($2). Set it before the command: $1=... sh $0" >&2
        exit 1
    fi
}

# number NAME: fail if a variable is not a positive integer.
number() {
    eval "value=\${$1}"
    case $value in
        *,*)
            echo "error: $1 must be one value, because the learning rate depends on it; got '$value'. Give one command per value." >&2
            exit 1
            ;;
        '' | *[!0-9]* | 0*)
            echo "error: $1 must be a positive integer, got '$value'." >&2
            exit 1
            ;;
    esac
}

# train EXPERIMENT RECIPE [overrides]: start one run, by default on the cluster.
train() {
    experiment=$1 recipe=$2 peak_given=
    shift 2
    for argument; do # overrides change the learning rate, too
        case $argument in
            launcher.num_nodes=* | +launcher.num_nodes=* | ++launcher.num_nodes=*) NUM_NODES=${argument#*=} ;;
            batch_size=* | +batch_size=* | ++batch_size=*) BATCH_SIZE=${argument#*=} ;;
            lr=* | +lr=* | ++lr=*) peak_given=yes ;;
        esac
    done
    for name in BATCH_SIZE NUM_NODES GPUS_PER_NODE NOMINAL_BATCH EPOCHS NUM_WORKERS; do
        [ "$name" = NUM_WORKERS ] && [ "$NUM_WORKERS" = 0 ] || number "$name"
    done
    # The shell divides integers only; the learning rate needs the exact ratio.
    factor=$(LC_ALL=C awk "BEGIN { printf \"%.17g\", $NOMINAL_BATCH / ($BATCH_SIZE * $NUM_NODES) }")
    [ "$peak_given" ] || set -- "lr_scale_factor=$factor" "$@"
    exec python "$HERE/../../train_app_submitit.py" "+experiments=$experiment" "+trainer=$recipe" "trainer/model=$MODEL" \
        submitit.use_cluster=true "launcher.gpus_per_node=$GPUS_PER_NODE" "launcher.num_nodes=$NUM_NODES" \
        "batch_size=$BATCH_SIZE" "trainer.optim.nominal_batch=$NOMINAL_BATCH" "epochs=$EPOCHS" "num_workers=$NUM_WORKERS" \
        "launcher.experiment_log_dir=$EXP_DIR" "$@"
}
