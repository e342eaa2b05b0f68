"""The report of real runs in headless Chromium."""

import shutil

import pytest

from vlm_sapo.tools.report.command import report_command

pytestmark = pytest.mark.report
COLOURED = "nodes => nodes.some(node => !/ 0\\)$/.test(node.style.backgroundColor || ' 0)'))"


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=["light", "dark", "phone"])
def page(request, chromium, runs, tmp_path):
    """The report, opened from disk; in the end it has asked for nothing and raised nothing."""
    out = tmp_path / "report.html"
    report_command(runs, out, groups=100, watch=False, port=0)
    width = 390 if request.param == "phone" else 1280
    scheme = "dark" if request.param == "dark" else "light"
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    made = context.new_page()
    requests, errors = [], []
    made.on("request", lambda asked: requests.append(asked.url))
    made.on("pageerror", lambda error: errors.append(str(error)))
    made.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    made.goto(out.as_uri())
    yield made
    assert not [url for url in requests if not url.startswith((out.as_uri(), "data:", "blob:"))]
    assert not errors and made.evaluate("window.hacked") is None
    context.close()


def inside(page, selector: str) -> bool:
    """Whether everything that matches lies within the window's width."""
    edges = page.eval_on_selector_all(selector, "nodes => nodes.map(n => n.getBoundingClientRect().right)")
    return bool(edges) and max(edges) <= page.viewport_size["width"] + 1


def test_every_page_is_drawn(page):
    assert page.inner_text("#title") == "run and other"
    assert page.locator("#page-summary tbody tr").count() > 4
    for name, charts in (("summary", 1), ("curves", 8), ("gate", 8)):
        page.click(f"#tab-{name}")
        page.wait_for_function(
            f"document.querySelectorAll('#page-{name} .chart svg.main-svg').length >= {charts}"
        )
        page.wait_for_timeout(300)
        assert inside(page, f"#page-{name} figure, #page-{name} .chart svg.main-svg")
        assert page.locator(f"#page-{name}").is_visible()
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (background == "rgb(255, 255, 255)") != dark


def test_stepping_through_responses(page):
    page.click("#tab-browser")
    assert page.inner_text("#counter").startswith("1 of ")
    assert page.locator("#item article").count() == 4
    assert "onerror" in page.locator("#item article .text").first.inner_text()
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#counter").startswith("2 of ")
    assert page.locator("#item .frame img").first.evaluate("node => node.complete && node.naturalWidth > 0")
    page.click("#previous")
    page.keyboard.press("ArrowLeft")
    total = page.inner_text("#counter").split(" of ")
    assert total[0] == total[1], "from the first one back to the last"
    assert inside(page, "#item article")


def test_filters_runs_and_colours(page):
    page.click("#tab-browser")
    page.select_option("#filter", "mixed")
    mixed = int(page.inner_text("#counter").split(" of ")[1])
    rewards = page.locator("#item article header b").all_inner_texts()
    assert mixed and len(set(rewards)) == 2
    for name in ("log_ratio", "attenuated", "entropy"):
        page.select_option("#colour", name)
        for _ in range(mixed):  # those of the first mini-batch have log r 0
            if page.eval_on_selector_all("#item .text span", COLOURED):
                break
            page.click("#next")
        else:
            pytest.fail(f"nothing is coloured by {name}")
    page.select_option("#run", "1")
    assert int(page.inner_text("#counter").split(" of ")[1]) == mixed
    page.select_option("#filter", "cut")
    assert page.inner_text("#counter") != ""


def test_by_keyboard_and_for_screen_readers(page):
    page.focus("#tab-summary")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.id") == "tab-curves"
    assert page.get_attribute("#tab-curves", "aria-selected") == "true"
    assert page.locator("#page-curves").is_visible() and not page.locator("#page-summary").is_visible()
    labels = page.eval_on_selector_all(".chart", "nodes => nodes.map(n => n.getAttribute('aria-label'))")
    assert all("mean" in label or "to" in label for label in labels)
    named = page.eval_on_selector_all(
        "select, input", "nodes => nodes.every(n => n.labels.length || n.getAttribute('aria-label'))"
    )
    assert named


def test_the_updates_page_follows_its_slider(page):
    page.click("#tab-gate")
    page.wait_for_selector("#page-gate .chart svg.main-svg")
    before = page.inner_text("#page-gate output")
    page.fill("#page-gate input[type=range]", "0")
    assert page.inner_text("#page-gate output") == "1" != before
