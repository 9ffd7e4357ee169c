"""Report built pages that scroll sideways on a phone or a laptop: .ci/fits.py docs/_build, after sphinx-build.

It opens every page in headless Chromium, 390 and 1280 pixels wide. A page that is wider than the window is an error. A
table that scrolls inside its own box is reported. It needs playwright, and chromium on the path.
"""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

WIDTHS = 390, 1280
WIDE = """() => {
  const wide = (x) => x.scrollWidth > x.clientWidth + 2;
  const found = wide(document.documentElement) ? ["the page"] : [];
  for (const table of document.querySelectorAll(".table-wrapper"))
    if (wide(table)) found.push("a table, " + table.innerText.trim().split("\\n")[0]);
  return found;
}"""


def pages(root: Path) -> list[Path]:
    """Return the built pages, those of source code left out."""
    return [path for path in sorted(root.rglob("*.html")) if not {"_modules", "_static"} & set(path.parts)]


def problems(tab: Page, root: Path) -> Iterator[str]:
    """Yield what is wider than the window, with its page."""
    for path in pages(root):
        tab.goto(path.resolve().as_uri(), wait_until="load")
        tab.wait_for_timeout(100)  # formulas are drawn after the page has loaded
        yield from (f"{tab.viewport_size['width']} px, {path.relative_to(root)}: {what}" for what in tab.evaluate(WIDE))


def main() -> None:
    """Print the problems; exit with status 1 if a page scrolls sideways."""
    root = Path(sys.argv[1])
    if not (root / "index.html").exists():
        sys.exit(f"fits.py: no index.html in {root}; run sphinx-build first.")
    found = []
    with sync_playwright() as playwright:
        chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        for width in WIDTHS:
            found += problems(browser.new_page(viewport={"width": width, "height": 900}), root)
        browser.close()
    print("\n".join(found))
    sys.exit(any(line.endswith("the page") for line in found))


if __name__ == "__main__":
    main()
