"""Who writes the captions: Claude, OpenAI or a compatible server by SDK, or a local model.

Every captioner has `destination` (where pictures go, to read), `caption(picture) -> Answer`, and
`tokens_of(width_px, height_px)`, what a picture costs; the SDKs repeat failed requests."""

from __future__ import annotations

import base64
import io
import json
import os
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

from PIL import Image

from es_lora.files import read_text

INSTRUCTION = (
    "Describe this picture in one sentence of at most 40 words, as a caption to train an image model with: the "
    "subject, its look and pose, the surroundings, the light and the style. Name only what can be seen. Answer with "
    "the caption alone."
)
# (model, US dollars per million tokens in, and out): 2025 list prices; --price_in, --price_out win.
DEFAULTS = {"claude": ("claude-haiku-4-5", 1.00, 5.00), "openai": ("gpt-4.1-mini", 0.40, 1.60)}
ADDRESSES = {"claude": "https://api.anthropic.com", "openai": "https://api.openai.com/v1"}
KEY_VARIABLES = {"claude": "ANTHROPIC_API_KEY", "openai": "OPENAI_API_KEY"}
EXTRAS = "pip install -r lora-ldm/requirements-extras.txt"
TRANSIENT = (408, 409, 429)
NO_USE = {401: "the key is not accepted", 402: "the account has no credit", 403: "the key may not do this",
          404: "no such model or address"}  # fmt: skip


class PictureFault(ValueError):
    """This picture gets no caption; the others go on."""


class NoAnswer(PictureFault):
    """The service gave none: the next pictures may fare the same."""


class ServiceFault(ValueError):
    """No picture would get a caption: the run stops."""


@dataclass
class Answer:
    """text: the caption, "" where the model declined. Tokens as the service counted them."""

    text: str
    declined: bool = False
    tokens_in: int = 0
    tokens_out: int = 0


def read_key(args: Namespace) -> Optional[str]:
    """The key from --key_file, --key_env or the service's own variable; never shown anywhere.

    The service's variable is not used with --base_url: a key goes only to who gave it.
    Raises ValueError where there is none."""
    variable = args.key_env or (KEY_VARIABLES[args.captioner] if args.own_address else None)
    if args.key_file:
        if not args.key_file.is_file():
            raise FileNotFoundError(f"--key_file {args.key_file} does not exist")
        key, source = read_text(args.key_file).strip(), f"--key_file {args.key_file}"
    elif variable:
        key, source = os.environ.get(variable, "").strip(), f"the environment variable {variable}"
    else:
        return None
    if not key:
        raise ValueError(f"no key: {source} is empty; put the key there, or into a file for --key_file")
    if not key.isascii() or len(key.split()) != 1:
        raise ValueError(f"the key in {source} has spaces or letters that no key has: it must hold the key alone")
    return key


def jpeg_base64(picture: Image.Image) -> str:
    """Without EXIF: where and when a picture was taken is nobody's business."""
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


class Service:
    """What both SDKs share, which have the same client arguments and exceptions.

    args: captioner, model, base_url, own_address (no --base_url was given), key_file, key_env,
    instruction, max_tokens, retries, timeout (seconds)."""

    def __init__(self, sdk: Any, client_class: type, args: Namespace):
        self.sdk, self.args, self.destination = sdk, args, args.base_url
        self.key = read_key(args)
        self.client = client_class(
            api_key=self.key or "none", base_url=self.destination, timeout=args.timeout, max_retries=args.retries
        )

    def caption(self, picture: Image.Image) -> Answer:
        """Raises PictureFault or ServiceFault. Safe to call from several threads."""
        sdk, tries = self.sdk, self.args.retries + 1
        try:
            answer = self.ask(jpeg_base64(picture))
        except sdk.APITimeoutError:
            raise NoAnswer(f"no answer within {self.args.timeout:g} s, {tries} times (--timeout, --retries)") from None
        except sdk.APIConnectionError:
            raise NoAnswer(f"the connection to {self.destination} failed {tries} times") from None
        except sdk.APIStatusError as error:
            reason = self.without_key(f"HTTP {error.status_code}: {error.message}")
            if error.status_code in NO_USE:
                advice = "see --key_file, --key_env, --model and --base_url"
                raise ServiceFault(f"{self.destination}: {NO_USE[error.status_code]} ({reason}); {advice}") from None
            raise (NoAnswer if error.status_code in TRANSIENT or error.status_code >= 500 else PictureFault)(
                reason
            ) from None
        except (json.JSONDecodeError, sdk.APIResponseValidationError):
            raise PictureFault("the answer is not valid JSON") from None
        except (AttributeError, IndexError, TypeError):  # JSON, but with other contents: the SDKs do not look into it
            raise PictureFault("the answer has no caption where one belongs") from None
        if not answer.text and not answer.declined:
            raise PictureFault("the answer is empty")
        return answer

    def without_key(self, text: str) -> str:
        """Servers put what they were sent into their messages."""
        text = text.replace(self.key, "(key)") if self.key else text
        return text[:300]


class Claude(Service):
    def __init__(self, args: Namespace):
        try:
            import anthropic
        except ImportError:
            raise ValueError(f"--captioner claude needs the package anthropic: {EXTRAS}") from None
        super().__init__(anthropic, anthropic.Anthropic, args)

    def ask(self, jpeg: str) -> Answer:
        source = {"type": "base64", "media_type": "image/jpeg", "data": jpeg}
        content = [{"type": "image", "source": source}, {"type": "text", "text": self.args.instruction}]
        message = self.client.messages.create(
            model=self.args.model, max_tokens=self.args.max_tokens, messages=[{"role": "user", "content": content}]
        )
        text = " ".join(block.text for block in message.content if block.type == "text")
        usage = message.usage
        return Answer(one_line(text), message.stop_reason == "refusal", usage.input_tokens, usage.output_tokens)

    @staticmethod
    def tokens_of(width_px: int, height_px: int) -> float:
        return width_px * height_px / 750


class OpenAI(Service):
    def __init__(self, args: Namespace):
        try:
            import openai
        except ImportError:
            raise ValueError(f"--captioner openai needs the package openai: {EXTRAS}") from None
        super().__init__(openai, openai.OpenAI, args)

    def ask(self, jpeg: str) -> Answer:
        address = {"url": f"data:image/jpeg;base64,{jpeg}"}
        content = [{"type": "text", "text": self.args.instruction}, {"type": "image_url", "image_url": address}]
        # Compatible servers know the older name of the limit, OpenAI's newer models the new one.
        limit = {"max_completion_tokens" if self.args.own_address else "max_tokens": self.args.max_tokens}
        completion = self.client.chat.completions.create(
            model=self.args.model, messages=[{"role": "user", "content": content}], **limit
        )
        choice, usage = completion.choices[0], completion.usage
        declined = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
        counted = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        return Answer("" if declined else one_line(choice.message.content or ""), declined, *counted)

    @staticmethod
    def tokens_of(width_px: int, height_px: int) -> float:
        return 1.62 * -(-width_px // 32) * -(-height_px // 32)


class LocalModel:
    """A captioning model of transformers (BLIP, Florence-2) from a folder, on a GPU if any.
    Raises ValueError: the folder does not hold such a model."""

    destination = "this machine"

    def __init__(self, args: Namespace):
        if not args.model or not Path(args.model).is_dir():
            raise ValueError(
                f"--model {args.model or ''}: --captioner local needs the folder of a BLIP or Florence-2 model"
            )
        import quiet_libraries  # noqa: F401  (before transformers)
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        try:
            self.processor = AutoProcessor.from_pretrained(args.model, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(args.model, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"--model {args.model} cannot be loaded as a captioning model: {reason}") from error
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        self.model, self.max_tokens = model.eval().to(device), args.max_tokens
        self.instruction = args.instruction
        if model.config.model_type == "florence2":  # its instructions are names of tasks
            self.instruction = args.instruction or "<MORE_DETAILED_CAPTION>"

    def caption(self, picture: Image.Image) -> Answer:
        import torch

        text = {"text": self.instruction} if self.instruction else {}
        inputs = self.processor(images=picture, return_tensors="pt", **text).to(self.model.device)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=self.max_tokens, do_sample=False)
        return Answer(one_line(self.processor.batch_decode(tokens, skip_special_tokens=True)[0]))

    @staticmethod
    def tokens_of(width_px: int, height_px: int) -> float:
        return 0.0


def one_line(text: str) -> str:
    """Trainers read the first line of a caption only."""
    return " ".join(text.split()).strip('"').strip()


CAPTIONERS = {"claude": Claude, "openai": OpenAI, "local": LocalModel}
