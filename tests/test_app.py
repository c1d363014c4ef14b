"""The web page in a real browser: a file is uploaded, results are seen, nothing is asked of any other server."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from urllib.parse import urlparse

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

pytest.importorskip("gradio")
pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (CHROMIUM and DRIVER):
    pytest.skip("needs chromium and chromedriver", allow_module_level=True)
PATIENCE = 300  # seconds; a busy machine is slow


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home = tmp_path_factory.mktemp("app")
    environment = {**os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(home)}
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "examples" / "app.py"], stdout=log, stderr=log, env=environment
        )
    url = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            urllib.request.urlopen(url, timeout=10).close()
            break
        except OSError:
            assert process.poll() is None, (home / "log").read_text()
            assert time.monotonic() < deadline, (home / "log").read_text()
            time.sleep(0.5)
    yield url
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def browser(tmp_path_factory, downloads):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", "window-size=1300,1100"),
        f"user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):
        options.add_argument(f"--{argument}")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture
def page(browser, address):
    browser.get(address)
    wait(browser, lambda: browser.find_elements(By.CSS_SELECTOR, "#image input[type=file]"))
    return browser


def wait(browser, condition):
    return WebDriverWait(browser, PATIENCE, 0.2, ignored_exceptions=(Exception,)).until(lambda _: condition())


def status(page):
    return page.find_element(By.CSS_SELECTOR, "#status p").text


def upload(page, path):
    page.find_element(By.CSS_SELECTOR, "#image input[type=file]").send_keys(str(path))
    wait(page, lambda: path.name in status(page))


def pixels(page):
    """Of the nucleus class, as the table says."""
    text = page.find_element(By.ID, "areas").text
    return int(re.search(r"nucleus\s+([\d,]+)", text).group(1).replace(",", ""))


def download(page, downloads, button):
    before = set(downloads.iterdir())
    page.find_element(By.ID, button).click()
    new = wait(page, lambda: [p for p in set(downloads.iterdir()) - before if p.suffix == ".png"])
    return Image.open(new[0])


def test_an_upload_is_segmented_and_the_threshold_moves(page, downloads, tmp_path):
    path = tmp_path / "upload.png"
    Image.open(ROOT / "examples" / "ihc.png").crop((0, 0, 256, 192)).save(path)
    upload(page, path)
    assert "256 x 192 pixels" in status(page)
    images = wait(page, lambda: found if len(found := page.find_elements(By.CSS_SELECTOR, "img[alt]")) >= 3 else None)
    assert {"The image with the classes drawn on it", "Map of the probability", "Map of the uncertainty"} <= {
        image.get_attribute("alt") for image in images
    }
    wait(
        page, lambda: all(i.get_property("naturalWidth") == 256 for i in images if i.get_attribute("alt")[:3] == "Map")
    )
    middle = pixels(page)
    mask = np.asarray(download(page, downloads, "mask"))
    assert mask.shape == (192, 256)
    assert set(np.unique(mask)) == {0, 1}
    assert int(mask.sum()) == middle
    assert download(page, downloads, "drawn").size == (256, 192)
    if os.environ.get("SCREENSHOT"):
        time.sleep(2)
        page.save_screenshot(os.environ["SCREENSHOT"])

    slider = page.find_element(By.CSS_SELECTOR, "#threshold input[type=range]")
    slider.send_keys(Keys.HOME)  # by the keyboard
    wait(page, lambda: pixels(page) > middle)


def test_a_wrong_file_is_told_and_clears_the_results(page, tmp_path):
    path = tmp_path / "notes.png"
    path.write_text("not an image")
    upload(page, path)
    assert "was not segmented: not a readable PNG" in status(page)
    assert page.find_element(By.CSS_SELECTOR, "#status p").get_attribute("role") == "alert"
    assert "nucleus" not in page.find_element(By.ID, "areas").text


def test_an_example_is_segmented(page):
    wait(page, lambda: page.find_elements(By.XPATH, "//button[contains(., 'ihc.png')]"))[0].click()
    wait(page, lambda: "512 x 512 pixels" in status(page))


def test_everything_has_a_name_and_the_keyboard_reaches_it(page):
    controls = page.find_elements(By.CSS_SELECTOR, "input:not([type=file]), button, a[href]")
    controls = [control for control in controls if control.is_displayed()]
    assert len(controls) >= 6
    nameless = [control.get_attribute("outerHTML")[:200] for control in controls if not control.accessible_name]
    assert not nameless
    names = " ".join(control.accessible_name for control in controls)
    for name in ("Checkpoint", "Threshold", "Download mask", "Download overlay", "ihc.png"):
        assert name in names, names
    reached = set()
    page.find_element(By.TAG_NAME, "body").click()
    for _ in range(30):
        page.switch_to.active_element.send_keys(Keys.TAB)
        element = page.switch_to.active_element
        reached.add(element.get_attribute("id") or element.tag_name)
        reached |= {a.get_attribute("id") for a in element.find_elements(By.XPATH, "ancestor::*[@id]")}
    assert {"image", "threshold", "mask", "drawn"} <= reached


def test_nothing_is_asked_of_other_servers(page):
    asked = set()
    for entry in page.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            asked.add(urlparse(event["params"]["request"]["url"]))
    assert any(url.hostname == "127.0.0.1" for url in asked)
    assert {url.hostname for url in asked if url.scheme in ("http", "https", "ws", "wss")} == {"127.0.0.1"}
