"""Text to token ids and back. Checkpoints bring their tokenizer; new models get one token per character.

Tokenizers are `transformers` fast tokenizers (typed `Any`: the library is loaded when first used).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from dare.core.errors import DareError
from dare.core.text import Message, Prompt

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
_SPECIAL = {"pad_token": "<pad>", "eos_token": "<eos>", "mask_token": "<mask>"}


def char_tokenizer(alphabet: str) -> Any:
    """A `PreTrainedTokenizerFast` with one token per character of `alphabet`, then <pad>, <eos> and <mask>.

    Ids follow the sorted characters, so they depend on the set only. Text never encodes to a special token, not even
    the text "<eos>". Raises DareError for an empty alphabet.
    """
    from tokenizers import Regex, Tokenizer, decoders
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    if not alphabet:
        raise DareError("a character tokenizer needs at least one character")
    tokens = [*sorted(set(alphabet)), *_SPECIAL.values()]
    backend = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}))
    backend.pre_tokenizer = Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, split_special_tokens=True, **_SPECIAL
    )


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of a checkpoint folder; None if the folder holds no tokenizer files.

    Raises DareError if the files cannot be read, or would need code from the checkpoint, which is never run.
    """
    from transformers import AutoTokenizer, PretrainedConfig

    folder = Path(path)
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        # A blank config, because transformers does not know the families' config.json and would warn about it.
        return AutoTokenizer.from_pretrained(folder, config=PretrainedConfig(), trust_remote_code=False)
    except Exception as error:  # `tokenizers` raises nothing more specific for a malformed file
        raise DareError(
            "the tokenizer cannot be loaded",
            where=str(folder),
            got=f"{type(error).__name__}: {error}",
            expected="files of a tokenizer that transformers knows; code of a checkpoint is never run",
        ) from error


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Ids of plain text; no special tokens are added. Raises DareError for a character outside the vocabulary."""
    _check_characters(tokenizer, text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    return ids


def encode_prompt(tokenizer: Any, prompt: Prompt) -> list[int]:
    """Ids of a prompt: text as it is, messages through the chat template, up to where the assistant begins.

    Raises DareError if messages meet a tokenizer without a template, or one that refuses them.
    """
    if prompt.text is not None:
        return encode_text(tokenizer, prompt.text)
    return encode_messages(tokenizer, prompt.messages or (), is_open=True, where=prompt.uid)


def encode_completion(tokenizer: Any, text: str) -> list[int]:
    """Ids of a completion, without EOS."""
    return encode_text(tokenizer, text)


def encode_messages(
    tokenizer: Any, messages: Iterable[Message], *, is_open: bool, where: str | None = None
) -> list[int]:
    """Ids of a conversation; `is_open` adds the header of an assistant turn. Errors as in `encode_prompt`."""
    ids: list[int] = _apply_template(
        tokenizer, messages, {"add_generation_prompt": is_open, "return_dict": False}, where
    )
    return ids


def render_messages(tokenizer: Any, messages: Iterable[Message], *, is_open: bool, where: str | None = None) -> str:
    """A conversation as text; `is_open` adds the header of an assistant turn, otherwise the last message stays open
    for its continuation. Errors as in `encode_prompt`."""
    how = {"add_generation_prompt": is_open, "continue_final_message": not is_open, "tokenize": False}
    text: str = _apply_template(tokenizer, messages, how, where)
    return text


def _apply_template(tokenizer: Any, messages: Iterable[Message], how: dict[str, bool], where: str | None) -> Any:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DareError(
            "chat messages need a chat template, and this tokenizer has none",
            where=where,
            fix="use plain text instead of messages, or a checkpoint that was tuned for chat",
        )
    plain = [dict(message) for message in messages]
    for message in plain:
        _check_characters(tokenizer, message.get("content", ""))
    try:
        if _is_character_level(tokenizer):
            _check_characters(tokenizer, tokenizer.apply_chat_template(plain, **{**how, "tokenize": False}))
        return tokenizer.apply_chat_template(plain, **how)
    except TemplateError as error:
        roles = ", ".join(message.get("role", "?") for message in plain)
        raise DareError(f"the chat template refuses the messages: {error}", where=where, got=f"roles {roles}") from None


def generation_spans(
    tokenizer: Any, messages: Iterable[Message], *, where: str | None = None
) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Ids of a conversation and the (start, end) of what its template marks with `{% generation %}`.

    None if the template marks nothing. Errors as in `encode_prompt`.
    """
    if "generation" not in str(tokenizer.chat_template or ""):
        return None
    plain = [dict(message) for message in messages]
    ids = encode_messages(tokenizer, plain, is_open=False, where=where)
    rendered = tokenizer.apply_chat_template(plain, return_dict=True, return_assistant_tokens_mask=True)
    bordered = [False, *(bool(mark) for mark in rendered["assistant_masks"]), False]
    edges = [place for place in range(len(bordered) - 1) if bordered[place] != bordered[place + 1]]
    return (ids, list(zip(edges[::2], edges[1::2], strict=True))) if edges else None


def turn_end(opened: list[int], closed: list[int], special_ids: Collection[int], *, is_always_open: bool) -> int:
    """Where the turn that `closed` adds to the open conversation `opened` ends: after its last special token.

    A template that is always open (LLaDA's) also writes the header of the next turn. Both conversations end with it,
    after the token that ends a turn: there the turn stops at the first special token that they have in common.
    """
    ends = [place for place in range(len(opened), len(closed)) if closed[place] in special_ids]
    if is_always_open:
        num_common = 0
        while num_common < len(closed) - len(opened) and opened[-1 - num_common] == closed[-1 - num_common]:
            num_common += 1
        ends = [place for place in ends if place >= len(closed) - num_common][:1]
    return ends[-1] + 1 if ends else len(closed)


def decode(tokenizer: Any, ids: Sequence[int], *, has_special: bool = False) -> str:
    """The text of token ids; `has_special` keeps special tokens visible."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=not has_special, clean_up_tokenization_spaces=False)
    return text


def token_piece(tokenizer: Any, token: int) -> str:
    """The text of one token, special ones included; the tokenizer's own name for it where that is no whole text.

    Without a tokenizer, and for ids that it does not know, the id.
    """
    if tokenizer is None:
        return str(token)
    text = decode(tokenizer, [token], has_special=True)
    if text and "\ufffd" not in text:
        return text
    name = tokenizer.convert_ids_to_tokens(token)
    return str(token) if name is None else str(name)


def _is_character_level(tokenizer: Any) -> bool:
    from tokenizers.models import WordLevel

    return bool(tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.model, WordLevel))


def _check_characters(tokenizer: Any, text: str) -> None:
    """A character tokenizer has no token for the unknown: dropping or replacing characters would change the problem."""
    if not _is_character_level(tokenizer):
        return
    if not tokenizer.split_special_tokens:
        for token in tokenizer.all_special_tokens:
            text = text.replace(token, "")
    known = {token for token in tokenizer.get_vocab() if token not in tokenizer.all_special_tokens}
    unknown = sorted(set(text) - known)
    if unknown:
        raise DareError(
            f"the character {unknown[0]!r} is not in the vocabulary",
            where=repr(text if len(text) <= 80 else text[:77] + "..."),
            got=f"unknown characters {''.join(unknown)!r}",
            expected=f"only {''.join(sorted(known))!r}",
        )
