"""Old text as a model reads it: given texts cut into pieces, or texts that it writes itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .language_models import class_name, is_causal, placeholders, token_ids, vocabulary
from .sharding import processes

Texts = Sequence[str] | Sequence[Tensor] | Sequence[Sequence[int]]

TOKENS, LENGTH, BATCH_SIZE = 8192, 128, 8
"""Of old text that is read at most, of a piece of it, and pieces at once, unless asked for."""


def listed(texts: Texts) -> list[Any]:
    """Texts as a list: a string or a tensor alone is one text.

    Raises:
        ValueError: they are a mapping, whose names would be read, or a file's name.
    """
    if isinstance(texts, Mapping):
        raise ValueError(
            f"texts are a mapping with {', '.join(map(str, texts))}: give one column of texts, "
            "such as dataset['train']['text'] or tokenizer(texts)['input_ids']"
        )
    if isinstance(texts, os.PathLike) or (isinstance(texts, str) and os.path.isfile(texts)):
        raise ValueError(f"{os.fspath(texts)} is a file: read it, and give the texts in it")
    return [texts] if isinstance(texts, str | Tensor) else list(texts)


def pieces_of(
    model: Any, texts: list[Any], tokenizer: Any, tokens: int, length: int
) -> list[Tensor]:
    """Texts cut into pieces of 2 to ``length`` token ids, ``tokens`` in all at most.

    Padding at the ends of token ids is left out, where the tokenizer or the model's config names
    its token; where that begins or ends texts too, one of it is kept. So are the places of images,
    videos and sound, which the config names: what goes there is not read.

    Raises:
        ValueError: no text, one of fewer than two tokens or of ids that the model does not know, or
            something else than text.
    """
    known: Any = vocabulary(model)
    media = torch.tensor(placeholders(model), dtype=torch.int64, device="cpu")
    pad = next(iter(token_ids(model, tokenizer, "pad")), None)
    kept = int(pad in token_ids(model, tokenizer, "bos") + token_ids(model, tokenizer, "eos"))
    if not texts:
        raise ValueError("there is no text to anchor by: give some, or texts=None to sample")
    ids = []
    for number, text in enumerate(texts):
        quoted = ""
        if isinstance(text, str):
            quoted = f" ({text.strip()[:40]!r})"
            text = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.int64, device="cpu")
        elif isinstance(text, list | tuple) and all(type(token) is int for token in text):
            text = torch.tensor(text, dtype=torch.int64, device="cpu")
        if isinstance(text, Mapping):
            raise ValueError(
                f"text {number} is a row with {', '.join(text)}: give one column, such as "
                "dataset['input_ids']"
            )
        if not isinstance(text, Tensor) or text.is_floating_point() or text.dim() != 1:
            raise ValueError(
                f"text {number} is neither a string nor token ids (a list or 1-D tensor)"
            )
        places = torch.isin(text, media.to(text))
        if bool(places.any()) and (~places).sum() < 2:
            continue  # an image and no word
        text = text[~places]
        if pad is not None:
            places = (text != pad).nonzero().flatten()
            first, last = (int(places[0]), int(places[-1])) if len(places) else (0, -1 - kept)
            text = text[max(0, first - kept) : last + 1 + kept]
        outside = [] if known is None else text[(text < 0) | (text >= known)].tolist()
        if outside:
            raise ValueError(
                f"text {number} has the token id {outside[0]}, and the model knows 0 to "
                f"{known - 1}: give input_ids, not labels, of this model's tokenizer"
            )
        if text.numel() < 2:
            raise ValueError(
                f"text {number}{quoted} has {text.numel()} token(s): there is nothing to predict "
                "in fewer than two"
            )
        ids.append(text.long().cpu())
    if not ids:
        raise ValueError("the texts are places of images or sound alone: give some with words")
    pieces, left = [], tokens
    for begin in range(0, max(text.numel() for text in ids), length):
        for text in ids:
            piece = text[begin : begin + min(length, left)]
            if piece.numel() >= 2:
                pieces.append(piece)
                left -= piece.numel()
    return pieces


@torch.no_grad()
def sample(
    model: Any, tokenizer: Any, count: int, length: int, batch_size: int, generator: Any
) -> tuple[list[Tensor], bool]:
    """``count`` texts of ``length`` tokens that the model writes from its start token.

    An end token does not end a text: what the model writes after one belongs to what it knows.
    It writes none of the tokens that stand for images, videos or sound.

    Returns:
        The texts, and whether the model's logits were finite.
    """
    if not is_causal(model):
        raise ValueError(
            f"the model cannot sample: a {class_name(model)} writes no text from left to right; "
            "give texts to anchor by"
        )
    token, media = start_token(model, tokenizer), placeholders(model)
    pieces: list[Tensor] = []
    finite = True
    while len(pieces) < count:
        batch = min(4 * batch_size, count - len(pieces))
        ids = torch.full((batch, 1), token, device=generator.device)
        past = None
        for _ in range(length - 1):
            here = ids if past is None else ids[:, -1:]
            try:
                out = model(input_ids=here, past_key_values=past, use_cache=True)
            except TypeError as error:
                raise ValueError(
                    "the model cannot sample: its forward takes no past_key_values and use_cache "
                    f"({error}); give texts to anchor by"
                ) from error
            past, logits = getattr(out, "past_key_values", None), out.logits
            if logits.dim() != 3:
                raise ValueError(
                    "the model cannot sample: its logits are of a whole text, as a classifier's "
                    "are; give texts to anchor by"
                )
            drawn, is_finite = draw(logits[:, -1:], generator, without=media)
            ids, finite = torch.cat([ids, drawn], dim=1), finite and is_finite
        if not finite and processes()[1] == 1:
            return pieces, finite
        pieces += list(ids.cpu())
    return pieces, finite


def start_token(model: Any, tokenizer: Any) -> int:
    """The id of the token that a text of the model begins with.

    Raises:
        ValueError: neither the model's config nor the tokenizer names one.
    """
    ends = token_ids(model, None, "eos") + token_ids(model, tokenizer, "eos")
    for token in token_ids(model, tokenizer, "bos") + ends:
        return token
    raise ValueError(
        "the model cannot sample: neither its config nor a tokenizer names a start token; give "
        "texts to anchor by"
    )


def draw(logits: Tensor, generator: Any, without: Sequence[int] = ()) -> tuple[Tensor, bool]:
    """Draw a token ``[B, T]`` from each of ``logits [B, T, V]``; token 0 if one is not finite.

    Never one of those that it is to be drawn ``without``.

    Returns:
        The tokens, and whether the logits are finite.
    """
    logits = logits.float()
    finite = bool(torch.isfinite(logits.softmax(-1)).all())
    if banned := [token for token in without if token < logits.shape[-1]]:
        logits[..., banned] = -torch.inf
    shares = logits.softmax(-1)
    if not finite or not bool(torch.isfinite(shares).all()):
        return shares.new_zeros(logits.shape[:-1], dtype=torch.int64), False
    flat = shares.flatten(0, -2)
    return torch.multinomial(flat, 1, generator=generator).view(logits.shape[:-1]), True


def batches(pieces: Sequence[Tensor], batch_size: int) -> list[Tensor]:
    """The pieces as ``[B, T]``, each batch of one length."""
    alike: dict[int, list[Tensor]] = {}
    for piece in pieces:
        alike.setdefault(piece.numel(), []).append(piece)
    return [
        torch.stack(same[begin : begin + batch_size])
        for same in alike.values()
        for begin in range(0, len(same), batch_size)
    ]


__all__ = [
    "BATCH_SIZE",
    "LENGTH",
    "TOKENS",
    "Texts",
    "batches",
    "draw",
    "listed",
    "pieces_of",
    "sample",
    "start_token",
]
