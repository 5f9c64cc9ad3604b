"""The page of a set of runs in a browser: a click on a point, sorting, filters and axes, without a network."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait
from support.runs import write_run

from experiments.reporting.set_page import report_set

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1400,1000"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
ATTACK = "</script><img src=x onerror=\"document.title='attacked'\">"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        driver = webdriver.Chrome(options=options, service=Service(DRIVER))
        yield driver
        driver.quit()


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory) -> Path:
    """The page of eight runs: two criteria at two ratios, one of them with several seeds at both."""
    folder = tmp_path_factory.mktemp("runs")
    for seed, kid in enumerate((0.1, 0.15, 0.35)):
        write_run(folder, f"a-{seed}", 0.3, {"kid": kid}, f"train.py seed={seed}", seed=seed)
    write_run(folder, "b", 0.5, {"kid": 0.4}, "train.py selection.ratio=0.5")
    for ratio in (0.3, 0.5):
        for seed in (0, 1):
            name, kid = f"c-{ratio}-{seed}", ratio + seed / 10
            write_run(folder, name, ratio, {"kid": kid}, criterion__name=ATTACK, seed=seed)
    return report_set(folder)


@pytest.fixture(autouse=True)
def loaded(browser, page) -> None:
    """A fresh page before each test."""
    browser.get(page.as_uri())
    WebDriverWait(browser, 60).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#chart .points path"))


def read_rows(browser) -> list[list[str]]:
    rows = browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")
    return [[cell.text for cell in row.find_elements(By.TAG_NAME, "td")] for row in rows]


def read_traces(browser) -> list[dict]:
    traces: list[dict] = browser.execute_script(
        "return document.getElementById('chart').data.map(({x, y, name, fill}) => ({x, y, name, fill: fill ?? null}))"
    )
    return traces


def click(browser, selector: str) -> None:
    browser.find_element(By.CSS_SELECTOR, selector).click()


def click_point(browser, trace: str, number: int) -> None:
    """Click where a point of a trace is, as the drag layer of the chart lies above the points."""
    x, y = browser.execute_script(
        """
        const chart = document.getElementById("chart"), [name, number] = arguments;
        const index = chart.data.findIndex((trace) => trace.name.startsWith(name));
        const trace = chart.calcdata.find((points) => points[0].trace.index === index);
        const { xaxis, yaxis } = chart._fullLayout, box = chart.getBoundingClientRect();
        const [x, y] = [xaxis.c2p(trace[number].x), yaxis.c2p(trace[number].y)];
        return [box.left + xaxis._offset + x, box.top + yaxis._offset + y];
        """,
        trace,
        number,
    )
    actions = webdriver.ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    actions.pause(0.3).click().perform()
    WebDriverWait(browser, 20).until(lambda driver: driver.find_element(By.ID, "panel").is_displayed())


def test_the_page_loads_nothing_and_runs_nothing_of_others(browser):
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    messages = [entry["message"] for entry in browser.get_log("performance")]
    assert not any("Network.requestWillBeSent" in message and '"url":"http' in message for message in messages)
    assert browser.title != "attacked" and not browser.find_elements(By.CSS_SELECTOR, "img[src='x']")
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_curves_have_bands_only_where_there_are_seeds(browser):
    traces = {trace["name"]: trace for trace in read_traces(browser)}
    assert {name for name in traces if name.startswith("magnitude")} == {"magnitude (4 runs)"}
    assert traces["magnitude (4 runs)"]["x"] == [0.3, 0.5]
    assert traces["magnitude (4 runs)"]["y"] == pytest.approx([0.2, 0.4])
    (band,) = [trace for trace in read_traces(browser) if trace["fill"]]
    assert band["x"] == [0.3, 0.5, 0.5, 0.3, None]
    deviation = 0.05 * 2**0.5
    assert band["y"][:2] == pytest.approx([0.35 + deviation, 0.55 + deviation])
    assert [name for name in traces if name.endswith(" (2 runs each)")]
    assert "8 of 8 runs, 4 settings" in browser.find_element(By.ID, "count").text


def test_a_click_on_a_point_shows_its_run(browser, page):
    click_point(browser, "magnitude", 1)
    panel = browser.find_element(By.ID, "panel")
    assert panel.find_element(By.TAG_NAME, "h2").text.startswith("b ") and "\n1 run\n" in panel.text
    assert panel.find_element(By.ID, "command").text == "python train.py selection.ratio=0.5"
    assert panel.find_element(By.ID, "samples").get_attribute("src").startswith("data:image/webp;base64,")
    units = [unit.get_attribute("title") for unit in panel.find_elements(By.CSS_SELECTOR, ".unit")]
    assert units[:2] == ["down.0: score 1, kept", "down.1: score 0.1, removed"]
    assert panel.find_element(By.TAG_NAME, "a").get_attribute("href") == (page.parent.parent / "b/report.html").as_uri()
    click(browser, "#panel .close")
    assert not panel.is_displayed()


def test_a_point_of_several_seeds_shows_each_of_them(browser):
    click_point(browser, "magnitude", 0)
    buttons = browser.find_elements(By.CSS_SELECTOR, "#panel .seeds button")
    assert [button.text for button in buttons] == ["seed 0", "seed 1", "seed 2"]
    buttons[2].click()
    assert browser.find_element(By.ID, "command").text == "python train.py seed=2"


def test_a_column_sorts_the_table_both_ways(browser):
    for expected in ("ascending", "descending"):
        click(browser, "th[data-key='eval/kid'] button")
        (head,) = browser.find_elements(By.CSS_SELECTOR, "th[data-key='eval/kid']")
        assert head.get_attribute("aria-sort") == expected
        names = [cell.text for cell in browser.find_elements(By.CSS_SELECTOR, "#table thead th")]
        column = next(i for i, name in enumerate(names) if name.startswith("kid") and "pruned" not in name)
        values = [float(row[column].split(" ")[0]) for row in read_rows(browser)]
        assert values == sorted([0.2, 0.35, 0.4, 0.55], reverse=expected == "descending")


def test_filters_and_the_search_leave_runs_out(browser):
    click(browser, "#filter-ratio summary")
    click(browser, "#filter-ratio label:last-of-type input")
    assert browser.find_element(By.ID, "count").text == "5 of 8 runs, 2 settings"
    assert {tuple(trace["x"]) for trace in read_traces(browser) if "(" in trace["name"]} == {(0.3,)}
    browser.find_element(By.ID, "search").send_keys("a-1")
    assert browser.find_element(By.ID, "count").text == "1 of 8 runs, 1 setting"
    assert [trace["name"] for trace in read_traces(browser)] == ["magnitude (1 run)"]


def test_axes_colour_and_rows_can_be_chosen(browser):
    Select(browser.find_element(By.ID, "x")).select_by_visible_text("latency, student / teacher")
    assert {tuple(trace["x"]) for trace in read_traces(browser) if "(" in trace["name"]} == {(0.9, 0.9)}
    Select(browser.find_element(By.ID, "x")).select_by_visible_text("criterion")
    assert sorted({x for trace in read_traces(browser) for x in trace["x"]}) == [0, 1]
    Select(browser.find_element(By.ID, "y")).select_by_visible_text("output loss")
    assert {y for trace in read_traces(browser) for y in trace["y"]} == {0.5}
    Select(browser.find_element(By.ID, "colour")).select_by_visible_text("ratio")
    assert {trace["name"] for trace in read_traces(browser) if "(" in trace["name"]} == {"0.3 (5 runs)", "0.5 (3 runs)"}
    Select(browser.find_element(By.ID, "rows")).select_by_visible_text("single runs")
    assert len(read_rows(browser)) == 8


def test_the_chart_begins_with_the_measure_that_most_runs_have(browser, tmp_path):
    write_run(tmp_path, "evaluated", 0.3, {"kid": 0.1})
    write_run(tmp_path, "not-evaluated", 0.5, {})
    browser.get(report_set(tmp_path).as_uri())
    WebDriverWait(browser, 60).until(lambda driver: driver.find_elements(By.CSS_SELECTOR, "#chart .points path"))
    assert sorted(y for trace in read_traces(browser) for y in trace["y"]) == [0.5, 0.5]  # output losses of both
