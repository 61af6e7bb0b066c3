"""Captions to text states: 75-token chunks, clip skip and weighted words, laid out as kohya's.

A caption of up to 75 n tokens is encoded as n chunks of 77 positions (BOS, 75 tokens, EOS). The
states are joined to BOS + 75 n + EOS: the U-Net sees (B, 77, D), (B, 152, D) or (B, 227, D)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from transformers import CLIPTokenizer

if TYPE_CHECKING:
    from base.sd import SDModel

TOKEN_LENGTHS = (75, 150, 225)  # of --max_token_length
UP_WEIGHT = 1.1  # what one pair of brackets means: (word) is multiplied by it, [word] divided

_MARKUP = re.compile(r"\\[\\()\[\]]|[()\[\]]|:\s*[+-]?[0-9]*\.?[0-9]+\s*\)|[^\\()\[\]:]+|:|\\")


def parse_weighted_caption(caption: str) -> list[tuple[str, float]]:
    """Split a caption into [(text, weight)], neighbours of equal weight joined.

    ``(word)`` is 1.1, ``(word:1.3)`` is 1.3, ``[word]`` is 1 / 1.1; nesting multiplies; ``\\(`` is
    plain. An unclosed bracket counts to the end of the caption. Source: AUTOMATIC1111's WebUI."""
    pieces, opened = [], []

    def multiply_from(start, factor):
        for piece in pieces[start:]:
            piece[1] *= factor

    for match in _MARKUP.finditer(caption):
        token = match.group(0)
        if token in ("(", "["):
            opened.append((token, len(pieces)))
        elif opened and opened[-1][0] == "(" and token[0] == ":" and token[-1] == ")":
            multiply_from(opened.pop()[1], float(token[1:-1]))
        elif opened and token == ")" and opened[-1][0] == "(":
            multiply_from(opened.pop()[1], UP_WEIGHT)
        elif opened and token == "]" and opened[-1][0] == "[":
            multiply_from(opened.pop()[1], 1 / UP_WEIGHT)
        else:
            text = token[1:] if len(token) == 2 and token[0] == "\\" else token
            pieces.append([text, 1.0])
    for bracket, start in opened:
        multiply_from(start, UP_WEIGHT if bracket == "(" else 1 / UP_WEIGHT)
    joined = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined or [("", 1.0)]


def tokenize_chunks(
    tokenizer: CLIPTokenizer, caption: str, chunks: int, body_tokens: int = 75, weighted: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of one caption, cut or padded to ``chunks`` chunks.

    Returns (ids, weights): ids (chunks, body_tokens + 2) int64; weights (chunks * body_tokens + 2,)
    float32, 1 for BOS, EOS and padding."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    pad = eos if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pieces = parse_weighted_caption(caption) if weighted else [(caption, 1.0)]
    body, weights = [], []
    for text, weight in pieces:
        token_ids = tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        body += token_ids
        weights += [weight] * len(token_ids)
    length = chunks * body_tokens
    body, weights = body[:length], weights[:length]
    if len(body) < length:
        body.append(eos)
        body += [pad] * (length - len(body))
    weights = [1.0] + weights + [1.0] * (length + 1 - len(weights))
    rows = []
    for start in range(0, length, body_tokens):
        part = body[start : start + body_tokens]
        last = pad if part[-1] in (eos, pad) else eos
        if part[0] == pad:  # an empty chunk still ends its text with one EOS
            part = [eos] + part[1:]
        rows.append([bos] + part + [last])
    return torch.tensor(rows), torch.tensor(weights)


def what_is_cut(
    model: SDModel, texts: Sequence[str], max_token_length: int | None, what: str = "captions", weighted: bool = False
) -> list[str]:
    """A line on the texts beyond the length that is used: how many, the longest, the way out.

    Empty where nothing is cut. what: the name of the texts."""
    tokenizer, body_tokens = model.tokenizers[0], model.text_encoders[0].config.max_position_embeddings - 2
    used = _chunk_count(max_token_length) * body_tokens
    counts = [_token_count(tokenizer, caption, weighted) for caption in texts]
    longer = [count for count in counts if count > used]
    if not longer:
        return []
    keeps = [length for length in TOKEN_LENGTHS if _chunk_count(length) * body_tokens >= max(longer)]
    wider = [length for length in TOKEN_LENGTHS if length > (max_token_length or TOKEN_LENGTHS[0])]
    advice = f"--max_token_length {keeps[0]} keeps them whole" if keeps else "shorten them"
    if wider and not keeps:
        advice = f"--max_token_length {wider[-1]} keeps more of them, the rest has to be shortened"
    return [f"{len(longer)} of {len(counts)} {what} are cut at {used} tokens, the longest has {max(longer)}: {advice}"]


def _token_count(tokenizer, caption, weighted):
    pieces = [text for text, _ in parse_weighted_caption(caption)] if weighted else [caption]
    texts = tokenizer(pieces, add_special_tokens=False, truncation=False, verbose=False).input_ids
    return sum(map(len, texts))


def encode_captions(
    text_encoder: torch.nn.Module,
    tokenizer: CLIPTokenizer,
    captions: list[str],
    *,
    max_token_length: int | None = 75,
    clip_skip: int | None = None,
    weighted: bool = False,
    sdxl: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Text states of a batch of captions.

    text_encoder: a CLIP text model; gradients flow through it.
    captions: B strings.
    max_token_length: 75, 150 or 225 tokens (None means 75).
    clip_skip: the n-th state from the end, then the final layer norm; None or 1: the last.
    weighted: read ``(word:1.3)`` and ``[word]``; the mean of each caption's states is preserved.
    sdxl: as SDXL takes its text: the penultimate layer's states without the final layer norm,
    chunks joined as they are, and the first chunk's pooled output.
    Returns (B, 75 n + 2, D); with ``sdxl`` a pair of it and (B, P)."""
    chunks = _chunk_count(max_token_length)
    body_tokens = text_encoder.config.max_position_embeddings - 2
    pairs = [tokenize_chunks(tokenizer, caption, chunks, body_tokens, weighted) for caption in captions]
    device = next(text_encoder.parameters()).device
    ids = torch.stack([pair[0] for pair in pairs]).to(device)  # (B, n, 77)
    output = text_encoder(ids.flatten(0, 1), output_hidden_states=True)
    states = output.hidden_states[-2] if sdxl else _layer_states(text_encoder, output, clip_skip)  # (B n, 77, D)
    states = states.unflatten(0, (len(captions), chunks))
    states = _join_chunks(states if sdxl else _empty_as_padding(states, ids, tokenizer))
    if weighted:
        states = _weight_states(states, torch.stack([pair[1] for pair in pairs]).to(device))
    if not sdxl:
        return states
    pooled = output.text_embeds if hasattr(output, "text_embeds") else output.pooler_output
    return states, pooled.unflatten(0, (len(captions), chunks))[:, 0]


def _chunk_count(max_token_length):
    if max_token_length not in (None, *TOKEN_LENGTHS):
        raise ValueError(f"max_token_length is {max_token_length}; allowed are 75, 150 and 225")
    return (max_token_length or TOKEN_LENGTHS[0]) // TOKEN_LENGTHS[0]


def _layer_states(text_encoder, output, clip_skip):
    if clip_skip is None or clip_skip == 1:
        return output.last_hidden_state
    layers = text_encoder.config.num_hidden_layers
    if not 1 <= clip_skip <= layers:
        raise ValueError(
            f"clip_skip is {clip_skip}; this text encoder has {layers} layers, so 1 to {layers} is allowed"
        )
    text_model = getattr(text_encoder, "text_model", text_encoder)
    return text_model.final_layer_norm(output.hidden_states[-clip_skip])


def _empty_as_padding(states, ids, tokenizer):
    """A later chunk without text starts with an EOS that is there already: show it as padding."""
    pad = tokenizer.pad_token_id
    if states.shape[1] == 1 or pad is None or pad == tokenizer.eos_token_id:
        return states
    empty = ids[:, :, 1] == tokenizer.eos_token_id  # (B, n)
    empty[:, 0] = False
    first = torch.where(empty[..., None], states[:, :, 2], states[:, :, 1])
    return torch.cat([states[:, :, :1], first[:, :, None], states[:, :, 2:]], dim=2)


def _join_chunks(states):
    """(B, n, 77, D) -> (B, 75 n + 2, D): the first BOS, every chunk's body, the last EOS."""
    return torch.cat([states[:, 0, :1], states[:, :, 1:-1].flatten(1, 2), states[:, -1, -1:]], dim=1)


def _weight_states(states, weights):
    """Multiply positions by their weights, keep each mean. states (B, T, D), weights (B, T)."""
    mean_before = states.float().mean(dim=(1, 2), keepdim=True)
    states = states * weights.to(states.dtype)[..., None]
    mean_after = states.float().mean(dim=(1, 2), keepdim=True)
    # A text encoder whose states average to nothing has no mean; the quotient would be noise.
    has_mean = mean_after.abs() > 1e-3 * states.float().std(dim=(1, 2), keepdim=True)
    factor = torch.where(has_mean, mean_before / torch.where(has_mean, mean_after, 1.0), 1.0)
    return states * factor.to(states.dtype)
