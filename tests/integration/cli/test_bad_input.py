"""Mistakes that only a process of its own can show; `tests/unit/flows/run_file/test_bad_inputs.py` has the tables."""

from tests.integration.run.test_pipeline import Bench

MISTAKE = 2


def test_a_dead_prefect_server_is_one_message(tmp_path) -> None:
    desk = Bench(tmp_path)
    # Port 9 is discard's: nothing listens there.
    desk.environment |= {"HF_HUB_OFFLINE": "1", "PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = desk.run()
    assert done.returncode == MISTAKE
    assert "error: PREFECT_API_URL: http://127.0.0.1:9/api does not answer" in done.stderr
    assert "Traceback" not in done.stderr
