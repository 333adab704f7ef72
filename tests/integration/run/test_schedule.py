"""A run on a schedule: deployed, checked, worked off, cancelled, resumed; with a standing server and a real worker."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from base.store.checkpoint import Store
from base.store.journal import read
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from flows.servers.access import home_secret
from flows.servers.pages import page_lines
from tests.support.processes import ended, eventually, listening
from tests.support.scored_home import finish, graph_of
from tests.support.site import Hook, Site

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Response
    from prefect.client.schemas.objects import FlowRun

ROOT = Path(__file__).parents[3]
SERVICE_UNAVAILABLE = 503
LONG = ["base.pretrain.max_steps=4000", "base.pretrain.save_every=20"]
ENDS = ("Completed", "Failed", "Crashed")
OWN_NAME, TEACHERS = "my own name", "merge.teachers={sort: sort, reverse: reverse}"
CHANGED = ["merge.max_steps=4", TEACHERS]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    site = Site(tmp_path_factory.mktemp("site"), f"http://127.0.0.1:{hook.server_address[1]}/secret-token")
    servers = site.servers = site.start("ui")
    try:
        eventually((site.home / "servers" / "prefect.json").exists, within=600)
        site.deployed = site.mopd("deploy", str(site.file), "--cron", "0 2 * * 1", "--timezone", "Europe/Berlin")
        site.worker = site.start("worker")
        yield site
    finally:
        for process in (site.worker, servers):
            if process is not None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=240)
        hook.shutdown()


def test_a_deployment_says_when_it_runs_and_where_to_look(site: Site) -> None:
    assert site.deployed.returncode == 0, site.deployed.stderr
    assert f"deployment mopd/tiny: {site.pages}/deployments/deployment/" in site.deployed.stdout
    assert site.deployed.stdout.count("  next: Monday ") == 3
    with site.prefect() as client:
        deployment = client.read_deployment_by_name("mopd/tiny")
    (schedule,) = deployment.schedules
    assert deployment.global_concurrency_limit.limit == 1 and deployment.enforce_parameter_schema
    assert schedule.active and schedule.schedule.cron == "0 2 * * 1"


def test_nobody_else_on_the_network_reaches_the_pages(site: Site) -> None:
    assert listening(psutil.Process(site.servers.pid)) == {"127.0.0.1"}


def test_a_paused_schedule_waits_for_somebody_and_is_kept(site: Site) -> None:
    done = site.mopd("deploy", str(site.file), "name=resting", "--cron", "30 4 * * 2", "--paused")
    assert done.returncode == 0 and "schedule: 30 4 * * 2 (UTC), paused" in done.stdout
    again = site.mopd("deploy", str(site.file), "name=resting", "--cron", "30 4 * * 2")
    assert again.returncode == 0 and ", paused" in again.stdout
    with site.prefect() as client:
        found = client.read_deployment_by_name("mopd/resting")
        (kept,) = found.schedules
        assert (kept.active, kept.schedule.cron, kept.schedule.timezone) == (False, "30 4 * * 2", "UTC")
        client.update_deployment_schedule(found.id, kept.id, active=True)
        (kept,) = client.read_deployment(found.id).schedules
        assert (kept.active, kept.schedule.cron, kept.schedule.timezone) == (True, "30 4 * * 2", "UTC")
    assert site.mopd("deploy", str(site.file), "name=resting", "--remove").returncode == 0


def test_what_cannot_be_scheduled_is_said_without_a_traceback(site: Site) -> None:
    for arguments, said in (
        (["--cron", "0 2 * * x"], "--cron '0 2 * * x': Invalid cron string"),
        (["--cron", "0 2 * * 1", "--timezone", "Europe/Berln"], "did you mean 'Europe/Berlin'"),
        (["merge.max_step=3"], "did you mean 'max_steps'"),
    ):
        done = site.mopd("deploy", str(site.file), *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_what_the_form_cannot_check_fails_the_run_with_the_command_lines_message(site: Site) -> None:
    run = site.begin(["experts.sort.train.rl.max_step=3"])
    eventually(lambda: site.state(run) in ENDS, within=600)
    state = site.run(run).state
    assert state is not None and state.name == "Failed"
    said = str(state.message)
    assert "experts.sort.train.rl.max_step: unknown key" in said
    assert "did you mean 'max_steps'" in said


def test_a_cancelled_run_stops_its_stage_and_the_next_goes_on_from_its_checkpoint(site: Site) -> None:
    first = site.begin(LONG)
    eventually(lambda: site.steps_saved() > 100, within=600)
    assert site.workers_of_stages()
    site.cancel(first)
    eventually(lambda: not site.workers_of_stages())
    eventually(lambda: site.state(first) == "Cancelled")
    kept = site.steps_saved()
    assert kept > 100

    second = site.begin(LONG)
    eventually(lambda: site.steps_saved() > kept, within=600)
    site.cancel(second)
    eventually(lambda: site.state(second) == "Cancelled")
    (journal,) = (site.home / "work").glob("*/journal.jsonl")
    steps = [record["step"] for record in read(journal) if record["kind"] == "progress"]
    # It went on where it had been: no step stands twice.
    assert len(steps) == len(set(steps)) and max(steps) > kept


def test_a_run_that_outlived_its_worker_can_still_be_cancelled(site: Site) -> None:
    run = site.begin(LONG)
    eventually(site.workers_of_stages, within=600)
    flow = site.flow(run)
    assert site.worker is not None
    (prefect,) = psutil.Process(site.worker.pid).children()
    prefect.kill()
    # Prefect's worker is started again, and knows nothing of the run.
    eventually(lambda: [p for p in psutil.Process(site.worker.pid).children() if p.pid != prefect.pid])
    assert site.state(run) == "Running" and flow.is_running()
    site.cancel(run)
    eventually(lambda: site.state(run) == "Cancelled")
    eventually(lambda: ended(flow.pid) and not site.workers_of_stages())
    assert site.worker.poll() is None


def test_a_run_that_died_with_its_worker_does_not_keep_the_next_waiting(site: Site) -> None:
    lost = site.begin(LONG)
    eventually(site.workers_of_stages, within=600)
    flow = site.flow(lost)
    assert site.worker is not None
    site.worker.kill()
    site.worker.wait()
    flow.kill()
    eventually(lambda: ended(flow.pid) and not site.workers_of_stages())
    assert site.state(lost) == "Running"
    site.worker = site.start("worker")
    following = site.begin(LONG)
    eventually(lambda: site.state(lost) == "Crashed")
    eventually(lambda: site.state(following) == "Running")
    site.cancel(following)
    eventually(lambda: site.state(following) == "Cancelled")


@contextmanager
def scores_by_hand(site: Site) -> Iterator[None]:
    """The run, made, with scores of experts and a student that learnt: a few steps teach nothing. Its own come back."""
    run = site.begin([])
    eventually(lambda: site.state(run) in ENDS, within=600)
    assert site.state(run) == "Completed"
    graph, store = graph_of(site.file, site.home), Store(site.home)
    assert all(store.find(node.key) for node in graph.nodes)
    places = [store.root / node.key for node in graph.nodes if node.stage == "evaluate"]
    aside = site.folder / "aside"
    aside.mkdir()
    for place in places:
        place.rename(aside / place.name)
    finish(graph, site.home)
    yield
    for place in places:
        shutil.rmtree(place)
        (aside / place.name).rename(place)


def test_a_scheduled_run_ends_with_a_champion_links_and_a_word_to_the_webhook(site: Site) -> None:
    with scores_by_hand(site):
        Hook.heard.clear()
        run, other = site.begin([]), site.begin([])
        eventually(lambda: site.state(run) in ENDS, within=600)
        assert site.state(run) == "Completed"
        assert (site.home / "runs" / "tiny" / "champion.json").exists()
        (told,) = [each for each in Hook.heard if each["event"] == "promotion"]
        # Which of the two came first is the worker's choice.
        first = next(each for each in (run, other) if each in told["flow_run"])
        assert told["run"] == "tiny" and f"/flow-run/{first}" in told["flow_run"]
        assert "is champion" in told["text"] and told["mlflow"]
        # The other may have its link already.
        with site.prefect() as client:
            own = [made.data for made in client.read_artifacts() if str(made.flow_run_id) == first]
        (page,) = [str(data) for data in own if "this run in MLflow" in str(data)]
        assert told["mlflow"].split()[0] in page
        from mlflow import MlflowClient

        tracked = MlflowClient(f"sqlite:///{site.home / 'mlflow.db'}").search_runs(
            ["1"], "attributes.status = 'FINISHED'"
        )
        assert told["flow_run"] in [each.data.tags.get("prefect") for each in tracked], "from MLflow to Prefect"
        # One waited for the other, and found everything made.
        eventually(lambda: site.state(other) in ENDS, within=600)
        assert site.state(other) == "Completed"
        a, b = site.run(run), site.run(other)
        assert b.start_time >= a.end_time or a.start_time >= b.end_time


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    from tests.support.browsing import chromium

    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: "Browser") -> Iterator["Page"]:
    from tests.support.browsing import fresh_page

    with fresh_page(browser) as page:
        yield page


def submitted(site: Site, page: "Page", fill: Callable[["Page"], None]) -> dict[str, Any]:
    """Fill in the form of *Custom run* as a person does, submit it, and wait for the run's end: what Prefect took."""
    from tests.support.browsing import log_in

    page.goto(f"{site.pages}/login")
    log_in(page, home_secret(site.home))
    page.wait_for_url(lambda url: "/login" not in url)
    deployment = re.search(r"/deployments/deployment/\S+", site.deployed.stdout)
    assert deployment is not None
    page.goto(site.pages + deployment[0])
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    page.get_by_text("merge_max_steps").wait_for()
    fill(page)

    def submit() -> "Response | None":
        with page.expect_response(lambda answer: "/create_flow_run" in answer.url) as answer:
            page.get_by_role("button", name="Submit").click()
        # Prefect's answer while its SQLite is locked.
        return None if answer.value.status == SERVICE_UNAVAILABLE else answer.value

    answer = eventually(submit)
    assert answer.status == 201, answer.text()
    run: dict[str, Any] = answer.json()
    eventually(lambda: site.state(run["id"]) in ENDS, within=600)
    assert site.state(run["id"]) == "Completed"
    return run


@pytest.mark.browser
def test_a_form_that_is_left_alone_runs_with_the_values_in_force(site: Site, page: "Page") -> None:
    run = submitted(site, page, lambda page: None)
    parameters = {"run_file": str(site.file), "overrides": [], "home": str(site.home.resolve()), "plain": True}
    assert run["parameters"] == parameters


@pytest.mark.browser
def test_a_custom_run_has_the_value_that_was_changed_in_its_form(site: Site, page: "Page") -> None:
    from playwright.sync_api import expect

    def fill(page: "Page") -> None:
        page.locator("input[type=text]").first.fill(OWN_NAME)
        # The order on the page: the merge, each expert, the cap.
        page.locator("input[type=number]").first.fill("4")
        page.get_by_role("button", name="Add item").click()
        # The seeds have one as well; until the item is drawn theirs would be the last.
        expect(page.locator("textarea")).to_have_count(2)
        page.locator("textarea").last.fill(TEACHERS)

    run = submitted(site, page, fill)
    page.goto(f"{site.pages}/runs/flow-run/{run['id']}?tab=Parameters")
    for shown in (OWN_NAME, '"merge_max_steps": 4', TEACHERS):
        page.get_by_text(shown).first.wait_for()
    student = build_graph(load_run_file(site.file, CHANGED), site.home).node("student@0")
    made = Store(site.home).find(student.key)
    assert made is not None and made.manifest["config"]["max_steps"] == 4


@pytest.fixture(scope="module")
def champion_page(site: Site) -> str:
    """The printed address of the champion in MLflow; the student of a run with changes is made champion for it."""
    run = site.begin(CHANGED)
    eventually(lambda: site.state(run) in ENDS, within=600)
    assert site.state(run) == "Completed"
    done = site.mopd("promote", str(site.file), "student", *CHANGED, "--reason", "for the pages")
    assert done.returncode == 0, done.stderr
    url = json.loads((site.home / "servers" / "mlflow.json").read_text())["url"]
    (line,) = [line for line in page_lines(url, site.home, "tiny") if "champion:" in line]
    return line.split()[1]


def followed(page: "Page", link: str) -> "Page":
    """The page that a link of a description opens."""
    with page.expect_popup() as opened:
        page.get_by_role("link", name=link, exact=True).first.click()
    return opened.value


@pytest.mark.browser
def test_links_lead_from_the_champion_to_the_base_and_back(champion_page: str, page: "Page") -> None:
    page.goto(champion_page)
    page.get_by_text("@ champion").wait_for()
    page.get_by_text("recovery, %").wait_for()
    for name, title in (
        ("experts/sort", "experts-sort-seed0"),
        ("cold_start", "cold_start-seed0"),
        ("base", "base-seed0"),
        ("cold_start@0", "cold_start-seed0"),
        ("experts/sort@0", "experts-sort-seed0"),
    ):
        page = followed(page, name)
        page.get_by_text(title).first.wait_for()
        # The side bar of MLflow's mode for training.
        page.get_by_role("link", name="Models", exact=True).first.wait_for()


@pytest.mark.browser
def test_teacher_and_start_stand_beside_the_student_over_time_in_one_chart(champion_page: str, page: "Page") -> None:
    page.goto(champion_page)
    chart = followed(page, "reverse")
    for role in ("student", "teacher", "start"):
        chart.get_by_text(f"student@0 (curve/reverse/{role})").first.wait_for()
        # All reach from the first step to the last.
        chart.get_by_role("row", name=f"curve/reverse/{role}").get_by_text("(step=4)").first.wait_for()
    # A line each, drawn once the table is there.
    lines = chart.locator("path.js-line")
    lines.nth(2).wait_for(state="attached")
    assert lines.count() >= 3


def test_a_run_that_fails_tells_the_webhook_and_no_secret_is_kept(site: Site) -> None:
    Hook.heard.clear()
    run = site.begin(["experts.sort.train.rl.max_steps=5", "experts.sort.train.rl.preflight_tolerance=1e-12"])
    eventually(lambda: site.state(run) in ENDS, within=600)
    assert site.state(run) == "Failed"
    (told,) = Hook.heard
    assert told["event"] == "failure" and "tiny failed: " in told["text"] and "experts/sort" in told["error"]
    kept = [p for p in site.home.rglob("*") if p.is_file() and b"secret-token" in p.read_bytes()]
    assert kept == []


def test_the_deployments_of_a_team_are_declared_in_one_file(site: Site) -> None:
    folders = {"MOPD_HOME": str(site.home), "MOPD_CHECKOUT": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml"],
        env=site.client | folders,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with site.prefect() as client:
        found = client.read_deployment_by_name("mopd/lab")
    assert found.schedules[0].schedule.cron == "0 2 * * 1"
    assert found.parameters == {"run_file": "flows/runs/lab.yaml", "home": str(site.home), "plain": True}
    assert found.enforce_parameter_schema and found.global_concurrency_limit.limit == 1
    assert "merge" in str(found.parameter_openapi_schema)


def test_a_schedule_begins_runs_by_itself(site: Site) -> None:
    done = site.mopd("deploy", str(site.file), "name=ticking", "--cron", "* * * * *")
    assert done.returncode == 0, done.stderr
    with site.prefect() as client:
        found = client.read_deployment_by_name("mopd/ticking")

    def begun() -> list["FlowRun"]:
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId

        mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[found.id]))
        with site.prefect() as client:
            # The next one waits for its turn where a busy worker took up two at once.
            waiting = ("Scheduled", "Late", "AwaitingConcurrencySlot")
            return [run for run in client.read_flow_runs(flow_run_filter=mine) if run.state.name not in waiting]

    (run,) = eventually(begun, within=180)
    assert run.auto_scheduled
    eventually(lambda: site.state(str(run.id)) in ENDS, within=600)
    assert site.state(str(run.id)) == "Completed"
    assert site.mopd("deploy", str(site.file), "name=ticking", "--remove").returncode == 0
