"""A headless Chromium that opens one page at a given width and says all that is wrong with it."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager

import pytest

REQUIRED = "CHUNKGLM_REQUIRE_BROWSER"

PROBLEMS = """
const wrong = [];
const name = e => `${e.tagName.toLowerCase()}.${e.className} ${(e.innerText || '').slice(0, 40)}`;
const shown = e => e.checkVisibility() && getComputedStyle(e).display !== 'contents';
const wide = document.documentElement.clientWidth;
if (document.documentElement.scrollWidth > wide) wrong.push(`page is ${document.documentElement.scrollWidth} wide of ${wide}`);
for (const e of document.body.querySelectorAll('*')) {
  if (!shown(e)) continue;
  const box = e.getBoundingClientRect();
  if (box.width && (box.left < -0.5 || box.right > wide + 0.5)) wrong.push(`outside: ${name(e)}`);
  if (e.clientWidth && e.scrollWidth > e.clientWidth + 1) wrong.push(`clipped: ${name(e)}`);
  if (e.tagName === 'IMG' && !(e.complete && e.naturalWidth > 0)) wrong.push(`no picture: ${e.alt}`);
  if (e.tagName === 'IMG' && box.width > e.naturalWidth * 1.5) wrong.push(`blurred: ${e.alt}`);
}
// Texts and pictures that lie over one another.
const pieces = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode;
  if (!node.textContent.trim() || !shown(node.parentElement)) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const box of range.getClientRects()) pieces.push([box, node.textContent.trim().slice(0, 40)]);
}
for (const e of document.images) if (shown(e)) pieces.push([e.getBoundingClientRect(), `picture ${e.alt}`]);
for (let i = 0; i < pieces.length; i++) for (let j = i + 1; j < pieces.length; j++) {
  const [a, b] = [pieces[i][0], pieces[j][0]];
  const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
  const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
  if (across > 1 && down > 3) wrong.push(`overlap: ${pieces[i][1]} / ${pieces[j][1]}`);
}
return wrong;
"""


@contextmanager
def browser(width):
    """Chromium with a window of this width; skips where there is none."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (binary and driver):
        reason = "chromium and chromedriver are not installed"
        if os.environ.get(REQUIRED) == "1":
            pytest.fail(f"{reason}, and {REQUIRED} is 1")
        pytest.skip(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            f"--user-data-dir={profile}",
        ):  # fmt: skip
            options.add_argument(flag)
        with webdriver.Chrome(options, webdriver.ChromeService(driver)) as chrome:
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
            chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            yield chrome


def problems(chrome, path):
    """Open a file; what is clipped, overlaps, lacks or complains, and every request but that for the file itself."""
    # The browser's own first page is left, and what it asked for is forgotten.
    chrome.get("about:blank")
    chrome.get_log("browser"), chrome.get_log("performance")
    chrome.get(path.as_uri())
    chrome.execute_script("document.querySelectorAll('details').forEach(e => { e.open = true; })")
    found = chrome.execute_script(PROBLEMS)
    found += [f"console: {entry['message']}" for entry in chrome.get_log("browser")]
    for entry in chrome.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            url = message["params"].get("request", message["params"])["url"]
            if url != path.as_uri() and not url.startswith("data:"):
                found.append(f"request: {url}")
    return found


def screenshot(chrome):
    """The whole page as PNG."""
    import base64

    taken = chrome.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    return base64.b64decode(taken["data"])
