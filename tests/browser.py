"""A real browser without a window: screenshots of a page, and measurements in it."""

import html
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
# A window is at least 500 wide; a frame in it may be a phone.
FRAME = (
    '<!DOCTYPE html><meta name="color-scheme" content="light dark"><body style="margin:0">'
    '<iframe src="{page}" style="border:0;width:{width}px;height:{height}px"></iframe>'
    "<script>onmessage = message => document.title = message.data</script></body>"
)
PROBE = (
    "<script>addEventListener('load', () => setTimeout(() => parent.postMessage(JSON.stringify({"
    "figures: document.querySelectorAll('.plotly-graph-div .main-svg').length,"
    "narrow: [...document.querySelectorAll('.plotly-graph-div')].filter(d => d.scrollWidth > innerWidth).length,"
    "wide: document.documentElement.scrollWidth - innerWidth,"
    "page: getComputedStyle(document.body).backgroundColor,"
    "ink: getComputedStyle(document.querySelector('.plotly-graph-div text') || document.body).fill,"
    "broken: [...document.images].filter(i => !i.naturalWidth).length}), '*'), 500))</script></body>"
)


def _open(page: Path, anchor: str, width: int, height: int, dark: bool, *more: str) -> subprocess.CompletedProcess[str]:
    assert CHROMIUM is not None
    with tempfile.TemporaryDirectory() as home:
        frame = Path(home) / "frame.html"
        frame.write_text(FRAME.format(page=page.resolve().as_uri() + anchor, width=width, height=height))
        command = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--enable-logging=stderr",
            f"--window-size={max(500, width)},{height}", "--virtual-time-budget=8000", f"--user-data-dir={home}/profile",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []), *more, frame.as_uri(),
        ]  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, timeout=180, env=os.environ | {"HOME": home})


def probe(page: Path, width: int, dark: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the measurements of PROBE in a page of a width in pixels, and the lines of the browser's console."""
    probed = page.with_name(f"probed_{page.name}")
    probed.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    browser = _open(probed, "", width, 900, dark, "--dump-dom")
    title = re.search(r"<title>(.*?)</title>", browser.stdout)
    assert title is not None, browser.stdout[-2000:] + browser.stderr[-2000:]
    return json.loads(html.unescape(title[1])), [line for line in browser.stderr.splitlines() if "CONSOLE" in line]


def screenshot(page: Path, anchor: str, out: Path, width: int, height: int, dark: bool) -> None:
    """Write a PNG of a page from an anchor ("#runs") on, or from its top ("")."""
    browser = _open(page, anchor, width, height, dark, f"--screenshot={out.resolve()}")
    assert out.is_file(), browser.stderr[-2000:]
