"""A headless browser, if there is one, for pages that open from disk."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


def result_of(page: Path, code: str, folder: Path, size: tuple[int, int] = (1280, 900)) -> tuple[dict[str, Any], str]:
    """Open a copy of a page, run a script in it, and return what that hands to ``done`` and what the console said.

    The page's policy allows no other script than its own, so the copy has a second one, with its hash beside the first.
    Errors of the page come to the console as they would anywhere.

    Args:
        page: the page; its copy lies beside it.
        code: the body of an asynchronous function with the argument ``done``.
        folder: for the browser's profile.
        size: of the window, in pixels.
    """
    assert CHROMIUM is not None
    # A browser that only prints the document draws no frames: nothing asks for the next one, and nothing scrolls.
    script = (
        "window.requestAnimationFrame = (go) => setTimeout(go, 16);"
        "const scroll = (y) => { scrollTo(0, y); dispatchEvent(new Event('scroll')); };"
        "window.addEventListener('load', async () => { const done = (value) => {"
        "const out = document.createElement('pre'); out.id = 'handed-out'; out.textContent = JSON.stringify(value);"
        "document.body.append(out); }; const pause = (ms) => new Promise((go) => setTimeout(go, ms));"
        f"try {{ {code} }} catch (error) {{ done({{error: String(error)}}); }} }});"
    )
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = page.read_text(encoding="utf-8").replace("'sha256-", f"'sha256-{digest}' 'sha256-", 1)
    copy = page.with_name(f"tried-{page.name}")
    copy.write_text(text.replace("</body>", f"<script>{script}</script></body>"), encoding="utf-8")
    done = subprocess.run(
        [
            *(CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"),
            *("--no-first-run", "--disable-extensions", f"--user-data-dir={folder}"),
            *("--enable-logging=stderr", "--virtual-time-budget=20000", f"--window-size={size[0]},{size[1]}"),
            *("--dump-dom", copy.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    copy.unlink()
    found = re.search(r'<pre id="handed-out">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    value: dict[str, Any] = json.loads(html.unescape(found[1]))
    said = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    return value, said
