"""One headless Chromium for all tests of rendered pages."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    program = os.environ.get("ALIGN_CHROMIUM") or next(filter(None, map(shutil.which, _NAMES)), None)
    if program is None:
        pytest.skip("no Chromium: install it (apt-get install chromium), or name it with ALIGN_CHROMIUM")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra `dev`")
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=program, args=_FLAGS)
        yield running
        running.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Open]:
    """`open_page(path, width=1280, theme="light", **context)`: a page with its charts drawn, offline.

    The page has `requests` (all it asked for) and `errors` (what its scripts raised or logged).
    """
    contexts = []

    def open_it(path: Path, width: int = 1280, theme: str = "light", **options: Any) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **options)
        contexts.append(context)
        context.set_offline(True)
        context.set_default_timeout(20_000)
        page = context.new_page()
        page.requests, page.errors = [], []
        page.on("request", lambda request: page.requests.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("console", lambda message: page.errors.append(message.text))
        page.goto(path.as_uri())
        if options.get("java_script_enabled", True) and page.locator(".plot").count():
            page.wait_for_selector("html[data-charts=drawn]", state="attached")
        return page

    yield open_it
    for context in contexts:
        context.close()
