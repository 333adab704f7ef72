"""Who may enter a home, and who may read its secret."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest

from base.store.checkpoint import Store
from flows.servers.access import home_secret, login, secret_path


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(autouse=True)
def usual_mask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_new_home_is_its_owners_alone_and_an_old_one_is_closed(tmp_path):
    Store(tmp_path / "new" / "home")
    assert mode(tmp_path / "new" / "home") == 0o700
    old = tmp_path / "old"
    (old / "store").mkdir(parents=True)
    assert mode(old) == 0o755
    Store(old)
    assert mode(old) == 0o700


@pytest.mark.parametrize(("given", "kept"), [(0o770, 0o770), (0o775, 0o770), (0o2777, 0o2770), (0o750, 0o700)])
def test_a_home_that_its_group_may_write_to_stays_the_groups(tmp_path, given, kept):
    home = tmp_path / "team"
    home.mkdir()
    home.chmod(given)
    Store(home)
    assert mode(home) == kept
    home_secret(home)
    assert mode(secret_path(home)) == (0o660 if kept & stat.S_IWGRP else 0o600)


def test_all_processes_of_a_home_have_one_secret_and_no_other_home_has_it(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        found = set(pool.map(lambda _: home_secret(tmp_path / "home"), range(64)))
    assert len(found) == 1 and list((tmp_path / "home" / "servers").iterdir()) == [secret_path(tmp_path / "home")]
    assert home_secret(tmp_path / "other") not in found


def test_the_secret_is_shown_on_a_terminal_and_to_nobody_else(tmp_path, monkeypatch):
    secret = home_secret(tmp_path)
    assert secret not in login(tmp_path) and str(secret_path(tmp_path)) in login(tmp_path)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert secret in login(tmp_path)
