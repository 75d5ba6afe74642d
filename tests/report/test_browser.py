"""The page in a real browser: no errors, nothing fetched, and it does what it looks like.

Needs Chromium (Debian and Ubuntu: apt-get install chromium; `make browser` tries), else these tests skip with the reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mae_et.report.join import make_benchmark
from mae_et.report.page import write_report
from tests.report.folders import classify, example, pretrain
from tests.report.test_hostile import HOSTILE, hostile_runs

api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: make env")
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: apt-get install chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with api.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, headless=True, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(make_benchmark([example(folder / "runs")]), folder / "out")
    return folder / "out" / "report.html"


class Visit:
    """An open page with all that it asked for and complained of."""

    def __init__(self, browser, file: Path, **context) -> None:
        self.context = browser.new_context(**{"viewport": DESKTOP, **context})
        self.page = self.context.new_page()
        self.requests: list[str] = []
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.faults.append(message.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.faults.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.goto(file.resolve().as_uri())

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def fetched(self) -> list[str]:
        """Requests but for the page itself and what lies inside it."""
        return [url for url in self.requests[1:] if not url.startswith("data:")]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_page__renders_without_errors_requests_or_overflow(browser, page_file, size, scheme):
    with Visit(browser, page_file, viewport=size, color_scheme=scheme) as visit:
        page = visit.page
        assert page.locator("h1").inner_text() == "Transfer benchmark"
        assert page.locator("figure.chart svg:visible").count() >= 5
        page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
        page.mouse.wheel(0, 100_000)
        assert visit.overflow() == 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        shade = sum(int(part) for part in background.removeprefix("rgb(").rstrip(")").split(", ")[:3])
        assert shade > 600 if scheme == "light" else shade < 150
        assert (visit.faults, visit.fetched()) == ([], [])


def test_page__first_screen_answers(browser, page_file):
    """The verdict comes first, then running jobs and totals, without scrolling."""
    with Visit(browser, page_file) as visit:
        verdict = visit.page.locator("#verdict")
        words = verdict.inner_text()
        assert "No difference was seen between etpp 16-24-32, 2 eq. epochs and constant 32, 4 eq. epochs" in words
        assert "Cost: 2x fewer FLOPs, 2 ± 0.05x less time" in words
        assert "at 40% of its compute" in visit.page.locator("#running").inner_text()
        tiles = visit.page.locator(".tile")
        assert "5 runs, 2 recipes" in tiles.nth(0).inner_text()
        assert "Random weights were run as the control." in tiles.nth(2).inner_text()
        tops = [one.bounding_box()["y"] for one in (verdict, visit.page.locator("#running"), tiles.nth(0))]
        assert tops == sorted(tops)
        assert all(tiles.nth(i).bounding_box()["y"] + tiles.nth(i).bounding_box()["height"] < 900 for i in range(3))


def test_page__tables_sort_by_value(browser, page_file):
    with Visit(browser, page_file) as visit:
        one = visit.page.locator("#pretraining table")
        heading = one.locator("thead th", has_text="wall time")
        index = heading.evaluate("(cell) => cell.cellIndex")

        def seen():
            return [one.locator("tbody tr").nth(i).locator("th, td").nth(index).inner_text() for i in range(2)]

        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == "ascending"
        assert [words.split()[0] for words in seen()] == ["51", "102"]  # as text it would be the other way round
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == "descending"
        assert [words.split()[0] for words in seen()] == ["102", "51"]
        worth = visit.page.locator("#transfer table").first
        column = worth.locator("thead th", has_text="linear probe top-1")
        for _ in range(2):  # random weights have no linear probe here: last either way
            column.locator("button").click()
            assert worth.locator("tbody tr").last.inner_text().startswith("random weights")


def test_page__figures_toggle_axis_and_series(browser, page_file):
    with Visit(browser, page_file) as visit:
        figure = visit.page.locator("figure#loss_1")
        assert figure.locator(".variant:visible").count() == 1
        assert figure.locator(".variant1").is_visible()
        figure.locator("label", has_text="wall time").click()
        assert figure.locator(".variant2").is_visible()
        assert not figure.locator(".variant1").is_visible()
        button = figure.locator(".legend button").first
        lines = figure.locator(".variant2 svg g[id$='-0']")
        before = lines.count()
        assert before >= 1
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert figure.locator(".variant2 svg g[id$='-0'].off").count() == before
        button.click()
        assert figure.locator(".variant2 svg g.off").count() == 0


def test_page__csv_is_one_click_away(browser, page_file):
    with Visit(browser, page_file, accept_downloads=True) as visit:
        with visit.page.expect_download() as waiting:
            visit.page.locator("#pretraining a.csv").first.click()
        text = Path(waiting.value.path()).read_text(encoding="utf-8")
        assert waiting.value.suggested_filename == "pretraining.csv"
        assert text.splitlines()[0].startswith("pre-training,model,target")
        assert "etpp_0; etpp_1; etpp_2" in text
        beside = page_file.parent / "tables" / "pretraining.csv"
        assert text == beside.read_text(encoding="utf-8")


def test_page__theme_button(browser, page_file):
    with Visit(browser, page_file, color_scheme="dark") as visit:
        color = "getComputedStyle(document.body).backgroundColor"
        dark = visit.page.evaluate(color)
        visit.page.locator("#theme").click()
        assert visit.page.evaluate(color) != dark
        visit.page.locator("#theme").click()
        assert visit.page.evaluate(color) == dark


def test_page__works_without_javascript(browser, page_file):
    with Visit(browser, page_file, java_script_enabled=False) as visit:
        figure = visit.page.locator("figure#loss_1")
        figure.locator("label", has_text="wall time").click()
        assert figure.locator(".variant2").is_visible()
        assert visit.page.locator("#pretraining tbody tr").count() == 2


def test_page__prints(browser, page_file):
    with Visit(browser, page_file, color_scheme="dark") as visit:
        visit.page.emulate_media(media="print")
        assert visit.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert not visit.page.locator("nav").is_visible()
        assert visit.page.pdf(format="A4").startswith(b"%PDF")


def test_page__hostile_runs_do_nothing(browser, tmp_path):
    write_report(make_benchmark([hostile_runs(tmp_path / "runs")]), tmp_path / "out")
    with Visit(browser, tmp_path / "out" / "report.html") as visit:
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("window.stolen") is None
        assert visit.page.locator("img[src='x']").count() == 0
        assert (visit.faults, visit.fetched()) == ([], [])
        assert HOSTILE["script"] in visit.page.locator("body").inner_text()


def test_page__empty_sections_are_left_out(browser, tmp_path):
    classify(tmp_path / "runs" / "knn", None, 0.3)
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    with Visit(browser, tmp_path / "out" / "report.html") as visit:
        assert visit.page.locator("#pretraining").count() == 0
        assert "no pre-training given" in visit.page.locator(".tiles").inner_text()
        assert visit.faults == []


def test_page__many_long_names_fit_a_phone(browser, tmp_path):
    for i in range(12):
        pretrain(
            tmp_path / "runs" / f"{'a_very_long_name_without_a_space' * 3}_{i}", optimizer__base_lr=0.001 * (i + 1)
        )
    write_report(make_benchmark([tmp_path / "runs"]), tmp_path / "out")
    with Visit(browser, tmp_path / "out" / "report.html", viewport=PHONE) as visit:
        assert visit.overflow() == 0
        assert visit.faults == []
