"""The tests. Discovering all of them runs their modules side by side; `tests.parallel` says how."""

from tests.parallel import load_tests

__all__ = ["load_tests"]
