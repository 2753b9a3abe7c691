"""Pages as headless Chromium shows them: what they say of themselves, and a picture."""

import html
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PROBE = """
<script>
const sources = JSON.parse(document.getElementById("sources").textContent), all = [];
const ask = (frame, source) => new Promise(answer => {
  frame.addEventListener("load", () => {
    const page = frame.contentWindow, body = page.document.body;
    let waited = 0;
    const timer = setInterval(() => {
      if (!body.dataset.drawn && ++waited < 300) return;
      clearInterval(timer);
      const charts = [...page.document.querySelectorAll("[data-chart]")];
      const right = element => element.getBoundingClientRect().right;
      const text = [...page.document.querySelectorAll(".chart svg text")].filter(each => each.textContent.trim());
      answer({
        drawn: Number(body.dataset.drawn || 0),
        charts: charts.length,
        empty: charts.filter(each => !each.querySelector("svg [role=graphics-symbol]")).map(each => each.dataset.chart),
        wide: charts.filter(each => each.querySelector("svg") && right(each.querySelector("svg")) > page.innerWidth)
          .map(each => each.dataset.chart),
        cut: text.filter(each => each.getBoundingClientRect().left < 0 || right(each) > page.innerWidth)
          .map(each => each.textContent),
        overflow: page.document.documentElement.scrollWidth - page.document.documentElement.clientWidth,
        height: page.document.documentElement.scrollHeight,
        broken: [...page.document.images].filter(each => !each.naturalWidth).length,
        smallest: Math.min(...text.map(each => parseFloat(page.getComputedStyle(each).fontSize))),
        planted: page.document.querySelectorAll("b.planted, script.planted").length,
      });
    }, 100);
  });
  frame.srcdoc = source;
});
Promise.all([...document.querySelectorAll("iframe")].map((frame, place) => ask(frame, sources[place])))
  .then(said => { document.getElementById("said").textContent = JSON.stringify(said); });
</script>
"""


def found() -> str | None:
    """Chromium's command; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(
    pages: Sequence[tuple[Path, int]],  # files, and how many pixels wide each is shown
    picture: Path | None = None,
    height: int = 900,
) -> tuple[list[dict[str, Any]], list[str]]:
    """What pages say of themselves, and what came on the console. `picture`: a file to draw them in, in a column."""
    sources = json.dumps([page.read_text(encoding="utf-8") for page, _ in pages]).replace("<", "\\u003c")
    style = "border:0;display:block;height:{}px;width:{}px"
    frames = "".join(f'<iframe style="{style.format(height, width)}"></iframe>' for _, width in pages)
    held = f'<pre id="said" style="display:none"></pre><script type="application/json" id="sources">{sources}</script>'
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        outer = Path(folder) / "outer.html"
        outer.write_text(f'<!doctype html><meta charset="utf-8"><body style="margin:0">{frames}{held}{PROBE}')
        command = [str(found()), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--hide-scrollbars", "--enable-logging=stderr", "--virtual-time-budget=40000"]
        command += [f"--user-data-dir={folder}/profile"]
        command += [f"--window-size={max(500, *(width for _, width in pages))},{height * len(pages)}"]
        if picture is not None:
            subprocess.run([*command, f"--screenshot={picture}", outer.as_uri()], capture_output=True, timeout=120)
        done = subprocess.run([*command, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="said"[^>]*>(.+?)</pre>', done.stdout, re.DOTALL)
    assert match, done.stderr[-2000:]
    return json.loads(html.unescape(match[1])), [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
