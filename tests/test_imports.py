"""Which modules may import certain libraries, and calls that no module may make (layers: `lint-imports`)."""

import ast
import subprocess
import sys
import unittest
from collections.abc import Iterator

from tests.runs import ROOT

ALLOWED = {
    "hydra": {"omnivision.config.compose", "omnivision.training.build"},
    "omegaconf": {
        f"omnivision.{name}"
        for name in (
            "train",
            "config.catalog",
            "config.compose",
            "config.messages",
            "config.validate",
            "launch.launcher",
            "launch.slurm_task",
        )
    },
    "submitit": {"omnivision.launch.slurm"},
    "av": {"omnivision.data.video", "omnivision.data.encode"},
    "yaml": {
        "omnivision.config.catalog",
        "omnivision.config.compose",
        "omnivision.config.validate",
        "omnivision.tools.prepare.output",
        "omnivision.config.flat",
    },
    "jinja2": {"omnivision.tools.report.page", "omnivision.interop.export"},
    "plotly": {"omnivision.tools.report.figures", "omnivision.tools.report.page"},
    "wandb": {"omnivision.reporting.loggers"},
    "mlflow": {"omnivision.reporting.loggers"},
}
NEVER = {"pytorchvideo", "decord", "cv2", "pickle", "cloudpickle", "dill", "joblib"}


def modules() -> dict[str, ast.Module]:
    files = [*sorted((ROOT / "omnivision").rglob("*.py")), ROOT / "train_app_submitit.py"]
    found = {}
    for file in files:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST) -> Iterator[str]:
    """Full names of what a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


class Imports(unittest.TestCase):
    def test_few_files_touch_certain_libraries(self):
        for name, tree in modules().items():
            for imported in imports(tree):
                library = imported.partition(".")[0]
                self.assertNotIn(library, NEVER, f"{name} imports {imported}")
                if library in ALLOWED:
                    self.assertIn(name, ALLOWED[library], f"{name} imports {imported}")

    def test_nothing_unsafe_is_called(self):
        for name, tree in modules().items():
            for node in ast.walk(tree):
                if not isinstance(node, ast.Call):
                    continue
                called = ast.unparse(node.func)
                where = f"{name}:{node.lineno} calls {called}"
                self.assertNotIn(called, {"eval", "exec", "yaml.load", "yaml.unsafe_load", "pickle.loads"}, where)
                if called == "torch.load":
                    self.assertEqual(name, "omnivision.utils.io", where)
                for keyword in node.keywords:
                    if keyword.arg in ("allow_pickle", "weights_only"):
                        expected = {"allow_pickle": False, "weights_only": True}[keyword.arg]
                        self.assertEqual(ast.literal_eval(keyword.value), expected, where)

    def test_importing_everything_pulls_in_none_of_the_avoided_libraries(self):
        program = (
            "import importlib, sys\n"
            f"for name in {[name for name in modules() if name.startswith('omnivision')]!r}:\n"
            "    importlib.import_module(name)\n"
            "print(*sorted({name.partition('.')[0] for name in sys.modules}))\n"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
        self.assertEqual(result.returncode, 0, result.stderr)
        loaded = set(result.stdout.split())
        self.assertIn("torch", loaded)
        self.assertEqual(loaded & {"pytorchvideo", "decord", "cv2", "skvideo", "submitit"}, set())


if __name__ == "__main__":
    unittest.main()
