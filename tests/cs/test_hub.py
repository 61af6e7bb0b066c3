"""Whether a hub answers is asked once, in a bounded time, and an answer of any kind is one."""

import http.client
import ssl
import time
import urllib.error
import urllib.request

import pytest

from es_lora.inputs import hub


@pytest.fixture(autouse=True)
def asked_anew():
    hub.answers.cache_clear()
    yield
    hub.answers.cache_clear()


class Page:
    def close(self):
        pass


@pytest.mark.parametrize(
    ("answer", "is_there"),
    [
        (Page(), True),
        (urllib.error.HTTPError("https://hub", 405, "no such method", {}, None), True),
        (urllib.error.URLError(ssl.SSLCertVerificationError("an unknown authority")), True),
        (urllib.error.URLError(OSError("no route to host")), False),
        (OSError("Tunnel connection failed: 403 Forbidden"), False),
        (http.client.BadStatusLine("?"), False),
        (ValueError("unknown url type"), False),
    ],
    ids=["a page", "a refusal", "other certificates", "no route", "a proxy that refuses", "no HTTP", "no URL"],
)
def test_what_counts_as_an_answer(monkeypatch, answer, is_there):
    def opened(_request, timeout):
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(urllib.request, "urlopen", opened)
    assert hub.answers("https://hub") is is_there


def test_a_search_for_the_address_that_hangs_is_not_waited_for(monkeypatch):
    asked = []

    def hang(request, timeout):
        asked.append(request.full_url)
        time.sleep(30)

    monkeypatch.setattr(urllib.request, "urlopen", hang)
    monkeypatch.setattr(hub, "ANSWER_SEC", 0.2)
    started = time.monotonic()
    assert not hub.answers("https://hub") and not hub.answers("https://hub")
    assert time.monotonic() - started < 5 and asked == ["https://hub"]
