"""Answers that were had once: a file of JSON lines, to which each is added as it comes."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from dataclasses import asdict
from pathlib import Path
from typing import Optional

from es_lora.inputs.json_text import parsed_json
from prepare.caption_services import Answer


def answer_key(picture: Path, settings: list) -> str:
    """Equal for equal pictures (the file's bytes) that are asked about in the same way."""
    content = hashlib.sha256(picture.read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([content, *settings]).encode()).hexdigest()


class AnswerCache:
    """Lines that a kill has torn are passed over; all others count.
    Raises ValueError: the file that is there is no such cache."""

    def __init__(self, path: Path):
        self.path, self.lock, self.answers = path, threading.Lock(), {}
        content = path.read_bytes() if path.exists() else b""
        for line in content.splitlines():
            try:
                entry = parsed_json(line)
                key = entry.pop("key")
                self.answers[key] = Answer(**entry)
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
        if content and not self.answers:
            raise ValueError(
                f"--cache {path} holds no answer: it is another kind of file, or damaged; remove it or name another"
            )
        if content and not content.endswith(b"\n"):
            with open(path, "ab") as file:
                file.write(b"\n")

    def get(self, key: str) -> Optional[Answer]:
        return self.answers.get(key)

    def put(self, key: str, answer: Answer) -> None:
        with self.lock:
            self.answers[key] = answer
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, **asdict(answer)}, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
