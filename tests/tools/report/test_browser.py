"""The pages of real runs and of a comparison, in headless Chromium."""

import json
import shutil
from contextlib import contextmanager

import pytest

from tests.tools.report.conftest import HOSTILE
from vlm_sapo.tools.compare import compare_command
from vlm_sapo.tools.report.command import report_command

pytestmark = pytest.mark.report
COLOURED = "nodes => nodes.some(node => !/ 0\\)$/.test(node.style.backgroundColor || ' 0)'))"


@contextmanager
def opened(chromium, path, view):
    """The page of a file; at the end it must have made no request and raised no error."""
    width = 390 if view == "phone" else 1280
    scheme = "dark" if view == "dark" else "light"
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    requests, errors = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
    page.goto(path.as_uri())
    yield page
    assert not [url for url in requests if not url.startswith((path.as_uri(), "data:", "blob:"))]
    assert not errors and page.evaluate("window.hacked") is None
    context.close()


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("pages") / "report.html"
    report_command(runs, out, groups=100, watch=False, port=0)
    return out


@pytest.fixture(params=["light", "dark", "phone"])
def page(request, chromium, report):
    with opened(chromium, report, request.param) as page:
        yield page


@pytest.fixture(params=["light", "dark", "phone"])
def comparison(request, chromium, runs, tmp_path):
    """Of a run's first evaluation with itself, but every other score changed and hostile text in it."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for number, folder in enumerate(folders):
        shutil.copytree(runs[0] / "evaluations/step_000000", folder)
        rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        for row in rows:
            score = float(row["row"] % 2 == number)
            row |= {"problem": HOSTILE, "responses": [HOSTILE], "scores": [score]}
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    compare_command(*folders, tmp_path / "compare.html")
    with opened(chromium, tmp_path / "compare.html", request.param) as page:
        yield page


def test_a_comparison_shows_its_table_and_changed_problems(comparison):
    assert comparison.inner_text("#title") == "Comparison"
    cells = comparison.locator("#page-summary tbody td").all_inner_texts()
    assert cells[0] == "held-out" and cells[4] == "+0.000" and cells[6] == cells[7] == "3"
    comparison.click("#tab-browser")
    assert comparison.inner_text("#counter") == "1 of 6"
    assert comparison.locator("#item .sides h3").all_inner_texts() == [
        "A: mean reward 1.00",
        "B: mean reward 0.00",
    ]
    assert comparison.locator("#item article").count() == 2
    assert "onerror" in comparison.locator("#item article .text").first.inner_text()
    assert comparison.locator("#item .frame img").first.evaluate("node => node.naturalWidth > 0")
    assert inside(comparison, "#item article")
    comparison.select_option("#filter", "wins")
    assert comparison.inner_text("#counter") == "1 of 3"
    assert not comparison.locator("#colour").is_visible(), "evaluations have no token values"


def test_a_comparison_without_changes_shows_all_problems(chromium, runs, tmp_path):
    folder = runs[0] / "evaluations/step_000000"
    compare_command(folder, folder, tmp_path / "compare.html")
    with opened(chromium, tmp_path / "compare.html", "light") as page:
        assert "no problem's score changed" in page.inner_text("#page-summary .findings")
        assert page.inner_text("#tab-browser") == "Problems"
        page.click("#tab-browser")
        assert "No verdict changed" in page.inner_text("#page-browser")
        assert page.inner_text("#counter") == "1 of 6" and page.locator("#item article").count() == 2
        assert not page.locator("#filter").is_visible()


def inside(page, selector: str) -> bool:
    """Whether everything that matches lies within the window's width."""
    edges = page.eval_on_selector_all(selector, "nodes => nodes.map(n => n.getBoundingClientRect().right)")
    return bool(edges) and max(edges) <= page.viewport_size["width"] + 1


def test_every_tab_shows_its_charts(page):
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


def test_next_and_previous_step_through_responses(page):
    page.click("#tab-browser")
    first, total = map(int, page.inner_text("#counter").split(" of "))
    assert first > 1 and page.locator("#item article").count() == 4
    assert page.eval_on_selector_all("#item .text span", COLOURED), "the first group shown taught something"
    assert len(set(page.locator("#item article header b").all_inner_texts())) > 1
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#counter") == f"{first % total + 1} of {total}"
    assert page.locator("#item .frame img").first.evaluate("node => node.complete && node.naturalWidth > 0")
    for _ in range(first):
        page.click("#previous")
    assert page.inner_text("#counter").startswith("1 of ")
    page.select_option("#colour", "none")
    assert page.inner_text("#counter").startswith("1 of "), "colours keep the group"
    assert "onerror" in page.locator("#item article .text").first.inner_text()
    page.focus("#next")
    page.keyboard.press("ArrowLeft")
    total = page.inner_text("#counter").split(" of ")
    assert total[0] == total[1], "previous of the first is the last"
    assert inside(page, "#item article")


def test_responses_can_be_filtered_and_coloured(page):
    page.click("#tab-browser")
    page.select_option("#filter", "mixed")
    mixed = int(page.inner_text("#counter").split(" of ")[1])
    rewards = page.locator("#item article header b").all_inner_texts()
    assert mixed and len(set(rewards)) == 2
    for name in ("log_ratio", "attenuated", "entropy"):
        page.select_option("#colour", name)
        for _ in range(mixed):  # log r is 0 in the first mini-batch
            if page.eval_on_selector_all("#item .text span", COLOURED):
                break
            page.click("#next")
        else:
            pytest.fail(f"nothing is coloured by {name}")
    page.select_option("#run", "1")
    assert int(page.inner_text("#counter").split(" of ")[1]) == mixed
    page.select_option("#filter", "truncated")
    assert page.inner_text("#counter") != ""


def test_responses_can_be_searched_and_sorted(page):
    page.click("#tab-browser")
    page.select_option("#colour", "none")
    page.fill("#search", "ONERROR")
    assert page.inner_text("#counter") == "1 of 1"
    assert page.evaluate("[...CSS.highlights.get('search')].map(String)") == ["onerror", "onerror"]
    page.fill("#search", "in no text at all")
    assert page.inner_text("#counter") == "none" and "Nothing matches" in page.inner_text("#item")
    page.fill("#search", "")
    page.select_option("#task", "data/shapes.py:rows")
    for name, first_is_least in (("low", True), ("high", False)):
        page.select_option("#sort", name)
        first = page.locator("#item p", has_text="Mean reward").inner_text()
        page.click("#previous")
        last = page.locator("#item p", has_text="Mean reward").inner_text()
        assert (first < last) == first_is_least
    page.select_option("#sort", "clipped")
    assert page.inner_text("#counter").startswith("1 of ")


def test_a_summary_in_sentences(page):
    lines = page.locator("#page-summary .findings li").all_inner_texts()
    assert sum("held-out: " in line and "95 % interval" in line for line in lines) == 2, "one for each run"
    assert any(line.startswith("In order") and "mismatch" in line for line in lines)
    assert inside(page, "#page-summary .findings li")


@pytest.mark.parametrize("view", ["light", "phone"])
def test_the_page_of_an_evaluation(chromium, runs, tmp_path, view):
    out = tmp_path / "evaluation.html"
    report_command([runs[0] / "evaluations/step_000000"], out, groups=None, watch=False, port=0)
    assert out.stat().st_size < 1_000_000, "a page without charts needs no chart library"
    with opened(chromium, out, view) as page:
        assert page.inner_text("#title") == "Evaluation step_000000"
        assert "held-out: pass@1" in page.inner_text(".findings")
        assert page.locator("#page-summary tbody tr").first.inner_text().startswith("held-out\t6\t")
        assert page.locator(".interval").first.evaluate("node => node.getBoundingClientRect().width > 50")
        page.click("#tab-browser")
        assert page.inner_text("#counter") == "1 of 6" and page.locator("#item article").count() == 1
        assert page.locator("#item .frame img").first.evaluate("node => node.naturalWidth > 0")
        page.fill("#search", page.locator("#item .problem .text").inner_text()[:20])
        assert page.inner_text("#counter").startswith("1 of ")
        assert inside(page, "#item article")


def test_keyboard_and_screen_readers(page):
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


def test_the_ratio_tab_follows_its_slider(page):
    page.click("#tab-gate")
    page.wait_for_selector("#page-gate .chart svg.main-svg")
    before = page.inner_text("#page-gate output")
    page.fill("#page-gate input[type=range]", "0")
    assert page.inner_text("#page-gate output") == "1" != before


@pytest.mark.parametrize("view", ["light", "dark", "phone"])
def test_turns_are_labelled_and_the_environments_tokens_are_grey(chromium, runs, tmp_path, view):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    trace = [json.loads(line) for line in (run / "traces.jsonl").read_text().splitlines()]
    talk = [("policy", "zoom in", []), ("environment", HOSTILE, rows[0]["pictures"]), ("policy", "two", [])]
    turns = [{"by": by, "text": text, "pictures": files} for by, text, files in talk]
    rows[0] |= {"turns": turns, "counts": {"turns": 2, "calls": 1}, "finish": "turns", "tokens": 3}
    own = [1, 0, 0, 0, 1]
    texts = ["zoom", "<|pad|>", "<|pad|>", "<|pad|>", "two"]
    columns = {"pieces": texts, "policy": own, "log_ratio": [1.0, 0, 0, 0, -1.0], "effective": own}
    for name, values in (columns | {"entropy": own}).items():
        trace[0].setdefault(name, [[]] * 4)
        trace[0][name][0] = values
    for name, lines in (("rollouts", rows[:4]), ("traces", trace[:1])):
        (run / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_command([run], tmp_path / "page.html", groups=100, watch=False, port=0)
    with opened(chromium, tmp_path / "page.html", view) as page:
        page.click("#tab-browser")
        page.select_option("#colour", "log_ratio")
        first = page.locator("#item article").first
        assert first.locator("h4").all_inner_texts() == ["model", "environment", "model"]
        assert first.locator(".text").all_inner_texts()[1:] == [
            "<|pad|> x3",
            "two ... (1 more tokens are not traced)",
        ]
        assert first.locator(".text span.other").count() == 1
        assert first.locator(".returned img").evaluate("node => node.naturalWidth > 0")
        for words in ("3 tokens", "2 turns", "1 call", "ended: limit of turns"):
            assert words in first.locator("header").inner_text()
        page.select_option("#colour", "none")
        assert first.locator(".text").all_inner_texts()[::2] == ["zoom in", "two"]
        assert "onerror" in first.locator(".text").nth(1).inner_text()
        page.fill("#search", "ONERROR")
        assert page.inner_text("#counter") == "1 of 1"
        assert inside(page, "#item article, #item .turn")
