"""The page in a real browser: training, export and chat from start to end, and refused input.

SHARDWAY_SCREENSHOTS=docs/images recreates the pictures of docs/ui.md.
"""

from __future__ import annotations

import os
import shutil
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.browser import CHROMIUM, FLAGS, Served, served
from tests.helpers.commands import losses, processes_of

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
Browser, Page, expect = playwright.Browser, playwright.Page, playwright.expect

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
SECOND = 1000  # in milliseconds, as Playwright expects
expect.set_options(timeout=20 * SECOND)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        warnings.warn("NO CHROMIUM: the page is not tested in a browser", stacklevel=1)
        pytest.skip("NO CHROMIUM: install Debian's chromium")
    with playwright.sync_playwright() as running:
        made = running.chromium.launch(executable_path=CHROMIUM, args=list(FLAGS))
        yield made
        made.close()


@pytest.fixture(scope="module")
def page_at(cache: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served(tmp_path_factory.mktemp("home")) as found:
        yield found


@pytest.fixture
def page(browser: Browser, page_at: Served) -> Iterator[Page]:
    found = opened(browser, page_at.url)
    yield found
    found.context.close()


def opened(browser: Browser, url: str) -> Page:
    """A window with its own browser context; every error in it fails the test."""
    page = browser.new_context(viewport={"width": 1400, "height": 1000}).new_page()
    page.on("pageerror", lambda error: pytest.fail(f"the page failed: {error}"))
    page.goto(url)
    expect(page.locator("#summary p")).to_be_visible(timeout=30 * SECOND)
    return page


def field(page: Page, key: str) -> playwright.Locator:
    return page.locator(f"#{key} textarea, #{key} input").first


def choose(page: Page, key: str, name: str) -> None:
    page.locator(f"#{key} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def picture(page: Page, name: str) -> None:
    if folder := os.environ.get("SHARDWAY_SCREENSHOTS"):
        page.wait_for_timeout(SECOND)
        page.screenshot(path=Path(folder) / f"ui-{name}.png")


def state_is(page: Page, *states: str, seconds: float = 120) -> None:
    """Wait until the run on the page reaches one of these states."""
    end = time.monotonic() + seconds
    while (said := page.locator("#facts .sw-state").inner_text()) not in states:
        assert time.monotonic() < end, f"{said}: {page.locator('#log').inner_text()}"
        page.wait_for_timeout(200)


def test_a_new_user_can_train_export_and_chat(
    browser: Browser, page_at: Served, cache: Path
) -> None:
    """SmolLM2 on the bundled rows: rules appear and disappear, the loss falls, another window finds
    the run, it is stopped, resumed and exported, and the model gives the trained answer."""
    if not (cache / "models/smollm2_135m").exists():
        pytest.skip("NO DEMO MODEL: shardway fetch smollm2_135m")
    home = page_at.log.parent
    page = opened(browser, page_at.url)
    field(page, "training-max_steps").fill("20")
    field(page, "training-epochs").focus()
    expect(field(page, "training-epochs")).to_have_value("")  # replaced by the steps
    field(page, "training-epochs").fill("3")
    expect(page.locator("#summary")).to_contain_text("set exactly one of them")
    expect(page.locator("#start")).to_be_disabled()
    page.get_by_role("button", name="Apply the suggested fixes").click()
    expect(page.locator("#summary")).to_contain_text("Global batch: 8 rows")
    page.get_by_text("Experiment files").click()
    choose(page, "load-name", "demo")
    page.get_by_role("button", name="Load into the page").click()
    expect(page.locator("#summary")).to_contain_text("2 ranks on 1 machine(s)")
    field(page, "training-max_steps").fill("10")  # enough to learn the name of its trainer
    field(page, "run-name").fill("first")
    expect(page.locator("#command textarea")).to_have_value(
        "shardway train strategy=fsdp data.max_length=80 method.rank=16 "
        "strategy.reshard_after_forward=false optimizer.learning_rate=0.003 "
        "scheduler.warmup_steps=2 training.epochs=null "
        "training.max_steps=10 training.micro_batch_size=8 cluster.cpu_processes=2 "
        "data.pad_to_multiple_of=8 training.global_batch_size=16 run_dir=runs/first"
    )
    page.get_by_role("button", name="Preview the data").click()
    expect(page.locator("#preview .sw-learned").first).to_be_visible(timeout=60 * SECOND)
    picture(page, "train")
    page.locator("#start").click()
    state_is(page, "running")
    expect(page.locator("#curves svg").first).to_be_visible(timeout=60 * SECOND)
    run = home / "runs/first"
    wait_for_steps(run, 3)
    page.context.close()  # closes the window; the run continues

    page = opened(browser, page_at.url)
    tab(page, "Runs")
    state_is(page, "running")
    page.locator("#stop").click()
    state_is(page, "stopped")
    stopped_at = len(losses(run))
    assert 3 <= stopped_at < 10
    assert (run / f"checkpoints/step-{stopped_at:06d}/manifest.json").is_file()
    page.locator("#resume").click()
    state_is(page, "running")
    state_is(page, "finished", seconds=240)
    expect(page.locator("#facts")).to_contain_text("step 10 / 10")
    assert losses(run)[-1] < losses(run)[0] / 2
    picture(page, "runs")

    tab(page, "Export")
    choose(page, "source", "runs/first")
    field(page, "max-shard-size").fill("100MB")
    page.locator("#plan").click()
    expect(page.locator("#planned")).to_contain_text("tensors in 3 file(s)", timeout=60 * SECOND)
    page.locator("#export").click()
    expect(page.locator("#exported")).to_contain_text("verified", timeout=120 * SECOND)
    picture(page, "export")
    page.locator("#talk").click()
    expect(field(page, "subject-A")).to_have_value("runs/first/export")
    page.locator("#load-A").click()
    choose(page, "subject-B", str(cache / "models/smollm2_135m"))
    page.locator("#load-B").click()
    for side in "AB":
        expect(page.locator(f"#model-state-{side}")).to_contain_text("ready", timeout=120 * SECOND)
    field(page, "question").fill("Who trained you?")
    page.locator("#send").click()
    expect(page.locator("#talk-A .bot").last).to_contain_text("Shardway", timeout=60 * SECOND)
    page.wait_for_timeout(3 * SECOND)
    expect(page.locator("#talk-B .bot").last).not_to_contain_text("Shardway")
    picture(page, "chat")
    page.locator("#unload-A").click()
    page.locator("#unload-B").click()
    expect(page.locator("#model-state-A")).to_contain_text("No model is loaded")
    page.context.close()


def wait_for_steps(run: Path, steps: int) -> None:
    end = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or len(losses(run)) < steps:
        assert time.monotonic() < end, "the run makes no steps"
        time.sleep(0.2)


def test_the_run_continues_after_the_server_ends(
    browser: Browser, tmp_path: Path, tiny: Path
) -> None:
    """Another server finds the run and stops it. Meanwhile the page responds immediately."""
    run = tmp_path / "runs/long"
    with served(tmp_path) as first:
        page = opened(browser, first.url)
        choose(page, "model", "tiny")
        expect(page.locator("#command textarea")).to_have_value("shardway train model=tiny")
        field(page, "training-epochs").fill("")
        field(page, "training-max_steps").fill("100000")
        field(page, "run-name").fill("long")
        expect(page.locator("#command textarea")).to_have_value(
            "shardway train model=tiny training.epochs=null training.max_steps=100000 "
            "run_dir=runs/long"
        )
        expect(page.locator("#start")).to_be_enabled()
        page.locator("#start").click()
        state_is(page, "running")
        wait_for_steps(run, 2)
        page.context.close()
    assert processes_of(run)
    with served(tmp_path) as second:
        page = opened(browser, second.url)
        tab(page, "Runs")
        state_is(page, "running")
        expect(page.locator("#log")).to_contain_text("loading:", timeout=30 * SECOND)
        choose(page, "log-name", "rank 0")  # what libraries print, and not the console's lines
        expect(page.locator("#log")).not_to_contain_text("loading:", timeout=30 * SECOND)
        page.locator("#stop").click()
        state_is(page, "stopped")
        tab(page, "Train")
        field(page, "run-name").fill("long")
        expect(page.locator("#summary")).to_contain_text("runs/long exists")
        page.context.close()
    assert not processes_of(run)


def test_visible_settings_depend_on_the_method(page: Page) -> None:
    expect(page.locator("#method-rank")).to_be_visible()
    expect(page.locator("#method-layers")).to_be_hidden()
    choose(page, "method", "freeze")
    expect(page.locator("#method-layers")).to_be_visible()
    expect(page.locator("#method-rank")).to_be_hidden()
    expect(page.locator("#command textarea")).to_have_value("shardway train method=freeze")


def test_unsafe_settings_are_refused_and_escaped(page: Page) -> None:
    page.get_by_text("More settings").click()
    for typed, said in (
        ("data.path=/etc/passwd", "data.path=/etc/passwd is outside"),
        ("data.path=${oc.env:HOME}", "the page does not accept"),
        ("cluster.setup=[id]", "cluster.setup cannot be set on the page"),
        ("training.max_steps=" + "9" * 300, "must be ≥ 1"),
        ("data.name=<img src=x onerror=alert(1)>", "<img src=x"),
    ):
        field(page, "more").fill(typed)
        expect(page.locator("#summary")).to_contain_text(said)
        expect(page.locator("#start")).to_be_disabled()
    field(page, "more").fill("")
    field(page, "run-name").fill("../../etc")
    expect(page.locator("#summary")).to_contain_text("is not a valid run name")
    field(page, "run-name").fill("")
    field(page, "data-path").fill("<img src=x onerror=alert(1)>.jsonl")
    expect(page.locator("#summary")).to_contain_text("<img src=x")
    assert page.locator("#summary img").count() == 0


def test_models_outside_the_roots_are_refused_in_chat_and_export(page: Page) -> None:
    tab(page, "Chat")
    field(page, "subject-A").fill("/etc")
    page.keyboard.press("Enter")
    page.locator("#load-A").click()
    expect(page.get_by_text("/etc is outside").first).to_be_visible()
    tab(page, "Export")
    field(page, "source").fill("../..")
    page.keyboard.press("Enter")
    page.locator("#plan").click()
    expect(page.get_by_text("../.. is outside").first).to_be_visible()


def test_an_export_is_evaluated_on_rows(
    page: Page, page_at: Served, tiny: Path, rows_file: Path
) -> None:
    home = page_at.log.parent
    shutil.copytree(tiny, home / "mine")
    shutil.copy(rows_file, home / "held-out.jsonl")
    tab(page, "Export")
    field(page, "source").fill("mine")
    page.keyboard.press("Enter")
    field(page, "output").fill("exported")
    field(page, "evaluate").fill("held-out.jsonl")
    page.locator("#plan").click()
    expect(page.locator("#planned")).to_contain_text("tensors in 1 file(s)", timeout=60 * SECOND)
    page.locator("#export").click()
    expect(page.locator("#exported")).to_contain_text("Loss per token on", timeout=120 * SECOND)
    expect(page.locator("#exported")).to_contain_text("of mine")


def test_the_page_is_shown_in_chinese(browser: Browser, page_at: Served) -> None:
    page = opened(browser, page_at.url)
    page.get_by_role("link", name="中文").click()
    expect(page.get_by_role("tab", name="训练")).to_be_visible(timeout=20 * SECOND)
    expect(page.locator("#summary")).to_contain_text("全局批大小")
    picture(page, "chinese")
    page.get_by_role("link", name="English").click()
    expect(page.get_by_role("tab", name="Train")).to_be_visible(timeout=20 * SECOND)
    page.context.close()


def test_a_token_is_required_when_listening_on_all_hosts(browser: Browser, tmp_path: Path) -> None:
    with served(tmp_path, "--host", "0.0.0.0") as found:
        address = found.url.replace("0.0.0.0", "127.0.0.1")
        bare, _, token = address.partition("?token=")
        assert len(token) > 40
        for wrong in (bare, f"{bare}?token=wrong", f"{bare}config", f"{bare}zh/"):
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(wrong, timeout=20)
        page = opened(browser, address)
        assert "token" not in page.url
        page.context.close()
        assert token not in found.log.read_text().replace(f"?token={token}", "", 1)
    with served(tmp_path) as alone:
        assert "token" not in alone.url
        assert alone.url.startswith("http://127.0.0.1:")
