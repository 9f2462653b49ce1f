"""The screenshots of the demo's page and of reports in docs/images, taken in a real browser.

make demo && python -m tests.screenshots demo
"""

import sys
import tempfile
from pathlib import Path

from PIL import Image

from omnivision.tools.main import main
from tests.browser import screenshot
from tests.runs import ROOT

IMAGES = ROOT / "docs" / "images"
# Name, run of the demo ("." for all) or its page, anchor, width, height, dark.
SHOTS = (
    ("demo_report", "report.html", "", 1100, 1750, False),
    ("report_light", ".", "", 1100, 1500, False),
    ("report_reconstructions", ".", "#reconstructions", 1100, 620, False),
    ("report_dark", "finetune", "#evaluation-0", 1100, 1500, True),
    ("report_phone", "finetune", "", 390, 844, False),
)


def take_screenshots(demo: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, run, anchor, width, height, dark in SHOTS:
            page, out = Path(folder) / f"{name}.html", IMAGES / f"{name}.png"
            if run.endswith(".html"):
                page = demo / run
            else:
                assert main(["report", str(demo / run), "--out", str(page), "--title", "The demo"]) == 0
            screenshot(page, anchor, out, width, height, dark)
            with Image.open(out) as image:
                image.convert("RGB").crop((0, 0, width, height)).save(out, optimize=True)
            print(out)


if __name__ == "__main__":
    take_screenshots(Path(sys.argv[1]))
