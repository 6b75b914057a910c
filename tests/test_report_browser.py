"""A report in headless Chromium: drawn, filtered, read by keyboard, in both themes and at the width of a phone."""

import re

import pytest
from browser import CHROMIUM, Browser
from report_runs import HOSTILE, write_run

from trl_sgpo.report.page import write_report
from trl_sgpo.report.records import read_run


pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: `apt-get install chromium`")

# Colours are drawn to be read back, because browsers write them in several forms
CONTRASTS = """
(() => {
  const context = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (colour) => {
    context.clearRect(0, 0, 1, 1);
    context.fillStyle = colour;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = ([r, g, b]) =>
    [r, g, b]
      .map((v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4))
      .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const background = (element) => {
    for (; element; element = element.parentElement) {
      const colour = rgba(getComputedStyle(element).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const element = node.parentElement;
    if (!node.data.trim() || !element.checkVisibility() || element.closest("script, title, option")) continue;
    const style = getComputedStyle(element);
    const text = luminance(rgba(element.closest("svg") ? style.fill : style.color));
    const back = luminance(background(element));
    const ratio = (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
    found.push([Math.round(ratio * 100) / 100, element.tagName + "." + element.className + ": " + node.data.trim()]);
  }
  return found;
})()
"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A report of a run with foreign text in all places, compared with another one."""
    directory = tmp_path_factory.mktemp("runs")
    runs = [
        read_run(write_run(directory / "hostile", text=HOSTILE)),
        read_run(write_run(directory / "other", steps=6)),
    ]
    write_report(runs[0], directory / "report.html", runs[1])
    return directory / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


def test_quiet_and_without_network(browser, report):
    browser.open(report)
    browser.press("Tab")
    assert browser.requests == [report.as_uri()]
    assert browser.errors == []
    assert browser.run("window.pwned") is None


def test_policy_stops_what_is_not_its_own(browser, report):
    """The policy is in force: injected scripts, styles and pictures do nothing."""
    browser.open(report)
    browser.run(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.pwned = 1'}));"
        "document.body.insertAdjacentHTML('beforeend', '<img src=\"https://example.org/x.png\" onerror=\"pwned=1\">')"
    )
    assert browser.run("window.pwned") is None
    refused = [error for error in browser.errors if "The action has been blocked" in error]
    for what in ("inline script", "inline event handler", "Loading the image"):
        assert any(what in error for error in refused), what


def test_charts_are_drawn(browser, report):
    browser.open(report)
    boxes = browser.run(
        "[...document.querySelectorAll('.chart > svg, #map')].map((svg) => {"
        "const box = svg.getBoundingClientRect();"
        "const drawn = [...svg.querySelectorAll('.line, .mark path')].map((path) => path.getTotalLength());"
        "return [box.width, box.height, Math.min(...drawn)]})"
    )
    assert len(boxes) == 9
    assert all(width > 200 and height > 100 and shortest > 5 for width, height, shortest in boxes)
    colours = browser.run(
        "[...document.querySelectorAll('#chart-reward .line')].map((l) => getComputedStyle(l).stroke)"
    )
    assert len(set(colours)) == 2 and "none" not in colours


def test_search_filters_strategies_and_rollouts(browser, report):
    browser.open(report)
    shown = "[...document.querySelectorAll('#{} > .item')].filter((item) => item.checkVisibility()).length"
    output = "document.querySelector('form[data-filters={}] output').textContent"
    strategies = browser.run(shown.format("strategies"))
    browser.run("document.querySelector('form[data-filters=strategies] input').focus()")
    for letter in "multiply00":
        browser.press(letter)
    found = browser.run(shown.format("strategies"))
    assert 0 < found < strategies == 13
    assert browser.run(output.format("strategies")) == f"{found} of 13 shown"
    assert browser.run("document.querySelectorAll('#map .mark.dim').length") > 0
    assert browser.run(shown.format("problems")) == 24
    change = "const f = document.querySelector('form[data-filters={}]'); f.elements.{}.value = '{}';"
    change += "f.dispatchEvent(new Event('input', {{bubbles: true}}))"
    browser.run("(() => {" + change.format("strategies", "text", "") + "})()")
    browser.run("(() => {" + change.format("strategies", "trust", "trusted") + "})()")
    assert browser.run(shown.format("strategies")) == 1
    browser.run("(() => {" + change.format("problems", "text", "RIDDLE-3. problem") + "})()")
    assert browser.run(shown.format("problems")) == 2
    browser.run("(() => {" + change.format("problems", "solved", "none") + "})()")
    assert browser.run(shown.format("problems")) == 0


def test_keyboard(browser, report):
    """Tab goes through the page from top to bottom; the map is one stop, in which arrows move; Enter opens."""
    browser.open(report)
    places = []
    for _ in range(400):
        browser.press("Tab")
        where = browser.run(
            "(() => { const e = document.activeElement; const all = [...document.querySelectorAll('*')];"
            "return [all.indexOf(e), e.tagName, e.className?.baseVal ?? e.className, e.textContent.slice(0, 20),"
            "getComputedStyle(e).outlineStyle + getComputedStyle(e.firstElementChild ?? e).strokeWidth] })()"
        )
        if where[1] == "BODY" or (places and where[0] <= places[-1][0]):
            break
        places.append(where)
    assert places[0][3] == "Skip to the report" and places[1][3] == "Dark theme"
    kinds = [place[1] for place in places]
    assert {"A", "BUTTON", "INPUT", "SELECT", "SUMMARY", "DIV"} <= {kind.upper() for kind in kinds}
    assert sum("mark" in place[2] for place in places) == 1
    assert all(place[4].startswith(("solid", "auto")) or "mark" in place[2] for place in places), "no focus in sight"

    browser.run("document.querySelector('#map .mark').focus()")
    first = browser.run("document.activeElement.dataset.id")
    browser.press("ArrowRight")
    second = browser.run("document.activeElement.dataset.id")
    assert second != first
    browser.press("Enter")
    assert browser.run("location.hash") == f"#s-{second}"
    browser.run("new Promise((done) => setTimeout(done))")  # until the page has heard of it
    assert browser.run("document.activeElement.parentElement.id") == f"s-{second}"
    assert browser.run("document.activeElement.parentElement.open")


@pytest.mark.parametrize("dark", [False, True])
def test_contrast(browser, report, dark):
    browser.open(report, dark=dark)
    background = "getComputedStyle(document.body).backgroundColor"
    system = browser.run(background)
    assert (sum(map(int, re.findall(r"\d+", system)[:3])) < 200) == dark
    for _ in range(2):  # the theme of the system, then the other one
        browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        found = browser.run(CONTRASTS)
        assert len(found) > 500
        assert [each for each in found if each[0] < 4.5] == []
        browser.run("document.getElementById('theme').click()")
    assert browser.run(background) == system
    pressed = browser.run("document.getElementById('theme').getAttribute('aria-pressed')")
    assert pressed == ("true" if dark else "false")


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_overflows(browser, report, width):
    browser.open(report, width=width)
    browser.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
    assert browser.run("document.documentElement.scrollWidth") == width
    outside = browser.run(
        "[...document.querySelectorAll('body *')].filter((e) => e.checkVisibility()"
        " && !e.closest('.scroll, .skip, svg')"
        f" && e.getBoundingClientRect().right > {width + 1}).map((e) => e.outerHTML.slice(0, 80))"
    )
    assert outside == []
    small = browser.run(
        "[...document.querySelectorAll('svg text')].map((t) => t.getBoundingClientRect().height).filter((h) => h < 9)"
    )
    assert small == []


def test_names_in_the_accessibility_tree(browser, report):
    browser.open(report)
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "link", "searchbox", "combobox", "image", "heading", "region", "navigation", "search", "table"}
    roles = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    assert {"button", "link", "searchbox", "combobox", "image", "heading", "navigation"} <= {role for role, _ in roles}
    assert [role for role, name in roles if role in named - {"table"} and not name.strip()] == []
