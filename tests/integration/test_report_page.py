"""The report of a demo run and of a sample run, opened in Chromium. Needs Debian's chromium and
chromium-driver.
"""

import json
import re
import shutil
from contextlib import contextmanager

import pytest
from typer.testing import CliRunner

from kvruntime.cli import app
from kvruntime.report.record import load_run
from kvruntime.sizes import in_units

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not (BROWSER and DRIVER), reason="chromium or chromedriver is missing"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # selenium's sockets
]
SERIOUS = ("serious", "critical")


def command(*arguments):
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module", params=["demo", "sample"])
def page(request, tmp_path_factory):
    """The folder of a run with RUN.json and report.html."""
    out = tmp_path_factory.mktemp(request.param)
    if request.param == "demo":
        command("demo", "--count", 2, "--out", out)
    else:
        command("sample", "emoji64", "--count", 2, "--batch", 2, "--out", out)
    command("report", out / "RUN.json")
    return out


@contextmanager
def opened(path, width=1000, scheme="light"):
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    try:
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
        scheme = [{"name": "prefers-color-scheme", "value": scheme}]
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        driver.get(f"file://{path}")
        yield driver
    finally:
        driver.quit()


def asked_for(driver):
    """Addresses that the page has asked for, but for its own and what lies in it."""
    events = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    sent = [event for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [event["params"]["request"]["url"] for event in sent]
    return [url for url in urls if not url.startswith("data:")]


def of_all(driver, selector, value):
    """A value of each element, in the order of the page."""
    return driver.execute_script(
        f"return [...document.querySelectorAll('{selector}')].map(one => {value})"
    )


@pytest.mark.parametrize(("width", "scheme"), [(1000, "light"), (390, "dark")])
def test_the_page_in_a_browser(page, width, scheme):
    from axe_core_python.selenium import Axe

    path, run = page / "report.html", load_run(page / "RUN.json")
    assert path.stat().st_size < 3 * 2**20
    with opened(path, width, scheme) as driver:
        assert driver.get_log("browser") == [], "no errors"
        assert asked_for(driver) == [f"file://{path}"], "nothing elsewhere"
        assert driver.execute_script("return document.documentElement.scrollWidth") <= width
        found = Axe().run(driver)
        assert not [one["id"] for one in found["violations"] if one["impact"] in SERIOUS]
        text = driver.execute_script("return document.body.innerText")
        for figure in (in_units(run.bytes.pages), in_units(run.bytes.own), str(run.budget_tokens)):
            assert figure in text
        steps = len(run.curves.used)
        assert f"equal at {steps} of {steps}" in text
        assert text.count(" dB") >= sum(one.psnr_db is not None for one in run.pictures)
        names = of_all(driver, "svg", "one.getAttribute('aria-label')")
        assert len(names) == 3 + len(run.origin) and all(names)
        cells = of_all(driver, ".heat td", "Number(one.innerText)")
        kept = [round(tokens) for line in run.tokens for tokens in line]
        assert len(cells) == len(kept) and all(
            abs(a - b) <= 1 for a, b in zip(cells, kept, strict=True)
        )


def test_what_can_be_moved_moves(page):
    run = load_run(page / "RUN.json")
    with opened(page / "report.html") as driver:
        sliders = driver.find_elements("css selector", "input[type=range]")
        assert len(sliders) == sum(one.own is not None for one in run.pictures)
        if not sliders:
            return
        sliders[1].send_keys("\ue012" * 10)  # the arrow to the left, ten times
        cuts = of_all(driver, ".stack", "getComputedStyle(one).getPropertyValue('--cut')")
        assert cuts == ["", "40%"]
        blend = "getComputedStyle(one).mixBlendMode"
        assert of_all(driver, ".over", blend) == ["normal"] * 2
        driver.find_element("id", "difference").send_keys(" ")
        assert of_all(driver, ".over", blend) == ["difference"] * 2
        assert of_all(driver, ".origin:not([hidden])", "one.dataset.layer") == ["0"]
        driver.find_element("css selector", "input[type=radio]").send_keys("\ue015")  # down
        assert of_all(driver, ".origin:not([hidden])", "one.dataset.layer") == ["1"]


def test_without_scripts_everything_but_the_sliders_is_there(page):
    html = (page / "report.html").read_text()
    still = re.sub(r"<script>.*</script>", "", html, flags=re.DOTALL)
    (page / "still.html").write_text(still)
    with opened(page / "still.html") as driver:
        text = driver.execute_script("return document.body.innerText")
    for heading in (
        "Pictures",
        "Memory over the generation",
        "Budgets",
        "Bytes by kind",
        "The run",
    ):
        assert heading in text
