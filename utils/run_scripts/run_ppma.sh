#!/bin/sh
# The whole recipe from one command: MAE, alignment, then fine-tuning, linear probing and the adaptive average on each dataset.
#   PPMA=DIR sh utils/run_scripts/run_ppma.sh [--dry] [overrides of every stage]
# On a cluster each stage is a job that depends on those it starts from; the command returns when all are submitted. Run again, it
# submits only stages that are neither done nor queued. With submitit.use_cluster=false the stages run locally, one after another.
# --dry shows the stages, their dependencies and their status, without any checks.
set -eu
HERE=$(cd "$(dirname "$0")" && pwd)
. "$HERE/common.sh"

PPMA=${PPMA:-runs/ppma} # parent of the run directories
PRETRAIN=${PRETRAIN:-inpk150} # dataset of the masked autoencoder
ALIGN=${ALIGN:-inpk150_sim150} # alignment dataset of the trunk that is fine-tuned and probed
AVERAGE=${AVERAGE:-inpk150 sim150} # alignment datasets of the averaged trunks
DOWNSTREAM=${DOWNSTREAM-ucf101 hmdb51 diving48 minissv2 ikea uav}
SIZE=${SIZE:-vitbase} # model; BATCH_SIZE, NUM_NODES, GPUS_PER_NODE, EPOCHS, NUM_WORKERS apply to every stage

dry= cluster=yes failed=
for argument; do
    shift
    case $argument in
        -h | --help) sed -n '2,/^set -eu/{/^#/s/^# \{0,1\}//p}' "$0" && exit ;;
        --dry) dry=yes && continue ;;
        -m | --multirun) echo "error: $argument is for one stage, and run_ppma.sh runs all. Sweep with a stage's own script." >&2 && exit 1 ;;
        --config-dir | -cd | --config-dir=*) ;;
        -*) echo "error: run_ppma.sh has no option $argument; see --help." >&2 && exit 1 ;;
        submitit.use_cluster=false | +submitit.use_cluster=false | ++submitit.use_cluster=false) cluster= ;;
    esac
    set -- "$@" "$argument"
done

# stage NAME SCRIPT DATASET MODEL START BEFORE [overrides]: a run that starts when the stages BEFORE (names) are done.
# job_NAME keeps its state: the job ID, `done`, `failed`, `cancelled` or `not submitted`.
stage() {
    name=$1 script=$2 dataset=$3 model=$4 start=$5 before=$6
    shift 6
    if [ "$dry" ]; then
        printf '%-18s after %-30s %s\n' "$name" "${before:-nothing}" "$(python -m omnivision.launch.slurm_jobs status "$PPMA/$name")"
        return
    fi
    ids=
    for prior in $before; do
        eval "became=\$job_$prior"
        case $became in
            done) ;;
            failed | cancelled | 'not submitted')
                how=cancelled
                [ "$became" != 'not submitted' ] || how=unsubmitted # keeps the earlier summary.json
                python -m omnivision.launch.slurm_jobs $how "$PPMA/$name" "it starts from $PPMA/$prior ($became)" || :
                [ "$became" = 'not submitted' ] || became=cancelled
                eval "job_$name=\$became"
                return
                ;;
            *) ids=$ids:$became ;;
        esac
    done
    [ -z "$ids" ] || set -- "$@" "submitit.dependency=afterok$ids"
    set -- "submitit.name=$name" "$@"
    if [ -z "$cluster" ]; then
        printf '\n== %s\n' "$name"
        if call "$@"; then became=done; else became=failed failed="$failed $name"; fi
    else
        if said=$(call "$@" 2>&1); then
            became=done
            case $said in *job_id=*) became=${said#*job_id=} became=${became%% *} ;; esac
        else
            became='not submitted' failed="$failed $name"
            python -m omnivision.launch.slurm_jobs unsubmitted "$PPMA/$name" "not submitted: ${said##*error: }" >/dev/null || :
        fi
        [ "$name" = mae ] || said=$(echo "$said" | grep -v '^warning: ') # the same for every stage: once is enough
        echo "$said" | while read -r line; do printf '%-18s %s\n' "$name" "$line"; done
    fi
    eval "job_$name=\$became"
}

call() {
    EXP_DIR=$PPMA/$name DATASET=$dataset MODEL=$model PRETRAINED_CHECKPOINT=$start sh "$HERE/$script" "$@"
}

stage mae run_mae.sh "$PRETRAIN" "$SIZE" null '' "$@"
stage align run_align.sh "$ALIGN" "${SIZE}_ft" "$PPMA/mae" mae "$@"
sources= aligned=
for data in $AVERAGE; do
    source=align_$data
    [ "$data" != "$ALIGN" ] || source=align
    [ "$source" = align ] || stage "$source" run_align.sh "$data" "${SIZE}_ft" "$PPMA/mae" mae "$@"
    sources=${sources:+$sources,}$PPMA/$source aligned=${aligned:+$aligned }$source
done
for data in $DOWNSTREAM; do
    stage "ft_$data" run_downstream_ft.sh "$data" "${SIZE}_ft" "$PPMA/align" align "$@"
    stage "lp_$data" run_downstream_lp.sh "$data" "${SIZE}_ft" "$PPMA/align" align "$@"
    stage "average_$data" run_downstream_average_lp.sh "$data" "${SIZE}_average_ft" "[$sources]" "$aligned" "$@" \
        "ensemble_num_models=$(echo $AVERAGE | wc -w)"
done
if [ -n "$failed" ]; then
    how=failed
    [ -z "$cluster" ] || how='not submitted'
    echo "error: $how:$failed; dependent stages were not started. Fix the cause and run the same command again." >&2
    exit 1
fi
