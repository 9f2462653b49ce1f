#!/bin/sh
# The demo: render small films, pretrain a masked autoencoder on those without real people, and tell where to look.
#   sh utils/run_scripts/run_demo.sh [overrides]        DEMO=folder (default: demo)
set -eu
cd "$(dirname "$0")/../.."
DEMO=${DEMO:-demo}

omnivision demo-data "$DEMO/data"
python train_app_submitit.py +experiments=demo/mae.yaml +trainer=mae_demo_config.yaml \
    ++data_root="$DEMO/data" ++launcher.experiment_log_dir="$DEMO/mae" "$@"

cat <<END

The masked autoencoder has learnt to fill in three quarters of a clip from the rest. Look at
  $DEMO/mae/pictures/last.png      original, what it saw, and what it made of it (last.gif moves; epoch_*.png: earlier)
  $DEMO/mae/logs/metrics.jsonl     loss, learning rate, gradient norm, clips/s, every 20 steps
  $DEMO/mae/summary.json           how the run ended
  tensorboard --logdir $DEMO/mae/tensorboard
Stop it with Ctrl-C and run it again to see it resume; a new folder starts anew: make demo DEMO=another_folder
END
