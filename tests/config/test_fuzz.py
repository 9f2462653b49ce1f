"""Settings, catalogs and epochs that nobody would write: each is accepted or refused in a paragraph, and nothing else."""

import os
import tempfile
import unittest

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from omnivision.config.schema import setting_hints
from omnivision.config.validate import validate_config
from omnivision.data.catalog import Dataset, Split
from omnivision.data.sampling import EpochPlan, SourcePlan
from omnivision.utils.errors import UserError
from tests.config.test_config import FOLDER, STAGE_1, compose_config

CASES = int(os.environ.get("FUZZ_CASES", "100"))
FUZZ = settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

NAMES = st.sampled_from(list(setting_hints()))
PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20)
VALUES = st.recursive(
    PLAIN,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.just("_target_"), inner, max_size=3)
    ),
    max_leaves=6,
)


class Fuzz(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.config = compose_config(*STAGE_1, FOLDER)

    @FUZZ
    @given(st.dictionaries(NAMES, VALUES, min_size=1, max_size=3))
    def test_random_settings_are_valid_or_user_errors(self, changes: dict) -> None:
        config = self.config.copy()
        OmegaConf.set_struct(config, False)
        for name, value in changes.items():
            try:
                OmegaConf.update(config, name, value, merge=False)
            except Exception:  # OmegaConf has no such value, so that none can come from a file
                return
        try:
            validate_config(config)
        except UserError as error:
            self.assertTrue(str(error).strip())

    @FUZZ
    @given(
        st.sampled_from(["<U5", "S5", "int64", "uint8", "float32", "bool", "datetime64[s]", "complex64"]),
        st.lists(st.integers(0, 4), max_size=3),
        st.sampled_from(["int64", "int8", "uint16", "float64", "<U2", "bool"]),
        st.lists(st.integers(-3, 9), max_size=6),
        st.none() | st.integers(1, 6),
    )
    def test_random_catalogs_are_valid_or_user_errors(
        self, kind: str, shape: list, label_kind: str, labels: list, classes: int | None
    ) -> None:
        with tempfile.TemporaryDirectory() as name:
            files = {"paths": f"{name}/paths.npy", "labels": f"{name}/labels.npy"}
            np.save(files["paths"], np.zeros(shape, kind))
            np.save(files["labels"], np.array(labels, float).astype(label_kind))
            try:
                split = Split(Dataset(name="fuzz", num_classes=classes, train=files), "train")
            except UserError:
                return
            self.assertGreater(len(split), 0)
            for index in range(len(split)):
                self.assertIsInstance(split.path(index), str)
                self.assertTrue(classes is None or -1 <= split.label(index) < classes)

    @FUZZ
    @given(
        st.lists(st.tuples(st.integers(1, 60), st.integers(1, 9)), min_size=1, max_size=3),
        st.integers(0, 2**32 - 1),
        st.sampled_from([1, 2, 4]),
    )
    def test_epochs_see_each_sample_once(self, sources: list, seed: int, world: int) -> None:
        try:
            plans = {str(n): SourcePlan(size, videos * world) for n, (size, videos) in enumerate(sources)}
            plan = EpochPlan(plans, seed)
        except UserError:
            return
        seen = [
            (request.source, request.sample_index)
            for step in range(plan.steps)
            for rank in range(world)
            for request in plan.requests(0, step, rank, world)
        ]
        self.assertEqual(len(seen), len(set(seen)), "none twice")


if __name__ == "__main__":
    unittest.main()
