"""The browser for the tests of the chat page. As a program: prints where it is, or says how to get one and fails."""

import os
import shutil
import sys
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
MISSING = (
    "the tests of the chat page need Chromium and there is none: install it (Debian, Ubuntu: sudo apt-get install "
    "chromium; elsewhere: playwright install chromium), name one with CHROMIUM=/path/to/it, or leave them out: "
    "./launch/test.sh --ignore tests/serve/test_page.py"
)


def find_chromium() -> str | None:
    """The one that CHROMIUM names, one in PATH, or the one that `playwright install` put into the home folder."""
    if named := os.environ.get("CHROMIUM"):
        return shutil.which(named)
    if in_path := next(filter(None, map(shutil.which, NAMES)), None):
        return in_path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = playwright.chromium.executable_path
    return path if Path(path).exists() else None


if __name__ == "__main__":
    found = find_chromium()
    sys.exit(print(found) if found else f"error: {MISSING}")
