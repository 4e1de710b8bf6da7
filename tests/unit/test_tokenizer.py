"""Tokenizers: exact round trips, refusal of the unknown, and no code from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dare.core.errors import DareError
from dare.core.text import Prompt
from dare.families.tokenizer import (
    char_tokenizer,
    decode,
    encode_completion,
    encode_messages,
    encode_prompt,
    load_tokenizer,
)

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ m.role[0] + ':' + m.content + ';' }}{% endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
ALPHABET = "abcdefghijklmnopqrstuvwxyz<>|0123456789 .,:;\n\t\u00e9\u6f22\U0001f600"


def text_prompt(text: str) -> Prompt:
    return Prompt(uid="test/0", text=text)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return char_tokenizer(ALPHABET)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    made = char_tokenizer(ALPHABET)
    made.chat_template = TEMPLATE
    return made


def test_ids_follow_the_sorted_characters_then_pad_eos_mask() -> None:
    tokenizer = char_tokenizer("cabba")
    assert encode_prompt(tokenizer, text_prompt("abc")) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id) == (3, 4, 5)
    assert len(tokenizer) == 6
    assert encode_prompt(char_tokenizer("abc"), text_prompt("cab")) == encode_prompt(tokenizer, text_prompt("cab"))


@given(text=st.text(alphabet=ALPHABET, max_size=40))
def test_round_trip_is_exact(text: str, tokenizer: Any) -> None:
    ids = encode_completion(tokenizer, text)
    assert len(ids) == len(text)
    assert decode(tokenizer, ids) == text


@pytest.mark.parametrize("text", ["<eos>", "a<mask>b", "<pad> <pad>"])
def test_text_never_becomes_a_special_token(text: str, tokenizer: Any) -> None:
    ids = encode_completion(tokenizer, text)
    assert not {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.mask_token_id} & set(ids)
    assert decode(tokenizer, ids) == text


def test_special_tokens_are_hidden_or_shown(tokenizer: Any) -> None:
    ids = [*encode_completion(tokenizer, "a . b"), tokenizer.mask_token_id, tokenizer.eos_token_id]
    assert decode(tokenizer, ids) == "a . b"
    assert decode(tokenizer, ids, has_special=True) == "a . b<mask><eos>"


def test_unknown_characters_are_named(tokenizer: Any) -> None:
    with pytest.raises(DareError, match="'X' is not in the vocabulary") as error:
        encode_prompt(tokenizer, text_prompt("abXY"))
    assert "'XY'" in str(error.value)


def test_empty_text_and_empty_alphabet(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, text_prompt("")) == []
    with pytest.raises(DareError, match="at least one character"):
        char_tokenizer("")


def test_saved_beside_a_foreign_config_it_loads_equal_and_quietly(
    tmp_path: Path, chat_tokenizer: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    chat_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llada", "auto_map": {"AutoConfig": "x.Y"}}))
    loaded = load_tokenizer(tmp_path)
    text = "a<eos> .\n\u6f22"
    assert encode_prompt(loaded, text_prompt(text)) == encode_prompt(chat_tokenizer, text_prompt(text))
    assert decode(loaded, encode_completion(loaded, text)) == text
    assert (loaded.mask_token_id, loaded.eos_token_id) == (chat_tokenizer.mask_token_id, chat_tokenizer.eos_token_id)
    assert loaded.chat_template == TEMPLATE
    assert "model of type" not in capfd.readouterr().err
    with pytest.raises(DareError, match="not in the vocabulary"):
        encode_prompt(loaded, text_prompt("X"))


def test_a_folder_without_tokenizer_files_has_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    path.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnTokenizer: pass\n")
    with pytest.raises(DareError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_broken_files_are_an_error(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DareError, match="cannot be loaded"):
        load_tokenizer(tmp_path)


def test_messages_go_through_the_template(chat_tokenizer: Any) -> None:
    messages = ({"role": "user", "content": "hi"},)
    prompt = Prompt(uid="test/1", messages=messages)
    assert decode(chat_tokenizer, encode_prompt(chat_tokenizer, prompt)) == "u:hi;a:"
    closed = encode_messages(chat_tokenizer, [*messages, {"role": "assistant", "content": "yo"}], is_open=False)
    assert decode(chat_tokenizer, closed) == "u:hi;a:yo;"


def test_messages_without_a_template_or_refused_by_it(tokenizer: Any, chat_tokenizer: Any) -> None:
    with pytest.raises(DareError, match="this tokenizer has none") as error:
        encode_prompt(tokenizer, Prompt(uid="test/2", messages=({"role": "user", "content": "hi"},)))
    assert "test/2" in str(error.value)
    with pytest.raises(DareError, match="no tools"):
        encode_prompt(chat_tokenizer, Prompt(uid="test/3", messages=({"role": "tool", "content": "hi"},)))


def test_a_role_that_the_template_writes_must_be_in_the_vocabulary() -> None:
    tokenizer = char_tokenizer("user: abc")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    assert encode_prompt(tokenizer, Prompt("x", messages=({"role": "user", "content": "a"},)))
    with pytest.raises(DareError, match="'l' is not in the vocabulary"):
        encode_prompt(tokenizer, Prompt("x", messages=({"role": "tool", "content": "a"},)))
