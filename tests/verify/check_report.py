"""Opens the demo's report.html in headless Chromium, 1200 and 375 px wide, light and dark.

Fails where the page is wider than the window. Screenshots go to runs/verify/ to be looked at.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "runs" / "verify"
FLAGS = [
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars", "--allow-file-access-from-files",
]  # fmt: skip
# A frame, because a headless window cannot be as narrow as a phone.
FRAME = """<!doctype html><body style="margin:0"><iframe id="f" src="{url}" style="border:0;width:
{width}px;height:{height}px"></iframe><script>
document.getElementById("f").onload = e => {{
  const page = e.target.contentDocument.documentElement;
  document.title = "width " + page.scrollWidth + " height " + page.scrollHeight;
}};
</script>"""


def chromium() -> str:
    """The browser, installed from Debian's package where apt-get can."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if shutil.which("apt-get"):
        subprocess.run(["apt-get", "update", "-qq"], check=False)
        subprocess.run(["apt-get", "install", "-y", "-qq", "chromium"], check=False)
    found = shutil.which("chromium")
    if not found:
        print("skipped: no Chromium, and it could not be installed (apt-get install chromium)")
        sys.exit(77)
    return found


def browse(browser: str, profile: Path, *arguments: str) -> str:
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def main() -> None:
    browser = chromium()
    SHOTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = [sys.executable, "-m", "pocketglm", "demo", "--minutes", "0.5", "--out", "demo"]
        subprocess.run(demo, cwd=folder, check=False, stdout=subprocess.DEVNULL)
        report = folder / "demo" / "en" / "proof" / "report.html"
        sizes = []
        for width in (1200, 375):
            page = folder / f"{width}.html"
            page.write_text(FRAME.format(url=report.as_uri(), width=width, height=900))
            dom = browse(browser, folder / "profile", "--virtual-time-budget=3000", "--dump-dom",
                         page.as_uri())  # fmt: skip
            found = re.search(r"width (\d+) height (\d+)", dom)
            if not found:
                sys.exit(f"the report did not load at {width} px")
            if int(found[1]) > width:
                sys.exit(f"the report is {found[1]} px wide in a window of {width} px")
            height = int(found[2])
            sizes.append(f"{width} x {height}")
            page.write_text(FRAME.format(url=report.as_uri(), width=width, height=height))
            for scheme, value in (("light", 1), ("dark", 0)):
                browse(browser, folder / "profile", f"--window-size={max(width, 500)},{height}",
                       f"--blink-settings=preferredColorScheme={value}",
                       f"--screenshot={SHOTS / f'report-{width}-{scheme}.png'}",
                       page.as_uri())  # fmt: skip
        print(f"report.html, {report.stat().st_size // 1000} KB, fits: {', '.join(sizes)} px")


if __name__ == "__main__":
    main()
