"""Exports are read rightly by every version of transformers that names biases differently; installs them (0.1 GB each)."""

import unittest

from tests import other_transformers
from tests.interop import test_export


class EveryVersion(test_export.Case):
    def test_scores_and_tokens(self):
        for version in other_transformers.VERSIONS:
            with self.subTest(version):
                if not other_transformers.folder_of(version).is_dir():
                    other_transformers.install(version)
                self.assert_read_rightly(version)


if __name__ == "__main__":
    unittest.main()
