"""Claims of the demo and README: a trunk trained without real people helps in an unseen domain, and a few clips suffice for
plain motions. Four of the demo's six actions, those that differ most, need a hundredth of its steps.
"""

import tempfile
import unittest
from pathlib import Path

from omnivision.data.encode import write_video
from omnivision_demo.render import render
from omnivision_demo.spec import ACTIONS, video_spec
from tests import runs
from tests import stage_runs as stages
from tests.config import test_small_data as small_data

KEPT = [ACTIONS.index(action) for action in ("raise_arms", "march", "jump", "sidestep")]
VIDEOS = {("synthetic", "train"): 120, ("target", "train"): 15, ("target", "val"): 50}  # of each action


def write_videos(folder: Path) -> list[str]:
    """Write the domains of the story; return the overrides that make them datasets. The target is also ucf101."""
    overrides = []
    for (domain, split), count in VIDEOS.items():
        (folder / domain / split).mkdir(parents=True)
        specs = [video_spec(0, domain, split, index) for index in range(count * len(ACTIONS))]
        specs = [spec for spec in specs if spec.label in KEPT]
        paths, labels = [str(folder / domain / spec.path) for spec in specs], [KEPT.index(spec.label) for spec in specs]
        for path, spec in zip(paths, specs, strict=True):
            write_video(path, render(spec), fps=spec.fps, gop=spec.gop, crf=spec.crf)
        for name in ("ucf101", domain) if domain == "target" else (domain,):
            overrides += stages.write_split(folder, name, split, paths, len(KEPT), labels)
            overrides += [f"++datasets.{name}.class_names=null", f"++datasets.{name}.prefix="]
    return overrides


class Story(unittest.TestCase):
    def test_an_aligned_trunk_beats_random_weights(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        data = write_videos(folder)

        def top1(run: str, experiment: str, recipe: str, start: str, *overrides: str) -> float:
            settings = [f"+experiments=demo/{experiment}", f"+trainer={recipe}", f"pretrained_checkpoint_path={start}"]
            settings += [
                *data,
                f"launcher.experiment_log_dir={folder}/{run}",
                "trainer.accelerator=cpu",
                "num_workers=0",
            ]
            result = stages.run_in_process([*settings, *overrides])
            self.assertEqual(result.returncode, 0, result.stderr)
            return runs.read_summary(folder / run)["last"].get("val_top1", 0.0)

        blind = ["++datasets.synthetic.val=null", "trainer.mode=train_only"]
        top1("mae", "mae", "mae_demo_config", "null", *blind, "~trainer.data.sources.nohuman", "epochs=1")
        top1("align", "align", "mae_ft_demo_synthetic_config", f"{folder}/mae", *blind)
        scratch = top1("scratch", "finetune", "mae_ft_demo_config", "null")
        # Chance is 25.
        for experiment in ("finetune", "probe"):
            aligned = top1(experiment, experiment, "mae_ft_demo_config", f"{folder}/align")
            self.assertGreater(aligned, scratch + 10, experiment)

        # Few clips, from the trunk and from nothing, as README shows it.
        def few_clips(run: str, *start: str) -> float:
            seeds = 1, 2
            return sum(
                small_data.top1(folder / f"{run}_{seed}", *data, f"trainer.seed_value={seed}", *start) for seed in seeds
            )

        same = "image_size=48", "short_side=54", "trainer.model.trunk.tubelet=[4,6,6]"  # as the trunk
        pretrained = few_clips("trunk", f"pretrained_checkpoint_path={folder}/align", "lr=5e-4", *same)
        self.assertGreater(pretrained, few_clips("nothing"))


class SmallData(unittest.TestCase):
    """README's way with your own clips: 36 clips, a fifth held out (here more, so that a clip is not 14 %)."""

    def test_sets(self):
        for draw, classes, train, val, seeds, least in (
            (small_data.shape, 3, 10, 20, (1, 2, 3), 95),
            (small_data.noisy_shape, 3, 10, 20, (1, 2, 3), 95),
            (small_data.camera, 3, 10, 20, (1, 2, 3), 90),
            (small_data.shape, 10, 24, 6, (None,), 90),
        ):
            folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
            data = small_data.write_set(folder, draw, classes, train, val)
            for seed in seeds:
                chosen = [] if seed is None else [f"trainer.seed_value={seed}"]
                with self.subTest(f"{draw.__name__}, {classes} classes, seed {seed}"):
                    self.assertGreaterEqual(small_data.top1(folder / str(seed), *data, *chosen), least)


if __name__ == "__main__":
    unittest.main()
