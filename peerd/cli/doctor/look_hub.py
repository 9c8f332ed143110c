"""Asks the model hub one question, with the user's token if there is one. Blocks: call it in a thread."""

from __future__ import annotations

from urllib.request import getproxies

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import build_hf_headers

from peerd.cli.doctor.facts import HubFact
from peerd.compute.checkpoint.hub.settings import HubSettings

# Connecting and answering take a second each on a slow line.
DEADLINE_S = 8.0


def look_at_hub(settings: HubSettings) -> HubFact:
    """What the hub says of this user: its question names no model, so it tells nobody which ones are used here."""
    endpoint = settings.endpoint or constants.ENDPOINT
    if settings.is_offline:
        return HubFact(endpoint, is_offline=True)
    is_proxied = bool(getproxies().keys() & {"http", "https", "all"})
    try:
        headers = build_hf_headers(token=settings.token, library_name="peerd")
        has_token = "authorization" in {name.lower() for name in headers}
        answer = httpx2.get(f"{endpoint}/api/whoami-v2", headers=headers, timeout=DEADLINE_S, follow_redirects=False)
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, OSError) as error:
        return HubFact(endpoint, problem=_reason(error), is_proxied=is_proxied)
    return HubFact(endpoint, status=answer.status_code, has_token=has_token, is_proxied=is_proxied)


def _reason(error: Exception) -> str:
    return str(error).strip() or type(error).__name__
