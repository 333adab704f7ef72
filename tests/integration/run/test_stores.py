"""A team's stores: checkpoints on S3, MLflow and Prefect on PostgreSQL; real servers of each, and a run over them."""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from base.store.checkpoint import Store
from base.store.mirror import mirror_of
from flows.engines.vllm_servers import free_ports
from tests.integration.run.test_pipeline import RUN
from tests.support.homes import clean_environment
from tests.support.processes import eventually

pytestmark = pytest.mark.stores

S3_PORT, POSTGRES_PORT, MLFLOW_PORT, PREFECT_PORT = free_ports("127.0.0.1", 4)
BUCKET = "checkpoints"
STORE = f"s3://{BUCKET}/team"
S3 = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "nobody-may-see-this",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{S3_PORT}",
    "AWS_EC2_METADATA_DISABLED": "true",
}
DATABASE = f"//mopd:a-password@127.0.0.1:{POSTGRES_PORT}"
SERVER = {
    "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{MLFLOW_PORT}",
    "PREFECT_API_URL": f"http://127.0.0.1:{PREFECT_PORT}/api",
}


@pytest.fixture(scope="module")
def clean() -> dict[str, str]:
    """The environment without settings of anybody's."""
    return clean_environment("AWS_")


@pytest.fixture(scope="module")
def s3(clean: dict[str, str]) -> Iterator[None]:
    command = [sys.executable, "-c", "from moto.server import main; main()", "-H", "127.0.0.1", "-p", str(S3_PORT)]
    with _running(command, clean | S3):
        eventually(lambda: _answers(f"http://127.0.0.1:{S3_PORT}/moto-api/"))
        import boto3

        boto3.client(
            "s3",
            endpoint_url=S3["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key=S3["AWS_SECRET_ACCESS_KEY"],
            region_name="us-east-1",
        ).create_bucket(Bucket=BUCKET)
        yield


@pytest.fixture(scope="module")
def postgres(clean: dict[str, str]) -> Iterator[None]:
    """A PostgreSQL server with two databases, as Debian ships it; it does not run as root."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))[-1].parent
    folder = Path(tempfile.mkdtemp(prefix="mopd-postgres-", dir="/tmp"))
    as_user: list[str] = []
    if os.geteuid() == 0:
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        as_user = ["setpriv", f"--reuid={owner.pw_uid}", f"--regid={owner.pw_gid}", "--clear-groups"]
    (password := folder / "password").write_text("a-password")
    password.chmod(0o644)
    data = str(folder / "data")
    set_up = [str(programs / "initdb"), "-D", data, "-U", "mopd", f"--pwfile={password}", "-A", "scram-sha-256"]
    subprocess.run([*as_user, *set_up], check=True, capture_output=True, cwd="/")
    serve = [str(programs / "postgres"), "-D", data, "-p", str(POSTGRES_PORT), "-k", str(folder), "-h", "127.0.0.1"]
    try:
        with _running([*as_user, *serve], clean, signal.SIGINT):
            for name in ("mlflow", "prefect"):
                eventually(lambda name=name: _sql("postgres", f"CREATE DATABASE {name}", commit=True) is not None)
            yield
    finally:
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def servers(postgres: None, clean: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's and Prefect's servers over PostgreSQL, as `deploy/README.md` starts them."""
    folder = tmp_path_factory.mktemp("servers")
    mlflow = ["mlflow", "server", "--backend-store-uri", f"postgresql+psycopg:{DATABASE}/mlflow", "--workers", "1"]
    mlflow += ["--artifacts-destination", str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(MLFLOW_PORT)]
    prefect = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(PREFECT_PORT)]
    quiet = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    address = {"PREFECT_API_DATABASE_CONNECTION_URL": f"postgresql+asyncpg:{DATABASE}/prefect"}
    own = clean | quiet | {"PREFECT_HOME": str(folder / "prefect"), **address}
    with _running([sys.executable, "-m", *mlflow], clean | quiet), _running([sys.executable, "-m", *prefect], own):
        for url in (SERVER["MLFLOW_TRACKING_URI"] + "/health", SERVER["PREFECT_API_URL"] + "/health"):
            eventually(lambda url=url: _answers(url), within=240)
        yield


@pytest.fixture(scope="module")
def first(s3: None, servers: None, clean: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run over all of it; its folder."""
    folder = tmp_path_factory.mktemp("team")
    config = RUN | {"evaluate": RUN["evaluate"] | {"shift": None}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    done = _run(folder, folder / "one", clean)
    assert done.returncode == 0, done.stderr[-3000:]
    # A few steps teach nothing, so the gate promotes nobody.
    done = _mopd(folder, folder / "one", clean, "promote", "--reason", "the first")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_a_run_over_them_is_in_both_databases(first: Path) -> None:
    states = _sql("prefect", "SELECT state_name, count(*) FROM flow_run GROUP BY state_name")
    assert states == [("Completed", 1)]
    assert _sql("mlflow", "SELECT name, alias FROM registered_model_aliases ORDER BY alias") == [
        ("tiny-student", "candidate"),
        ("tiny-student", "champion"),
    ]
    ((metrics,),) = _sql("mlflow", "SELECT count(*) FROM metrics")
    assert metrics > 50
    assert list((first / "one").glob("mlflow.db")) == []


def test_every_artifact_stands_on_s3_and_another_machine_makes_nothing(first: Path, clean: dict[str, str]) -> None:
    made = {artifact.key: artifact.digest for artifact in Store(first / "one").artifacts()}
    done = _run(first, first / "two", clean)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "to run" not in done.stderr
    assert not list((first / "two" / "work").glob("*/journal.jsonl"))
    with _environment(S3 | {"MOPD_STORE": STORE}):
        mirror_of.cache_clear()
        there = Store(first / "three")
        assert {artifact.key: artifact.digest for artifact in there.artifacts()} == made
        student = next(artifact for artifact in there.artifacts() if artifact.name == "student")
        assert not there.is_here(student)
        assert (there.get(student.key).path / "model.safetensors").exists()
    mirror_of.cache_clear()


def test_no_secret_is_kept_anywhere(first: Path) -> None:
    secrets = (b"nobody-may-see-this", b"a-password")
    kept = [p for p in first.rglob("*") if p.is_file() and any(secret in p.read_bytes() for secret in secrets)]
    assert kept == []
    for table in ("params", "tags", "metrics"):
        assert _sql("mlflow", f"SELECT count(*) FROM {table} t WHERE t::text LIKE '%nobody-may%'") == [(0,)]


def test_a_store_that_does_not_answer_is_one_message(first: Path, clean: dict[str, str]) -> None:
    away = S3 | {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    command = [sys.executable, "-m", "flows.cli.entry", "plan", str(first / "run.yaml"), "--home", str(first / "four")]
    done = subprocess.run(
        command, env=clean | away | {"MOPD_STORE": STORE}, capture_output=True, text=True, check=False, timeout=400
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"MOPD_STORE: {STORE}: cannot be read" in done.stderr


def _run(folder: Path, home: Path, clean: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return _mopd(folder, home, clean, "run", "--plain")


def _mopd(folder: Path, home: Path, clean: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "flows.cli.entry", *words, str(folder / "run.yaml"), "--home", str(home)]
    environment = clean | S3 | SERVER | {"MOPD_STORE": STORE}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)


def _sql(database: str, statement: str, *, commit: bool = False) -> list[tuple] | None:
    """The rows of a statement; None while the server does not answer."""
    import psycopg

    try:
        connection = psycopg.connect(f"postgresql:{DATABASE}/{database}")
    except psycopg.OperationalError:
        return None
    connection.autocommit = commit
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(statement)
        return cursor.fetchall() if cursor.description else []


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status == 200
    except OSError:
        return False


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], end: int = signal.SIGTERM) -> Iterator[None]:
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, cwd="/"
    )
    try:
        yield
    finally:
        os.killpg(process.pid, end)
        process.wait(timeout=240)


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
