"""A hub that does not answer: asked once, then its caches alone; the message comes at once."""

import time

import datasets.config
import pytest
from huggingface_hub import constants

import es_lora.inputs.hub
from base.loading import load_tokenizer
from base.spec import BaseSpec
from text import hub


@pytest.fixture
def no_network(monkeypatch):
    for place, name in ((constants, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE")):
        monkeypatch.setattr(place, name, False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    asked = []

    def hang(endpoint):  # a search for the address that finds no end
        asked.append(endpoint)
        time.sleep(30)

    monkeypatch.setattr(es_lora.inputs.hub, "_asked", hang)
    monkeypatch.setattr(es_lora.inputs.hub, "ANSWER_SEC", 0.2)
    es_lora.inputs.hub.answers.cache_clear()
    yield asked
    es_lora.inputs.hub.answers.cache_clear()


def test_a_base_and_a_data_set_by_name_fail_at_once(no_network):
    started = time.monotonic()
    with pytest.raises(FileNotFoundError, match="nobody/nothing: no tokenizer there"):
        load_tokenizer(BaseSpec("nobody/nothing"))
    with pytest.raises(FileNotFoundError, match="cannot load 'nobody/nothing' from the Hugging Face hub"):
        hub.hub_dataset({"path": "nobody/nothing"})
    assert time.monotonic() - started < 10 and len(no_network) == 1
