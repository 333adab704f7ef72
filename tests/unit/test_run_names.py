"""A name that a person gave a flow run is kept."""

from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun

from flows.run_names import name_of


@pytest.mark.parametrize(
    ("facts", "name"),
    [
        ({}, "flows/runs/lab.yaml"),
        ({"deployment_id": uuid4(), "auto_scheduled": True}, "flows/runs/lab.yaml"),
        ({"deployment_id": uuid4()}, "with two more experts"),
    ],
)
def test_only_a_run_begun_by_hand_keeps_its_name(facts: dict, name: str) -> None:
    run = FlowRun(flow_id=uuid4(), name="with two more experts", **facts)
    assert name_of(run, {"run_file": "flows/runs/lab.yaml"}) == name
