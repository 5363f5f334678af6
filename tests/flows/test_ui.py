"""Prefect's UI in headless Chromium: from the run form to the finished run.

DENSE2MOE_SCREENSHOTS=1 keeps the screenshots under docs/images.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect, sync_playwright

from tests.flows.repository import PATIENCE_S, PROJECT, Stack, until

pytestmark = [pytest.mark.browser, pytest.mark.slow]

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page() -> Iterator[Page]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine; on Debian: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        expect.set_options(timeout=PATIENCE_S * 1000)
        page.set_default_timeout(PATIENCE_S * 1000)
        yield page
        browser.close()


def keep(page: Page, name: str, folder: Path) -> None:
    """A screenshot, under docs/images where that is asked for."""
    if os.environ.get("DENSE2MOE_SCREENSHOTS"):
        folder = PROJECT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png")


def test_from_the_form_to_the_finished_run(stack: Stack, page: Page, tmp_path: Path) -> None:
    deployment = stack.get("/deployments/name/dense2moe/pipeline")["id"]
    page.goto(f"{stack.api.removesuffix('/api')}/deployments/deployment/{deployment}/run")
    expect(page.get_by_text("The preset: model, data, recipe and evaluation")).to_be_visible()
    expect(page.get_by_text("Single parameters on top of the preset")).to_be_visible()
    page.get_by_role("button", name="Add item").first.click()
    fields = page.locator("textarea")
    # The override's, the name's, the commit's: before the first is there, the others stand in its place.
    expect(fields.nth(2)).to_be_visible()
    fields.nth(0).fill("moe.top_k=4")
    fields.nth(1).fill("by-hand")
    keep(page, "run-form", tmp_path)

    # Refused as it stands: the field names the rule, and no run begins.
    fields.nth(0).fill("moe.top_k")
    page.get_by_role("button", name="Submit").click()
    expect(page.get_by_text("does not match").first).to_be_visible()
    assert not runs_by_hand(stack)

    fields.nth(0).fill("moe.top_k=4")
    until(lambda: submitted(page), PATIENCE_S)
    (flow_run,) = runs_by_hand(stack)
    assert stack.wait(flow_run)["type"] == "COMPLETED", stack.logs(flow_run)
    page.goto(f"{stack.api.removesuffix('/api')}/runs/flow-run/{flow_run}")
    expect(page.get_by_text("Completed").first).to_be_visible()
    expect(page.get_by_text("by-hand").first).to_be_visible()
    expect(page.get_by_text("evaluate@L").first).to_be_visible()
    keep(page, "finished-run", tmp_path)


def submitted(page: Page) -> bool:
    """Submits the form; false where the server's database was busy, which the page says and a user tries again after."""
    with page.expect_response(lambda response: response.url.endswith("/create_flow_run")) as answer:
        page.get_by_role("button", name="Submit").click()
    assert answer.value.status in (200, 201, 503), answer.value.text()
    return answer.value.status != 503


def runs_by_hand(stack: Stack) -> list[str]:
    """Ids of the runs that the form has made."""
    runs = stack.post("/flow_runs/filter", sort="START_TIME_DESC").json()
    return [run["id"] for run in runs if run["parameters"].get("name") == "by-hand"]
