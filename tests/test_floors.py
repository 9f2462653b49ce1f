"""Who may import whom: the floors of docs/architecture.md, and the few files that may touch certain libraries."""

import ast
import subprocess
import sys
import unittest
from collections.abc import Iterator
from pathlib import Path

from tests.runs import ROOT

FLOORS = {
    0: ["allocator", "errors", "files", "safe", "streams"],
    1: [
        "distributed",
        "sharding",
        "agreement",
        "stopping",
        "watchdog",
        "metrics",
        "optim.schedules",
        "models.patches",
        "models.attention",
    ],
    2: ["data", "models", "optim", "demo"],
    3: ["tasks", "evaluation", "prepare"],
    4: "experiment checkpoint_shards checkpoint reporting weight_files weights interop slurm utilisation".split(),
    5: ["run_state", "steps", "trainer", "resuming", "report"],
    6: "hydra_guard settings_yaml targets schema settings suggestions settings_check settings_submitit origins composition "
    "preflight build inference usage stages run_messages".split(),
    7: ["jobs", "job_record", "ending", "process", "local", "submission", "launch", "dry", "cli"],
}
# Within a floor, these are above the others.
RAISED = {
    "files": 0.5,
    "safe": 0.5,
    "agreement": 1.5,
    "watchdog": 1.5,
    "sharding": 1.5,
    "metrics": 1.5,
    "demo": 2.5,
    "evaluation": 3.5,
    "weight_files": 4.4,
    "weights": 4.5,
    "interop": 4.6,
    "checkpoint": 4.1,
    "trainer": 5.1,
    "resuming": 5.5,
    "usage": 6.1,
    "schema": 6.1,
    "settings_submitit": 6.15,
    "settings": 6.2,
    "stages": 6.22,
    "suggestions": 6.22,
    "settings_check": 6.25,
    "composition": 6.3,
    "preflight": 6.3,
    "build": 6.4,
    "inference": 6.45,
    "run_messages": 6.5,
    "process": 7.2,
    "jobs": 7.0,
    "job_record": 7.1,
    "ending": 7.15,
    "local": 7.3,
    "submission": 7.3,
    "launch": 7.4,
    "dry": 7.5,
    "cli": 7.5,
}
ALLOWED = {
    "hydra": {"train_app_submitit", "omnivision.training.build", "omnivision.config.hydra_guard"},
    "omegaconf": {"train_app_submitit"}
    | {
        f"omnivision.{name}"
        for name in ("settings_check", "schema", "composition", "suggestions", "hydra_guard", "launch")
    },
    "submitit": {"omnivision.launch.launcher"},
    "av": {"omnivision.data.video", "omnivision.data.encode"},
    "yaml": {
        "train_app_submitit",
        "omnivision.config.yaml_numbers",
        "omnivision.config.validate",
        "omnivision.tools.prepare.catalog_file",
        "omnivision.checkpoint.fingerprint",
        "omnivision.config.origins",
        "omnivision.config.usage",
    },
    "jinja2": {"omnivision.tools.report.page"},
    "plotly": {"omnivision.tools.report.figures"},
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


def floor(module: str) -> float:
    """The floor of a module of the package, by its longest listed prefix."""
    if module == "train_app_submitit":
        return 8
    inner = module.removeprefix("omnivision.")
    best = max(
        (
            (len(name), number, name)
            for number, names in FLOORS.items()
            for name in names
            if f"{inner}.".startswith(f"{name}.")
        ),
        default=None,
    )
    if best is None:
        raise AssertionError(f"{module} has no floor: add it to FLOORS here and to docs/architecture.md")
    return RAISED.get(best[2], best[1])


class Floors(unittest.TestCase):
    def test_a_file_imports_only_from_floors_below_its_own(self):
        known = modules()
        compared = 0
        for name, tree in known.items():
            if name == "omnivision":
                at_once = [
                    name for node in tree.body if not isinstance(node, ast.FunctionDef) for name in imports(node)
                ]
                self.assertLessEqual(set(at_once), {"__future__.annotations", "typing.Any"}, "it must cost nothing")
                continue
            for imported in imports(tree):
                target = next((t for t in (imported, imported.rpartition(".")[0]) if t in known), None)
                if target is None or target == "omnivision":
                    continue
                same_package = name.split(".")[:2] == target.split(".")[:2]
                compared += 1
                self.assertTrue(
                    floor(target) < floor(name) or (same_package and floor(target) <= floor(name)),
                    f"{name} (floor {floor(name)}) imports {target} (floor {floor(target)})",
                )
        self.assertGreater(compared, 80)

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
                    self.assertEqual(name, "omnivision.utils.safe", where)
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

    def test_the_plan_of_the_house_names_every_file(self):
        plan = (Path(ROOT) / "docs" / "architecture.md").read_text()
        for name in modules():
            parts = name.removeprefix("omnivision.").split(".")
            if parts[0] not in ("demo", "cli", "omnivision", "train_app_submitit") and len(parts) < 3:
                known = f"{parts[-1]}.py" in plan or f"{parts[-1]}/" in plan
                self.assertTrue(known, f"docs/architecture.md does not name {name}")


if __name__ == "__main__":
    unittest.main()
