"""The page about APIs names endpoints that there are, and all of them."""

from __future__ import annotations

import re
from pathlib import Path

from starlette.routing import Route

from peerd.api.app import Api
from peerd.api.metrics.endpoint import MetricsEndpoint
from peerd.api.models import Models
from peerd.api.openai.answering import Answering
from peerd.api.web.files import is_page_path
from peerd.api.web.history import History
from peerd.api.web.invitations import InvitationsApi

PAGE = Path(__file__).parents[3] / "docs" / "api.md"


def named():
    """The methods and paths in the page's first table; what changes is in capitals there."""
    table = PAGE.read_text().split("\n\n")[2]
    return set(re.findall(r"`(GET|POST|DELETE) ([^`]+)`", table))


class NoFigures:
    """A daemon that has nothing to count yet."""

    def collect(self):
        return ()


def offered():
    models = Models({})
    api = Api(models, None, None, None, History(), Answering())
    app = api.app(*MetricsEndpoint(NoFigures()).routes(), *InvitationsApi(None, models).routes())
    routes = [route for route in app.routes if isinstance(route, Route) and not is_page_path(route.path)]
    return {
        (method, re.sub(r"\{(\w+)(:path)?\}", lambda found: found[1].upper(), route.path))
        for route in routes
        for method in route.methods - {"HEAD"}
    }


def test_the_page_names_every_endpoint_and_no_other():
    assert len(named()) > 5
    assert named() == offered()
