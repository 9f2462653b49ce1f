"""The training command (see `omnivision/train.py`): python train_app_submitit.py --help"""

from omnivision.train import main

if __name__ == "__main__":
    main()
