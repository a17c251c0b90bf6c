"""The report in headless Chromium: it loads without a network and without errors, and its controls work.

Skipped where there is no Chromium or no driver for it (Debian: chromium and chromium-driver). A screenshot of each
colour scheme is kept in the folder that ATTNOPT_TEST_ARTEFACTS names.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from attnopt.passes.mla.spectra import Spectra
from attnopt.profiles.build import profile_program
from attnopt.profiles.profile import Profile
from attnopt.profiles.prompts import Prompts
from attnopt.profiles.report.page import render, write_report
from attnopt.profiles.settings import Settings
from tests import models

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER),
    reason="no Chromium with chromedriver here (Debian: apt install chromium chromium-driver)",
)


@pytest.fixture(scope="module")
def profile() -> Profile:
    program = models.captured("llama-wide-heads")[1]
    prompts = Prompts.of([models.inputs("llama", 4, 64)], "random")
    settings = Settings(windows=(2, 8), skip=4)
    return profile_program(program, prompts, settings, identity={"name": "a </script> <b>"}, site_metrics=(Spectra,))


@pytest.fixture(scope="module")
def report(profile: Profile, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(profile, path, model="./model")
    return path


def test_nothing_is_asked_of_the_network(profile: Profile) -> None:
    page = render(profile, model="./model")
    own = re.sub(r"<script>.*?plotly\.js v.*?</script>", "", page, count=1, flags=re.DOTALL)
    assert len(own) < len(page) / 2
    assert not re.findall(r"(?:src|href)\s*=\s*[\"'](?!data:)[^\"']+", own)
    assert not re.findall(r"@import|url\(|fetch\(|XMLHttpRequest", own)
    assert "a &lt;/script&gt; &lt;b&gt;" in own


def test_the_same_profile_gives_the_same_page(profile: Profile) -> None:
    assert render(profile, model="./model") == render(profile, model="./model")


@pytest.fixture(scope="module")
def driver() -> Iterator[Any]:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1800"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    browser.set_page_load_timeout(120)
    yield browser
    browser.quit()


def opened(driver: Any, report: Path, scheme: str) -> None:
    from selenium.webdriver.support.ui import WebDriverWait

    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    # Offline: whatever the page would fetch fails, and is logged as an error.
    driver.execute_cdp_cmd("Network.enable", {})
    driver.execute_cdp_cmd(
        "Network.emulateNetworkConditions",
        {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0},
    )
    driver.get(report.as_uri())
    WebDriverWait(driver, 120).until(lambda d: d.execute_script("return document.documentElement.dataset.ready"))


def choose(driver: Any, select: str, index: int) -> str:
    script = (
        "const s = document.getElementById(arguments[0]); s.selectedIndex = arguments[1];"
        "s.dispatchEvent(new Event('change')); return s.options[s.selectedIndex].text;"
    )
    return str(driver.execute_script(script, select, index))


def shown(driver: Any, plot: str) -> Any:
    return driver.execute_script("return document.getElementById(arguments[0]).data.map(t => t.z || t.y)", plot)


def luminance(driver: Any, name: str) -> float:
    """Of a colour of the page's body, 0 to 255."""
    text = driver.execute_script("return getComputedStyle(document.body)[arguments[0]]", name)
    return sum(float(part) for part in re.findall(r"[\d.]+", text)[:3]) / 3


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_loads_and_its_controls_work(driver: Any, report: Path, scheme: str) -> None:
    opened(driver, report, scheme)
    first = shown(driver, "heads")
    name = choose(driver, "head-metric", 2)
    second = shown(driver, "heads")
    assert first != second
    values = driver.execute_script("return JSON.parse(document.getElementById('data').textContent).heads")
    assert second == [next(metric for metric in values if metric["name"] == name)["values"]]
    tooltip = driver.execute_script("return document.getElementById('heads').data[0].text[1][3]")
    assert "layer 1, head 3" in tooltip
    assert "±" in tooltip

    pairs = shown(driver, "pairs")
    choose(driver, "pair-metric", 0)
    assert shown(driver, "pairs") != pairs

    note = driver.find_element("id", "rank-note").text
    driver.execute_script(
        "const e = document.getElementById('energy'); e.value = 0.6; e.dispatchEvent(new Event('input'));"
    )
    assert driver.find_element("id", "rank-note").text != note
    assert "60.0 %" in driver.find_element("id", "rank-note").text

    rows = driver.find_elements("css selector", "#costs tbody tr")
    cells = [cell.text for cell in rows[0].find_elements("tag name", "td")]
    choose(driver, "cost-context", 1)
    again = driver.find_elements("css selector", "#costs tbody tr")[0].find_elements("tag name", "td")
    assert cells[0] == "original" == again[0].text
    assert cells[1] != again[1].text

    assert len(driver.find_elements("css selector", "#typical figure")) >= 4
    assert driver.find_elements("css selector", "#summary li")
    contrast = abs(luminance(driver, "color") - luminance(driver, "backgroundColor"))
    assert contrast > 150
    assert (luminance(driver, "backgroundColor") < 128) == (scheme == "dark")
    errors = [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    assert errors == []
    folder = os.environ.get("ATTNOPT_TEST_ARTEFACTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder) / f"report-{scheme}.png"))


@needs_browser
def test_a_click_shows_the_heads_map(driver: Any, report: Path) -> None:
    opened(driver, report, "light")
    choose(driver, "head-metric", 0)
    driver.execute_script("document.getElementById('heads').emit('plotly_click', {points: [{x: 1, y: 0}]});")
    assert driver.find_element("id", "picture-caption").text == "layer 0, head 1"
    pixels = driver.execute_script(
        "const c = document.getElementById('picture');"
        "return [...new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data)].length"
    )
    assert pixels > 10


@needs_browser
def test_an_error_on_the_page_would_be_noticed(driver: Any, report: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    page = report.read_text()
    broken.write_text(page.replace("\n  draw();\n", "\n  draw();\n  console.error('planted');\n"))
    opened(driver, broken, "light")
    assert any("planted" in entry["message"] for entry in driver.get_log("browser"))
