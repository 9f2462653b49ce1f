"""What tests of several modules start from."""

import tempfile
import unittest
from pathlib import Path


class Folder(unittest.TestCase):
    """A test with a temporary folder."""

    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
