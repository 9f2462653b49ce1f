"""Invalid input is found before anything starts; each problem names the setting and, where one is near, what was meant."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path
from unittest import mock

from omnivision import train
from omnivision.config.compose import compose_configs, parse_command_line
from omnivision.config.instantiate import TargetError, signature_of, target_problems
from omnivision.config.validate import validate_config
from omnivision.launch.exit import exit_code_and_reason, unwrap_keyboard_interrupt
from omnivision.training.preflight import check_run
from omnivision.utils.errors import EXIT_FAULT, EXIT_SIGINT, UserError
from tests.runs import ROOT

MAE = ("+experiments=omnimae/omnimain_train_video", "+trainer=mae_k150_config")
FT = (
    "+experiments=omnimae/omnimain_train_video_ft",
    "+trainer=mae_ft_ucf101_config",
    "pretrained_checkpoint_path=null",
)
AVERAGE = ("+experiments=omnimae/omnimain_train_video_ensemble_ft", "+trainer=mae_ft_ucf101_config")
HERE = ("launcher.experiment_log_dir=run", "submitit.use_cluster=false")
VIEW = "{_target_:omnivision.data.views.EvalView,size:224}"
MASK = "{_target_:omnivision.data.masking.TubeMask,ratio:0.5}"

# What is typed after a good command: parts of the one problem that is found.
AFTER_MAE: dict[str, tuple[str, ...]] = {
    # Unknown settings.
    "epoch=3": ("epoch ", "epochs?"),
    "++ephocs=3": ("ephocs ", "epochs?"),
    "trainer.optim.gradient_clp=1": ("trainer.optim.gradient_clip?",),
    "++trainer.optim.ampp.enabled=true": ("trainer.optim.ampp ", "trainer.optim.amp?"),
    "optim.gradient_clip=1": ("trainer.optim.gradient_clip?",),
    "num_nodes=2": ("launcher.num_nodes?",),
    "+launcher.gpu_per_node=2": ("launcher.gpus_per_node?",),
    "~trainer.modes": ("trainer.mode?",),
    "++datasets.k150.prefixx=/data": ("datasets.k150.prefixx ", "prefix?"),
    "++trainer.model.trunk.dept=3": ("trainer.model.trunk.depth?",),
    "++trainer.model.decoder.dept=3": ("trainer.model.decoder.depth?",),
    "++trainer.optim.optimizer.lrr=1": ("trainer.optim.optimizer.lr?",),
    "++trainer.optim.options.weight_decy=[]": ("trainer.optim.options.weight_decy ", "weight_decay?"),
    "++zzz=1": ("zzz ",),
    "++trainer.mask_ratio=0.5": ("trainer.mask_ratio ", "mean mask_ratio?"),
    "++trainer.mask_ration=0.5": ("trainer.mask_ration ", "mean mask_ratio?"),
    "trainer.optim.optimizer._target_=timm.optim.Lamb": ("'~trainer.optim.optimizer.fused'",),
    # Mappings are merged.
    "trainer.data.sources={}": ("'~trainer.data.sources.k150'",),
    "trainer.data.repeats={k150:2}": ("'+trainer.data.repeats.k150=",),
    "trainer.data.sources={ucf101:x}": ("'+trainer.data.sources.ucf101=",),
    "hydra.searchpath=[file:///tmp/never]": ("hydra.searchpath ", "/tmp/never"),
    "+experiments=omnimae/omnimain_train_video_ft": ("experiments ", "+experiments=NAME"),
    # One problem, although other settings refer to it.
    "image_size=${short_sid}": ("image_size ", "short_sid"),
    "launcher.experiment_log_dir=runs/${hydra:job.num}": ("launcher.experiment_log_dir ", "${lr}"),
    f"launcher.experiment_log_dir=runs/{'e' * 256}": ("launcher.experiment_log_dir ", "255 bytes"),
    "launcher.experiment_log_dir=setup.py": ("launcher.experiment_log_dir ", "is a file"),
    # Keys that may be anything need a +.
    "trainer.data.repeats.k150=2": ("+trainer.data.repeats.k150=2",),
    "trainer.optim.optimizer.eps=1": ("+trainer.optim.optimizer.eps=1",),
    # Config groups.
    "trainer/model=vitbas": ("vitbase?",),
    "trainer/model=VITBASE": ("vitbase?",),
    "trainer/modl=vitbase": ("trainer/model?",),
    "++trainer/model=vitbase": ("trainer/model",),
    "trainer/nosuch=a": ("trainer/nosuch",),
    "trainer=ucf101": ("mae_ft_ucf101_config?",),
    "+trainer=mae_in1k_k150_config": ("trainer",),
    "trainer/checkpoint=no_heads": ("+trainer/checkpoint=no_heads",),
    "trainer/model=vitbase_ft": ("trainer/model=vitbase ",),
    # Types and ranges.
    "batch_size=0": ("batch_size ", "got 0"),
    "batch_size=010": ("batch_size ", "'010'"),
    "batch_size=": ("batch_size ",),
    "clip_duration=1:30": ("clip_duration ", "'1:30'"),
    "clip_duration=nan": ("clip_duration ", "nan"),
    "epochs=1.5": ("epochs ", "1.5"),
    "epochs=true": ("epochs ", "True"),
    f"epochs={'9' * 400}": ("epochs ",),
    "crop_scale=[0.2]": ("crop_scale ", "[0.2]"),
    "trainer.compile=1": ("trainer.compile ",),
    "mask_ratio=1.5": ("mask_ratio ", "1.5"),
    "trainer.mode=DRY": ("trainer.mode ", "'dry'"),
    "trainer.accelerator=gpu": ("trainer.accelerator ", "'cuda'"),
    "trainer.optim.options=3": ("trainer.optim.options ",),
    "trainer.model=vitbase": ("trainer.model ",),
    "trainer.model=[]": ("trainer.model=[]",),
    "trainer.logging.also={a:1}": ("trainer.logging.also",),
    "trainer.task.norm=chanel": ("trainer.task.norm ", "'channel'"),
    "trainer.optim.optimizer.fused=maybe": ("trainer.optim.optimizer.fused ", "'maybe'"),
    "submitit.setup=x": ("submitit.setup ", "list"),
    "trainer.model.trunk=5": ("trainer.model.trunk ",),
    "trainer.model.trunk.depth=012": ("trainer.model.trunk.depth ", "'012'"),
    "trainer.model.trunk.depth=1000000": ("trainer.model.trunk.depth ",),
    "trainer.model.decoder.heads=0": ("trainer.model.decoder.heads ",),
    "trainer.model.decoder.share=0": ("trainer.model.decoder.share ",),
    "trainer.model.decoder.attention=crss": ("trainer.model.decoder.attention ", "'cross'"),
    "trainer.max_epochs=${nope}": ("trainer.max_epochs ", "nope"),
    "++trainer.freeze=${trainer}": ("trainer.freeze ",),
    "launcher.experiment_log_dir=": ("launcher.experiment_log_dir ",),
    # Settings that must agree.
    "trainer.task.tubelet=[4,8,16]": ("trainer.model.trunk.tubelet", "trainer.task.tubelet"),
    "trainer.data.view.size=112": ("image_size ", "trainer.data.view.size"),
    "trainer.data.num_frames=8": ("trainer.data.num_frames ", "trainer.model.trunk.num_frames"),
    "lr=1e-3 lr_scale_factor=2": ("lr ", "lr_scale_factor"),
    "pretrained_checkpoint_path=[a,b]": ("pretrained_checkpoint_path ", "omnimain_train_video_ensemble_ft"),
    "launcher.gpus_per_node=3": ("batch_size ", "batch_size=12"),
    "launcher.gpus_per_node=8": ("batch_size ", "batch_size=32"),
    "trainer.optim.accumulation_steps=3": ("batch_size ", "accumulation_steps"),
    "trainer.data.mask=null": ("trainer.data.mask ", "trainer/data=unlabelled_video"),
    "++datasets.k150.kind=image": ("trainer.data.image ",),
    "submitit.mem=8G submitit.mem_gb=8": ("submitit ", "mem_gb"),
    # Objects.
    f"~trainer.data.mask ++trainer.data.mask={VIEW}": ("trainer.data.mask ", "data.masking"),
    f"~trainer.data.val_view ++trainer.data.val_view={MASK}": ("trainer.data.val_view ", "views"),
    f"~trainer.task ++trainer.task={MASK}": ("trainer.task ", "omnivision.tasks"),
    "trainer.model._target_=omnivision.models.mae.MaskedAutoencodr": ("trainer.model._target_ ", "MaskedAutoencoder?"),
    "trainer.optim.optimizer._target_=os.system": ("trainer.optim.optimizer._target_ ", "trust_targets"),
    "++trainer.model._target_=5": ("trainer.model._target_ ",),
    "++trainer.data.view._partial_=true": ("trainer.data.view._partial_ ",),
    "++trainer.model.classes=[3]": ("trainer.model.classes ",),
    # What building the model, its optimizer and its masks says.
    "num_frames=15": ("num_frames",),
    "image_size=230": ("image_size",),
    "trainer.model.trunk.heads=7": ("heads ", "768"),
    "trainer.model.decoder.heads=7": ("heads ", "384"),
    "trainer.model.decoder.heads=7 trainer.model.decoder.attention=cross": ("heads ", "384"),
    "trainer.optim.options.lr.0.scheduler.peak=-1": ("trainer.optim.options.lr[0].scheduler",),
    "trainer.optim.options.lr.0.scheduler.peak=nan": ("trainer.optim.options.lr[0].scheduler",),
    "~trainer.optim.options.lr lr=1e-3": ("trainer.optim.options.lr ",),
    "trainer.data.mask.ratio=0.0001": ("trainer.data.mask",),
    "trainer.freeze=[nothing.*] pretrained_checkpoint_path=null": ("trainer.freeze ",),
    "launcher.experiment_log_dir=/dev/null": ("launcher.experiment_log_dir ",),
    # Syntax, sweeps and flags.
    "pretrained_checkpoint_path=runs/lr=3/x": ("pretrained_checkpoint_path=runs/lr=3/x",),
    "batch_size=8,16": ("batch_size=8,16",),
    "-m epochs=range(0)": ("epochs=range(0)",),
    "-m epochs=range(1,100000000)": ("10000", "epochs=range(1,100000000)"),
    "batch_size 8": ("batch_size ",),
    "trainer.freeze=[trunk": ("trainer.freeze=[trunk",),
    "--batch_size 8": ("--batch_size",),
    "--cfg jbo": ("jbo",),
    "--config-dir /nowhere": ("/nowhere",),
    "--config-dir": ("--config-dir",),
    "--experimental-rerun x": ("--experimental-rerun",),
}
ALONE: dict[tuple[str, ...], tuple[str, ...]] = {
    (): ("epochs, ", "trainer.model, ", "launcher.experiment_log_dir", "+experiments=", "+trainer=mae_k150_config"),
    FT[:1]: ("trainer.data.sources, ", "+trainer=mae_ft_ucf101_config"),
    MAE[1:]: ("epochs, ", "+experiments=omnimae/omnimain_train_video "),
    ("+experiments=omnimae/omnimain_train_vide", MAE[1]): ("omnimae/omnimain_train_video?",),
    ("+experiments=demo/mea",): ("demo/mae?",),
    ("experiments=omnimae/omnimain_train_video",): ("+experiments=omnimae/omnimain_train_video",),
    (MAE[0], "trainer=mae_k150_config"): ("+trainer=mae_k150_config",),
    (*FT, *HERE, "++trainer.data.mask.ratio=0.5"): ("trainer.data.mask ", "_target_"),
    (*AVERAGE, *HERE, "pretrained_checkpoint_path=[a.pt,b.pt,c.pt]"): ("ensemble_num_models ",),
}
FILES: dict[str, str] = {  # of a site: a part of the problem
    "epoch: 3\n": "epochs?",
    "submitit:\n  partitoin: gpu\n": "submitit.partition?",
    "trainer:\n  model: {_target_: omnivision.models.mae.Autoencoder}\n": "trainer.model._target_",
    "defaults: [/trainer/model: vitbas]\n": "vitbase?",
    "epochs: [3\n": "lab.yaml",
    "trainer: {trust_targets: [logging]}\n": "trainer.trust_targets",
    "epochs: ${\n": "configuration file",
    "- a\n- b\n": "site/lab",
    "submitit:\n\tpartition: x\n": "line 3",
    "- \udcff\n": "site/lab.yaml",
    "trainer:\n  data: {sources: {k150: '${datasets.k15}'}}\n": "datasets.k15",
    "trainer: null\n": "trainer",
    "batch_size: null\n": "batch_size ",
    "batch_size: 010\n": "'010'",
    "clip_duration: 1:30\n": "'1:30'",
    "trainer/model: vitbase\n": "trainer/model ",
    "defaults: [lab]\n": "includes",
}
HEADER = "# @package _global_\n"
WRONG_FILES = (
    ("lab.yml", HEADER, "site/lab"),
    ("lab.yaml/x", "", "site/lab"),
    ("lab.yaml", f"\ufeff{HEADER}epochs: 3\n", "@package _global_"),
    ("lab.yaml", "# @package _globl_\nepochs: 3\n", "_globl_ "),
    ("lab.yaml", "epochs: 3\n", "@package _global_"),
)
# What Hydra would run or write for a file is neither: its part of a configuration is not used.
HYDRA = (
    "{callbacks: {x: {_target_: logging.FileHandler, filename: /tmp/never}}}",
    "{run: {dir: /tmp/never}}",
    "{launcher: {_target_: logging.FileHandler}}",
    "{job_logging: {version: 1, handlers: {h: {class: logging.FileHandler, filename: /tmp/never}}, root: {handlers: [h]}}}",
)


def find_problems(*arguments: str) -> list[str]:
    """Return what is wrong with a command, but for its data, which does not exist."""
    try:
        command = parse_command_line(arguments, ROOT / "config")
        [settings] = [validate_config(config, command.overrides) for config in compose_configs(command)]
    except UserError as error:
        return error.problems
    return [problem for problem in check_run(settings)[0] if not problem.startswith("datasets.")]


class Problems(unittest.TestCase):
    def check(self, arguments: tuple[str, ...], *parts: str) -> None:
        with self.subTest(arguments):
            problems = find_problems(*arguments)
            self.assertEqual(len(problems), 1, problems)
            for part in parts:
                self.assertIn(part, problems[0])

    def write_site(self, name: str, text: str) -> tuple[str, ...]:
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        (folder / "site" / name).parent.mkdir(parents=True)
        (folder / "site" / name).write_text(text, encoding="utf-8", errors="surrogateescape")
        return (*MAE, *HERE, "--config-dir", str(folder), "+site=lab")

    def test_problems_on_the_command_line_are_found(self):
        for arguments, parts in AFTER_MAE.items():
            self.check((*MAE, *HERE, *arguments.split()), *parts)
        for alone, parts in ALONE.items():
            self.check(alone, *parts)

    def test_problems_in_a_user_file_are_found(self):
        for text, part in FILES.items():
            self.check(self.write_site("lab.yaml", HEADER + text), part)
        for name, text, part in WRONG_FILES:
            self.check(self.write_site(name, text), part)

    def test_all_problems_are_reported_at_once(self):
        more = ("++ephocs=3", "batch_size=0", "trainer.mode=x", "trainer.max_epochs=${nope}")
        self.assertEqual(len(find_problems(*MAE, *HERE, *more)), 4)

    def test_one_file_may_hold_all_checkpoints_of_an_average(self):
        for given in ("[a.pt,b.pt]", "[one_file_with_several.pt]"):
            command = parse_command_line((*AVERAGE, *HERE, f"pretrained_checkpoint_path={given}"), ROOT / "config")
            validate_config(compose_configs(command)[0])


class Targets(unittest.TestCase):
    def test_only_classes_of_known_packages_are_built(self):
        for name in ("os.system", "pathlib.Path.unlink", "numpy.load", "torch.load", "omnivisionx.y", "builtins.open",
                     "omnivision.data.catalog.np.load", "omnivision.data.catalog.UserError", "torch.nn.init"):  # fmt: skip
            self.assertEqual(list(target_problems({"_target_": name}, "trainer.task")), ["trainer.task._target_"], name)
        nested = {"_target_": "torch.optim.AdamW", "betas": [{"_target_": "os.system"}, 0.9]}
        self.assertEqual(list(target_problems(nested, "a")), ["a.betas[0]._target_"])
        self.assertEqual(target_problems({"_target_": "torch.optim.SGD"}, "a"), {})

    def test_arguments_must_match_the_signature(self):
        self.assertEqual(list(signature_of("omnivision.data.masking.TubeMask")), ["ratio"])
        self.assertRaises(TargetError, signature_of, "omnivision.models.vit.Nope")
        trunk = {"_target_": "omnivision.models.vit.VisionTransformer"}
        model = {"_target_": "omnivision.models.mae.MaskedAutoencoder", "decoder": {"width": 8, "depth": 1, "heads": 2}}
        for target, wrong in (
            ({"_target_": "omnivision.data.masking.RandomMask"}, ["m.ratio"]),
            (model | {"trunk": {"a": 1}}, ["m.trunk"]),
            (trunk | {"tubelet": [2, 16]}, ["m.tubelet[2]"]),
            (trunk | {"tubelet": [2, 16, 16]}, []),
        ):
            self.assertEqual(list(target_problems(target, "m")), wrong)


class Command(unittest.TestCase):
    def run_command(self, *arguments: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with mock.patch.dict(os.environ), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with self.assertRaises(SystemExit) as ended:
                train.main(arguments)
        return ended.exception.code, out.getvalue(), err.getvalue()

    def test_a_problem_is_one_paragraph_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory() as folder:
            good = (*MAE, "submitit.use_cluster=false", f"launcher.experiment_log_dir={folder}/run")
            for argument in (
                "epoch=3",
                "++ephocs=3",
                "num_frames=15",
                "--batch_size",
                f"launcher.experiment_log_dir={'x' * 300}",
            ):
                code, out, err = self.run_command(*good, argument)
                self.assertEqual((code, out), (1, ""), err)
                self.assertRegex(err, r"^(Checking .*\n)?error: ")
                self.assertNotIn("Traceback", err)
            self.assertEqual(os.listdir(folder), [])

    def test_hydra_runs_and_writes_nothing(self):
        for text in HYDRA:
            with tempfile.TemporaryDirectory() as folder, self.subTest(text):
                (Path(folder) / "site").mkdir()
                (Path(folder) / "site/lab.yaml").write_text(f"{HEADER}hydra: {text}\nepoch: 3\n")
                code, _, err = self.run_command(*MAE, *HERE, "--config-dir", folder, "+site=lab")
                self.assertEqual((code, "epochs?" in err), (1, True), err)
                self.assertEqual(os.listdir(folder), ["site"])
                self.assertFalse(Path("/tmp/never").exists())

    def test_problems_of_all_runs_of_a_sweep_are_reported(self):
        sweep = (
            "-m",
            "mask_ratio=0.5,1.5,2.5",
            "submitit.use_cluster=false",
            "launcher.experiment_log_dir=r/${mask_ratio}",
        )
        code, _, err = self.run_command(*MAE, *sweep)
        self.assertEqual(code, 1, err)
        for run in ("mask_ratio=1.5", "mask_ratio=2.5"):
            self.assertIn(f"(Run {run})", err)

    def test_stop_signal_before_the_launch_is_reported(self):
        # A shell starts background processes with SIGINT ignored.
        self.addCleanup(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.default_int_handler))
        for number in (signal.SIGTERM, signal.SIGINT):
            with mock.patch.object(train, "make_jobs", lambda *_: signal.raise_signal(number)):  # noqa: B023
                code, _, err = self.run_command(*MAE, *HERE)
            self.assertEqual((code, "before a run began" in err), (128 + number, True), err)
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)

    def test_keyboard_interrupt_wrapped_by_a_library_is_recognized(self):
        try:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt as stroke:
                raise RuntimeError("of a library") from stroke
        except RuntimeError as error:
            self.assertEqual(exit_code_and_reason(unwrap_keyboard_interrupt(error))[0], EXIT_SIGINT)
        self.assertEqual(exit_code_and_reason(unwrap_keyboard_interrupt(RuntimeError("x")))[0], EXIT_FAULT)
        one, other = MemoryError(), ValueError()
        one.__cause__, other.__context__ = other, one  # as `raise one from other` makes it while one is handled
        self.assertIs(unwrap_keyboard_interrupt(one), one)

    def test_flags_may_be_anywhere_on_the_command_line(self):
        with tempfile.TemporaryDirectory() as folder:
            command = parse_command_line(["a=1", "-m", "--config-dir", folder, "b=2", "-cn", "mine"], ROOT / "config")
            self.assertEqual((command.overrides, command.multirun, command.config_name), (["a=1", "b=2"], True, "mine"))
            self.assertEqual(command.config_dirs, [Path(folder), ROOT / "config"])

    def test_traceback_is_printed_on_request(self):
        environment = os.environ | {"OMNIVISION_TRACEBACK": "1"}
        command = [sys.executable, "train_app_submitit.py", *MAE, "epoch=3"]
        result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        self.assertEqual((result.returncode, "Traceback" in result.stderr), (1, True), result.stderr)


if __name__ == "__main__":
    unittest.main()
