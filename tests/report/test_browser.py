"""The page in a real browser: an installed Chromium, driven by Playwright. Skipped where one of them is missing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rewire.ablation.html import write as write_page
from tests.report.made_up import grid, line, write
from tests.report.test_page import EVIL

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox refuses to work for root, as which containers run.
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(write(tmp_path_factory.mktemp("runs") / "a", grid(3), torn="{"))


class Opened:
    """A page, and what it said and asked for since."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, **options: Any) -> None:
        self.trouble: list[str] = []
        self.requests: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 900}, **options)
        self.page = self.context.new_page()
        self.page.on("console", lambda message: self.trouble.append(message.text))
        self.page.on("pageerror", lambda error: self.trouble.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.trouble.append(dialog.message), dialog.dismiss()))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(file.as_uri())

    def middle(self, selector: str, across: float, down: float) -> tuple[float, float]:
        area = self.page.locator(selector).first
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        return box["x"] + across * box["width"], box["y"] + down * box["height"]


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (360, "light")])
def test_it_shows_without_errors_or_network(
    browser: Any, report: Path, tmp_path: Path, width: int, scheme: str
) -> None:
    opened = Opened(browser, report, width, color_scheme=scheme)
    opened.page.screenshot(path=tmp_path / "page.png", full_page=True)

    assert opened.trouble == [] and opened.requests == [report.as_uri()]
    assert (tmp_path / "page.png").stat().st_size > 50_000
    # Wide tables scroll by themselves, the page does not.
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    lines = opened.page.locator(".chart path.line:not(.stray)")
    widths = lines.evaluate_all("all => all.map(each => each.getBoundingClientRect().width)")
    assert len(widths) == 28 and min(widths) > 0.6 * min(width - 100, 500)
    opened.context.close()


def test_pointing_at_a_chart_tells_the_values(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    opened.page.mouse.move(*opened.middle("[data-chart='0'] .area", 0.999, 0.5))

    expected = [line(rule, seed)["history"][-1]["accuracy"] for rule in ("bp",) for seed in range(3)]
    text = opened.page.locator("#tip").inner_text()
    assert text.startswith("epoch 15") and f"{100 * sum(expected) / 3:.4g}" in text.split()
    assert text.index("bp") < text.index("dfa")
    opened.page.mouse.move(*opened.middle("h1", 0.5, 0.5))
    assert not opened.page.locator("#tip").is_visible() and opened.trouble == []
    opened.context.close()


def test_heat_maps_answer_to_pointer_and_keys(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    flagged = opened.page.locator(".heat", has_text="sdfa").first
    area = flagged.locator(".area")
    area.scroll_into_view_if_needed()
    area.focus()
    opened.page.keyboard.press("ArrowLeft")
    tip = opened.page.locator("#tip")
    assert "sdfa(layout=auto), conv1" in tip.inner_text() and "not measurable" in tip.inner_text()
    for _ in range(5):
        opened.page.keyboard.press("ArrowDown")
    assert "head" in tip.inner_text() and "0°" in tip.inner_text()
    opened.page.keyboard.press("Escape")
    assert not tip.is_visible() and opened.trouble == []
    opened.context.close()


def test_the_legend_switches_rules_off_in_all_charts(browser: Any, report: Path) -> None:
    opened = Opened(browser, report)
    button = opened.page.get_by_role("button", name="fa", exact=True)
    lines = opened.page.locator(".chart .line.r1")
    assert lines.count() == 4 and lines.first.is_visible()

    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert not any(each.is_visible() for each in lines.all())
    button.focus()
    opened.page.keyboard.press("Enter")
    assert all(each.is_visible() for each in lines.all()) and opened.trouble == []
    opened.context.close()


def test_it_reads_without_script_and_prints(browser: Any, report: Path, tmp_path: Path) -> None:
    opened = Opened(browser, report, java_script_enabled=False)
    assert opened.page.locator(".chart .line").first.is_visible()
    opened.page.pdf(path=tmp_path / "page.pdf", format="A4")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    opened.context.close()


def test_names_out_of_files_do_not_run(browser: Any, tmp_path: Path) -> None:
    file = write_page(write(tmp_path / "a", [line(EVIL, 0, model=EVIL), line("bp", 0, model=EVIL)], command=EVIL))
    opened = Opened(browser, file)
    opened.page.mouse.move(*opened.middle("[data-chart='0'] .area", 0.5, 0.5))

    assert EVIL in opened.page.locator("#tip").inner_text()
    assert opened.trouble == [] and opened.requests == [file.as_uri()]
    opened.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_say_about_accessibility(browser: Any, report: Path, scheme: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    opened = Opened(browser, report, color_scheme=scheme, bypass_csp=True)
    opened.page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    found = axe.Axe().run(opened.page)

    assert found.violations_count == 0, found.generate_report()
    opened.context.close()
