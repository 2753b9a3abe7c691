"""A page as headless Chromium shows it: what it says of itself, and a picture of it."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """
<script>
const errors = [], frame = document.getElementById("page");
frame.addEventListener("load", () => {
  const page = frame.contentWindow, body = page.document.body;
  page.addEventListener("error", event => errors.push(String(event.message)));
  let waited = 0;
  const timer = setInterval(() => {
    if (!body.dataset.drawn && ++waited < 300) return;
    clearInterval(timer);
    const charts = [...page.document.querySelectorAll("[data-chart]")];
    const right = element => element.getBoundingClientRect().right;
    const text = [...page.document.querySelectorAll(".chart svg text")].filter(each => each.textContent.trim());
    document.getElementById("said").textContent = JSON.stringify({
      drawn: Number(body.dataset.drawn || 0),
      charts: charts.length,
      empty: charts.filter(each => !each.querySelector("svg [role=graphics-symbol]")).map(each => each.dataset.chart),
      wide: charts.filter(each => each.querySelector("svg") && right(each.querySelector("svg")) > page.innerWidth)
        .map(each => each.dataset.chart),
      cut: text.filter(each => each.getBoundingClientRect().left < 0 || right(each) > page.innerWidth)
        .map(each => each.textContent),
      overflow: page.document.documentElement.scrollWidth - page.innerWidth,
      height: page.document.documentElement.scrollHeight,
      broken: [...page.document.images].filter(each => !each.naturalWidth).length,
      smallest: Math.min(...text.map(each => parseFloat(page.getComputedStyle(each).fontSize))),
      planted: page.document.querySelectorAll("b.planted, script.planted").length,
      errors,
    });
  }, 100);
});
frame.srcdoc = JSON.parse(document.getElementById("source").textContent);
</script>
"""


def found() -> str | None:
    """Chromium's command; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: Path, width: int, picture: Path | None = None, height: int = 900) -> dict[str, Any]:
    """What a page says of itself when it is so many pixels wide, and its console's messages."""
    source = json.dumps(page.read_text(encoding="utf-8")).replace("<", "\\u003c")
    frame = f'<iframe id="page" style="border:0;display:block;width:{width}px;height:{height}px"></iframe>'
    with tempfile.TemporaryDirectory() as folder:
        outer = Path(folder) / "outer.html"
        said = '<pre id="said" style="display:none"></pre>'
        held = f'<script type="application/json" id="source">{source}</script>'
        outer.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frame}{said}{held}{PROBE}')
        command = [str(found()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += [f"--user-data-dir={folder}/profile", f"--window-size={max(width, 500)},{height}"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=40000", "--hide-scrollbars"]
        if picture is not None:
            subprocess.run([*command, f"--screenshot={picture}", outer.as_uri()], capture_output=True, timeout=120)
        done = subprocess.run([*command, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="said"[^>]*>(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {**json.loads(html.unescape(match[1])), "console": console}
