"""Video models by the PPMA recipe. Importing this package imports nothing heavy.

`omnivision.load(RUN_OR_FILE)` gives a trained model with its preprocessing; see `omnivision.tools.video_model`.
"""

from __future__ import annotations

import logging
from typing import Any

logging.getLogger(__name__).addHandler(logging.NullHandler())  # no output to the console before a run has its log


def __getattr__(name: str) -> Any:
    if name == "load":  # imported on demand, because it pulls in torch
        from omnivision.tools.video_model import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
