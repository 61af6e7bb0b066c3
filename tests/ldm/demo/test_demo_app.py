"""The page in a real browser: Debian's Chromium, driven by Playwright. DEMO_SCREENSHOTS=FOLDER
keeps what it looked like."""

import io
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from ldm_runs import TREE
from PIL import Image

pytest.importorskip("streamlit", reason="streamlit is not installed (requirements-extras.txt)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-extras.txt)")
CHROMIUM = "/usr/bin/chromium"
FLAGS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync
""".split()
WAIT_MS = 300_000  # for a training on a busy machine
SCREENSHOTS = os.environ.get("DEMO_SCREENSHOTS")
# Steps between measurements, measurements a window, steps of a picture: as few as will do, or
# enough to look at.
INTERVAL, WINDOW, STEPS = (2, 5, 20) if SCREENSHOTS else (1, 2, 4)


@pytest.fixture
def server(tmp_path):
    """(address, root folder) of a page of its own."""
    (tmp_path / "runs").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "streamlit", "run", str(TREE / "demo_app.py"), "--server.port", str(port)]
    words += ["--server.address", "127.0.0.1", "--server.headless", "true", "--browser.gatherUsageStats", "false"]
    words += ["--server.fileWatcherType", "none", "--", "--root", str(tmp_path / "runs")]
    log = open(tmp_path / "server.log", "w")
    process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, (tmp_path / "server.log").read_text()
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}", tmp_path / "runs"
    finally:
        process.kill()
        process.wait()
        log.close()


@pytest.fixture
def page():
    if not Path(CHROMIUM).exists():
        pytest.skip(f"no browser at {CHROMIUM}: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(WAIT_MS)
        yield page
        browser.close()


def type_into(page, label, value):
    field = page.get_by_label(label)
    field.fill(str(value))
    field.press("Enter")


def set_until(page, words, fill_in):
    """Fill a field in until the command shows the words: a page that is drawn anew meanwhile can
    swallow what is typed."""
    for _ in range(20):
        try:
            fill_in()
            page.get_by_text(words).wait_for(timeout=10_000)
            return
        except playwright.TimeoutError:
            page.keyboard.press("Escape")
    raise AssertionError(f"{words!r} has not come into {page.get_by_test_id('stCode').inner_text()!r}")


def choose(page, label, option):
    page.get_by_role("combobox", name=label).click(timeout=10_000)
    page.get_by_role("option", name=option, exact=True).click(timeout=10_000)


def keep(page, name):
    if SCREENSHOTS:
        page.wait_for_timeout(8000)
        page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png")


def test_start_a_training_watch_it_stop_and_compare_pictures(server, page, tmp_path):
    address, root = server
    page.goto(f"{address}/start")
    set_until(page, "--output_name portraits", lambda: type_into(page, "Name", "portraits"))
    page.get_by_label("Prompts for sample pictures").fill(f"portrait, boy, fluent 3d style --d 1 --l 5 --s {STEPS}")
    page.get_by_text("More", exact=True).click()
    rule = "second-valley"  # one that stops a run of a few steps
    set_until(page, f"--stop_rule {rule}", lambda: choose(page, "Stop rule", rule))
    set_until(page, f"--cs_interval {INTERVAL}", lambda: type_into(page, "Steps between measurements", INTERVAL))
    set_until(page, f"--window_size {WINDOW}", lambda: type_into(page, "Measurements a window", WINDOW))
    keep(page, "start")
    page.get_by_role("button", name="Start", exact=True).click()

    page.get_by_role("heading", name="Watch a run").wait_for()
    page.get_by_text(re.compile(r"Stopped early at step \d+ of 1500")).wait_for()
    page.get_by_text("Sample pictures over time").wait_for()
    for moment in ("no LoRA", "turning point", "last"):
        page.get_by_test_id("stImageCaption").get_by_text(moment, exact=True).wait_for()
    (folder,) = root.iterdir()
    assert folder.name.startswith("portraits-") and (folder / "portraits-last.safetensors").is_file()
    page.get_by_role("button", name="Stop it").wait_for(state="hidden")  # the page has seen the end
    keep(page, "watch")

    page.get_by_role("link", name="Try").click()
    type_into(page, "Steps", STEPS)
    page.get_by_label("Prompt", exact=True).fill("portrait, old woman, fluent 3d style")
    page.get_by_label("Prompt", exact=True).press("Control+Enter")
    page.get_by_role("button", name="Compare at this seed").click()
    buttons = page.get_by_role("button", name="Download")
    buttons.nth(2).wait_for()
    pictures = [downloaded(page, buttons.nth(number)) for number in range(3)]
    assert [picture.info["lora"] for picture in pictures] == [
        "none",
        "portraits.safetensors",
        "portraits-last.safetensors",
    ]
    assert {picture.info["seed"] for picture in pictures} == {"1"} and {picture.size for picture in pictures} == {
        (64, 64)
    }
    base, turning_point, last = (np.asarray(picture.convert("RGB"), float) for picture in pictures)
    assert 0 < np.abs(turning_point - base).mean() and 0 < np.abs(last - turning_point).mean()
    keep(page, "compare")

    page.get_by_role("link", name="Grid").click()
    page.get_by_label("Prompts, one a line").fill(f"portrait, boy, fluent 3d style --l 5 --s {STEPS}")
    page.get_by_label("Prompts, one a line").press("Control+Enter")
    type_into(page, "Seeds", "1,2")
    page.get_by_role("button", name="Draw the grid").click()
    page.get_by_role("button", name="Download the page").wait_for()
    grid = page.frame_locator("iframe")
    grid.get_by_role("heading", name="portrait, boy, fluent 3d style").wait_for()
    # The base, the turning point and the last weights, at two seeds each.
    assert grid.get_by_role("img").count() == 6 and grid.get_by_text("training pictures, each to the others").count()
    keep(page, "grid")
    assert page.get_by_test_id("stException").count() == 0


def downloaded(page, button):
    with page.expect_download() as download:
        button.click()
    return Image.open(io.BytesIO(Path(download.value.path()).read_bytes()))
