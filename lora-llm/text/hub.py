"""Data sets of a hub, or of the folders and files that the hub's library reads."""

from __future__ import annotations

import logging

import datasets.config
from datasets import DatasetDict, load_dataset
from datasets.exceptions import DatasetsError
from huggingface_hub import constants

from es_lora.inputs.hub import hub_answers


def offline_if_unreachable() -> bool:
    """Let the hub's libraries look into their caches alone where the hub does not answer; whether
    that is so."""
    answers = hub_answers()
    if not answers:
        constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = datasets.config.HF_DATASETS_OFFLINE = True
    return not answers


def hub_dataset(request: dict[str, str], cache_dir: str | None = None) -> DatasetDict:
    """All splits of a hub data set; FileNotFoundError that says what to do offline where the hub
    does not answer."""
    offline = offline_if_unreachable()
    hub_logger = logging.getLogger("huggingface_hub")
    level = hub_logger.level
    hub_logger.setLevel(logging.ERROR)  # five retry warnings would bury the one message below
    try:
        return _load_tables(request, cache_dir)
    except (OSError, ValueError, DatasetsError) as error:  # no network, no such repository, no table in it
        reason = "it does not answer" if offline else f"{type(error).__name__}: {error}"
        raise FileNotFoundError(
            f"cannot load '{request['path']}' from the Hugging Face hub ({reason}). Offline: "
            "download it on a machine with a network, as json, jsonl, csv or tsv, and give the file: "
            "--dataset my_data.jsonl --dataset_format NAME"
        ) from error
    finally:
        hub_logger.setLevel(level)


def _load_tables(request: dict[str, str], cache_dir: str | None) -> DatasetDict:
    try:
        return load_dataset(**request, cache_dir=cache_dir)
    except RuntimeError as error:
        if "scripts are no longer supported" not in str(error):
            raise
    # The hub keeps tables of old repositories that are a script, in a branch with one folder a
    # configuration.
    folder = {"data_dir": request["name"]} if "name" in request else {}
    return load_dataset(request["path"], **folder, revision="refs/convert/parquet", cache_dir=cache_dir)
