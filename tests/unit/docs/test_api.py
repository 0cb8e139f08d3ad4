"""docs/api.md tells of every route and field. Whether its tables are up to date: test_site.py."""

import pytest
from fastapi.routing import APIRoute

from afd_server.api.protocol.fields import Body
from docs import api_tables
from docs.generate import DOCS
from tests.unit.api.scripted_service import ScriptedService, app_for


@pytest.mark.parametrize("body", api_tables.BODIES)
def test_every_field_that_is_served_says_what_it_means(body):
    silent = [row[0] for row in api_tables.fields(body) if row[1] == "served" and not row[3]]
    assert not silent, "write a text below the field"


def test_every_body_has_its_table():
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    for name in api_tables.BODIES:
        assert f"<!-- generated: fields:{name} -->" in page
    bodies = {
        field.field_info.annotation
        for route in app_for(ScriptedService()).routes
        if isinstance(route, APIRoute)
        for field in route.dependant.body_params
    }
    assert {body for body in bodies if issubclass(body, Body)} <= set(api_tables.BODIES.values())
