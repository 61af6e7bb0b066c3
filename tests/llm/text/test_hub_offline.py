"""A hub that does not answer: asked once, then its caches alone; the message comes at once."""

import socket
import time

import datasets.config
import pytest
from huggingface_hub import constants

from base.loading import load_tokenizer
from base.spec import BaseSpec
from text import hub


@pytest.fixture
def no_network(monkeypatch):
    for place, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(place, name, False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    asked = []

    def refuse(address, timeout):
        asked.append(address)
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    hub.offline_if_unreachable.cache_clear()
    yield asked
    hub.offline_if_unreachable.cache_clear()


def test_a_base_and_a_data_set_by_name_fail_at_once(no_network):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no tokenizer there"):
        load_tokenizer(BaseSpec("nobody/nothing"))
    with pytest.raises(FileNotFoundError, match="cannot load 'nobody/nothing' from the Hugging Face hub"):
        hub.hub_dataset({"path": "nobody/nothing"})
    assert time.monotonic() - started < 10 and len(no_network) == 1


def test_a_proxy_is_left_to_the_hubs_libraries(no_network, monkeypatch):
    monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: {"https": "proxy:1"})
    hub.offline_if_unreachable()
    assert no_network == [] and not constants.HF_HUB_OFFLINE
