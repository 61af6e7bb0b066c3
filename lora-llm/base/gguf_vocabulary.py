"""What a GGUF file says of a tokenizer (its keys `tokenizer.*`): copied from a GGUF, or derived
from a tokenizer.

llama.cpp splits a text into words by rules of its own, which a file names (`tokenizer.ggml.pre`).
The rules that are known here are in PRE_TOKENIZERS, as the library tokenizers writes them; a name
serves in both directions.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from gguf import GGUFReader, GGUFValueType, GGUFWriter, Keys, TokenType
from tokenizers import Regex, Tokenizer, pre_tokenizers

SOURCE_NAME = "base.gguf"  # beside a base in Hugging Face format: the GGUF file that it was made of
FIX = "give a GGUF file of the same base by --gguf_vocab"

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# {name: (steps before the bytes, whether ByteLevel splits into words, ignore_merges)}; a step is a
# regular expression, or "digits": every digit alone.
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool, bool]] = {
    "gpt-2": ((), True, False),
    "smollm": (("digits",), True, False),
    "llama-bpe": ((_WORDS % "{1,3}",), False, True),
    "qwen2": ((_WORDS % "",), False, False),
}


class Entry(NamedTuple):
    """One key of a GGUF file. subtype: of an array's values."""

    key: str
    value: Any
    type: GGUFValueType
    subtype: Optional[GGUFValueType] = None


def copied_vocabulary(file: Path) -> list[Entry]:
    """The keys `tokenizer.*` of a GGUF file. Raises ValueError where it is none or holds no
    tokens."""
    try:
        fields = GGUFReader(str(file)).fields
    except (ValueError, OSError, IndexError, KeyError) as error:
        raise ValueError(f"{file} is no readable GGUF file ({error}); {FIX}") from error
    if Keys.Tokenizer.LIST not in fields:
        raise ValueError(f"{file} holds no tokenizer; {FIX}")
    return [
        Entry(key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
        for key, field in fields.items()
        if key.startswith("tokenizer.")
    ]


def derived_vocabulary(tokenizer: Any) -> list[Entry]:
    """The same keys made of a Hugging Face tokenizer: byte-level BPE, or BPE of SentencePiece.

    Raises ValueError, naming what is not known, where llama.cpp would split a text otherwise.
    """
    described = json.loads(tokenizer.backend_tokenizer.to_str())
    kind = described["model"].get("type")
    if kind != "BPE":
        raise ValueError(f"a tokenizer of the kind {kind} cannot be written as GGUF; {FIX}")
    entries = _of_pieces(described, tokenizer) if described["model"].get("byte_fallback") else _of_bytes(described)
    return entries + _of_tokens(described, tokenizer) + _of_special_tokens(tokenizer)


def _of_bytes(described: dict[str, Any]) -> list[Entry]:
    """Model, pre-tokenizer and merges of a byte-level BPE."""
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["model"]["merges"]]
    return [
        Entry(Keys.Tokenizer.MODEL, "gpt2", GGUFValueType.STRING),
        Entry(Keys.Tokenizer.PRE, pre_tokenizer_name(described), GGUFValueType.STRING),
        Entry(Keys.Tokenizer.MERGES, merges, GGUFValueType.ARRAY, GGUFValueType.STRING),
    ]


def _of_pieces(described: dict[str, Any], tokenizer: Any) -> list[Entry]:
    """Model and scores of a SentencePiece BPE: what is merged earlier has the higher score."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(described["model"]["merges"]):
        ranks.setdefault("".join(pair.split(" ", 1) if isinstance(pair, str) else pair), rank)
    tokens = _tokens(tokenizer)
    scores = [-float(ranks[token]) if token in ranks else -1e6 if len(token) == 1 else 0.0 for token in tokens]
    return [
        Entry(Keys.Tokenizer.MODEL, "llama", GGUFValueType.STRING),
        Entry(Keys.Tokenizer.PRE, "default", GGUFValueType.STRING),
        Entry(Keys.Tokenizer.SCORES, scores, GGUFValueType.ARRAY, GGUFValueType.FLOAT32),
        Entry(Keys.Tokenizer.ADD_PREFIX, _adds_prefix(described), GGUFValueType.BOOL),
    ]


def _adds_prefix(described: dict[str, Any]) -> bool:
    """Whether a blank is put before the first word."""
    normalizer = described.get("normalizer") or {}
    steps = [step.get("type") for step in normalizer.get("normalizers", [normalizer])]
    return "Prepend" in steps or (described.get("pre_tokenizer") or {}).get("prepend_scheme") in ("first", "always")


def _of_tokens(described: dict[str, Any], tokenizer: Any) -> list[Entry]:
    """Texts and kinds of all tokens, by their ids; an id without a token is filled up as unused."""
    tokens, known = _tokens(tokenizer), tokenizer.get_vocab()
    kinds = [TokenType.NORMAL if token in known else TokenType.UNUSED for token in tokens]
    for token in described["added_tokens"]:
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    if described["model"].get("byte_fallback"):
        for index, token in enumerate(tokens):
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[index] = TokenType.BYTE
        if tokenizer.unk_token_id is not None:
            kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    return [
        Entry(Keys.Tokenizer.LIST, tokens, GGUFValueType.ARRAY, GGUFValueType.STRING),
        Entry(Keys.Tokenizer.TOKEN_TYPE, [int(kind) for kind in kinds], GGUFValueType.ARRAY, GGUFValueType.INT32),
    ]


def _tokens(tokenizer: Any) -> list[str]:
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    return [by_id.get(number, f"[PAD{number}]") for number in range(max(by_id) + 1)]


def _of_special_tokens(tokenizer: Any) -> list[Entry]:
    """Ids of the special tokens, and which of them stand around every text."""
    ids = {
        Keys.Tokenizer.BOS_ID: tokenizer.bos_token_id,
        Keys.Tokenizer.EOS_ID: tokenizer.eos_token_id,
        Keys.Tokenizer.UNK_ID: tokenizer.unk_token_id,
        Keys.Tokenizer.PAD_ID: tokenizer.pad_token_id,
    }
    around = tokenizer("a")["input_ids"]
    added = {
        Keys.Tokenizer.ADD_BOS: tokenizer.bos_token_id is not None and around[0] == tokenizer.bos_token_id,
        Keys.Tokenizer.ADD_EOS: tokenizer.eos_token_id is not None and around[-1] == tokenizer.eos_token_id,
    }
    return [Entry(key, number, GGUFValueType.UINT32) for key, number in ids.items() if number is not None] + [
        Entry(key, truth, GGUFValueType.BOOL) for key, truth in added.items()
    ]


def fitted_vocabulary(entries: Sequence[Entry], rows: int, tokenizer: Any) -> list[Entry]:
    """The keys for a model of `rows` embeddings, with the tokens that were added in training.

    The chat template is the tokenizer's own. Raises ValueError where there are more tokens than
    rows.
    """
    found = {entry.key: entry for entry in entries}
    tokens = list(found[Keys.Tokenizer.LIST].value)
    if len(tokens) > rows:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens and the model {rows} embeddings; {FIX}")
    added = range(len(tokens), rows)
    names = {number: token for token, number in tokenizer.get_vocab().items()}
    filled = {
        Keys.Tokenizer.LIST: [names.get(number, f"[PAD{number}]") for number in added],
        Keys.Tokenizer.TOKEN_TYPE: [int(TokenType.CONTROL if n in names else TokenType.UNUSED) for n in added],
        Keys.Tokenizer.SCORES: [0.0 for _ in added],
    }
    for key, more in filled.items():
        if key in found:
            found[key] = found[key]._replace(value=list(found[key].value) + more)
    if getattr(tokenizer, "chat_template", None):
        found[Keys.Tokenizer.CHAT_TEMPLATE] = Entry(
            Keys.Tokenizer.CHAT_TEMPLATE, tokenizer.chat_template, GGUFValueType.STRING
        )
    return list(found.values())


def vocabulary_for(tokenizer: Any, base: str, given: Optional[Path]) -> list[Entry]:
    """From the GGUF file given, else the one beside the base, else derived. Raises ValueError."""
    file = given or Path(base) / SOURCE_NAME
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"--gguf_vocab {given}: there is no such file")
    return copied_vocabulary(file) if file.is_file() else derived_vocabulary(tokenizer)


def add_vocabulary(writer: GGUFWriter, entries: Sequence[Entry]) -> None:
    for entry in entries:
        writer.add_key_value(entry.key, entry.value, entry.type, entry.subtype)


def adds_bos(entries: Sequence[Entry]) -> bool:
    """Whether llama.cpp puts the bos token before a text by itself."""
    return any(entry.key == Keys.Tokenizer.ADD_BOS and entry.value for entry in entries)


def pre_tokenizer_name(described: dict[str, Any]) -> str:
    """llama.cpp's name of the rules in a tokenizer.json. Raises ValueError where none fits."""
    normalizer = (described.get("normalizer") or {}).get("type")
    steps, split_words, prefix = _steps(described.get("pre_tokenizer") or {})
    rules = (steps, split_words, bool(described["model"].get("ignore_merges")))
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == rules), None)
    if name is None or prefix or normalizer not in (None, "NFC"):
        raise ValueError(f"llama.cpp's name for how this tokenizer splits words is not known; {FIX}")
    return name


def _steps(pre_tokenizer: dict[str, Any]) -> tuple[tuple[str, ...], bool, bool]:
    """(steps before the bytes, whether ByteLevel splits into words, whether it puts a blank
    first)."""
    steps, split_words, prefix = [], False, True
    for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if step.get("type") == "ByteLevel":
            split_words, prefix = step.get("use_regex", True), step["add_prefix_space"]
        elif step.get("type") == "Digits" and step["individual_digits"]:
            steps.append("digits")
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            steps.append(step["pattern"].get("Regex", "?"))
        else:
            steps.append("?")
    return tuple(steps), split_words, prefix


def set_pre_tokenizer(tokenizer: Tokenizer, name: str) -> None:
    """Let a tokenizer split words as llama.cpp does under a name of PRE_TOKENIZERS."""
    steps, split_words, ignore_merges = PRE_TOKENIZERS[name]
    parts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if step == "digits"
        else pre_tokenizers.Split(Regex(step), behavior="isolated")
        for step in steps
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts) if len(parts) > 1 else parts[0]
    tokenizer.model.ignore_merges = ignore_merges
