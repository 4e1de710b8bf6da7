"""Offline rows: what is read, refused, encoded and scored, and the order in which rows are visited."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dare.core.data_recipe import DataRecipe
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.recipe import TaskChoice
from dare.core.rng import Key
from dare.data.order import row_indices
from dare.data.read import load_rows
from dare.data.rows import EncodedRow, Row
from dare.families.base import FamilySpec
from dare.families.tokenizer import char_tokenizer, decode
from dare.training.data import encode_rows, inspect_row, task_rows

ALPHABET = "abcdefghijklmnopqrstuvwxyz0123456789:=+-.<> \n"
PLAIN = char_tokenizer(ALPHABET)
CHAT = char_tokenizer(ALPHABET)
CHAT.add_special_tokens({"additional_special_tokens": ["<end>"]})
# `split_special_tokens` is for prompts; a template must be able to write special tokens.
CHAT.split_special_tokens = False
CHAT.chat_template = (
    "{% for m in messages %}{{ m.role[0] + ':' + m.content + '<end>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
EOS, MASK = PLAIN.eos_token_id, PLAIN.mask_token_id
SPEC = FamilySpec(
    name="masked",
    attention="full",
    block_grid="completion",
    block_length=4,
    is_shifted=False,
    mask_id=MASK,
    eos_ids=(EOS,),
    pad_id=PLAIN.pad_token_id,
    vocab_size=len(CHAT),
    max_length=64,
)
BLOCKWISE = dataclasses.replace(SPEC, attention="block_causal", block_grid="sequence")
DECODE = Decode(gen_length=8)


def write_lines(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return str(path)


def encode(row: Row, spec: FamilySpec = SPEC, tokenizer: Any = PLAIN, **data: Any) -> EncodedRow:
    (encoded,) = encode_rows(tokenizer, [row], DataRecipe(**data), DECODE, spec)
    return encoded


def text_row(prompt: str = "1+2=", completion: str = "3") -> Row:
    return Row("uid", "here", prompt, completion)


def turns(*contents: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def scored_text(encoded: EncodedRow, tokenizer: Any = CHAT) -> str:
    shown = inspect_row(tokenizer, encoded)
    return "".join(text if has_loss else "_" for text, is_prompt, has_loss in shown if not is_prompt)


# Reading


def test_formats_follow_from_the_columns(tmp_path: Path) -> None:
    pairs = load_rows(DataRecipe(path=write_lines(tmp_path / "a.jsonl", [{"prompt": "p", "completion": "c", "x": 1}])))
    assert (pairs[0].prompt, pairs[0].completion, pairs[0].uid) == ("p", "c", "a.jsonl/0")
    chats = load_rows(DataRecipe(path=write_lines(tmp_path / "b.jsonl", [{"messages": turns("q", "a")}])))
    assert (chats[0].prompt, chats[0].completion) == (tuple(turns("q", "a")[:1]), tuple(turns("q", "a")[1:]))
    only = load_rows(DataRecipe(path=write_lines(tmp_path / "c.jsonl", [{"prompt": turns("q")}])))
    assert (only[0].prompt, only[0].completion) == (tuple(turns("q")), None)
    assert pairs[0].all_text() == "pc"
    assert chats[0].all_text() == "qa"


def test_message_prompts_take_text_or_messages_as_completion(tmp_path: Path) -> None:
    rows = [{"prompt": turns("q"), "completion": "a"}, {"prompt": turns("q"), "completion": turns("q", "a")[1:]}]
    first, second = load_rows(DataRecipe(path=write_lines(tmp_path / "a.jsonl", rows)))
    assert first.completion == second.completion == ({"role": "assistant", "content": "a"},)


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "p", "completion": "c"}\n\n{"prompt": "q", "completion": "d"}')
    assert [row.where for row in load_rows(DataRecipe(path=str(path)))] == [f"{path}, line 1", f"{path}, line 3"]


GOOD = {"prompt": "p", "completion": "c"}


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("{oops\n", "not valid JSON"),
        ('{"prompt": "p", "completion": "c"\n', "not valid JSON"),
        ("[1, 2]\n", "not a row"),
        ({"prompt": "p"}, "no completion"),
        ({"completion": "c"}, "no prompt"),
        ({"prompt": "p", "completion": ""}, "completion is empty"),
        ({"prompt": "p", "completion": None}, "no completion"),
        ({"prompt": "p", "completion": 7}, "completion is malformed"),
        ({"prompt": [], "completion": "c"}, "prompt is malformed"),
        ({"prompt": [{"role": "user"}], "completion": "c"}, "malformed message"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": "c"}, "malformed message"),
        ({"prompt": [{"role": "usr", "content": "q"}], "completion": "c"}, "did you mean 'user'"),
        ({"prompt": "p", "completion": turns("q", "a")[1:]}, "two of a kind"),
        ({"prompt": turns("q"), "completion": turns("q")}, "must end with the assistant"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(bad: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [GOOD, GOOD, bad, GOOD])
    with pytest.raises(DareError) as error:
        load_rows(DataRecipe(path=path))
    assert message in str(error.value)
    assert f"{path}, line 3" in str(error.value)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("q"), "last message must be the assistant's"),
        (turns("q", "a")[1:], "begins with the assistant"),
        (turns("q", ""), "empty assistant message"),
        ("q", "messages is malformed"),
    ],
)
def test_a_malformed_conversation_is_named_too(messages: Any, message: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{"messages": turns("q", "a")}, {"messages": messages}])
    with pytest.raises(DareError, match="line 2") as error:
        load_rows(DataRecipe(path=path))
    assert message in str(error.value)


def test_files_that_are_missing_empty_or_of_no_known_kind(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="not found"):
        load_rows(DataRecipe(path=str(tmp_path / "nothing.jsonl")))
    with pytest.raises(DareError, match="is empty"):
        load_rows(DataRecipe(path=write_lines(tmp_path / "empty.jsonl", [])))
    with pytest.raises(DareError, match="unknown kind"):
        load_rows(DataRecipe(path=write_lines(tmp_path / "rows.txt", [GOOD])))
    with pytest.raises(DareError, match="no known columns") as error:
        load_rows(DataRecipe(path=write_lines(tmp_path / "columns.jsonl", [{"question": "q", "answer": "a"}])))
    assert "answer, question" in str(error.value)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(DareError, match="line 1"):
        load_rows(DataRecipe(path=str(tmp_path / "latin.jsonl")))
    with pytest.raises(DareError, match="no rows to load"):
        load_rows(DataRecipe())


def test_a_named_format_is_obeyed(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    assert load_rows(DataRecipe(path=path, format="prompt_only"))[0].completion is None
    with pytest.raises(DareError, match="no messages"):
        load_rows(DataRecipe(path=path, format="messages"))


@pytest.mark.slow
def test_parquet_and_datasets_folders_equal_json_lines(tmp_path: Path) -> None:
    import datasets

    records = [{"messages": turns("q", "a")}, {"messages": turns("q", "a", "r", "b")}]
    lines = load_rows(DataRecipe(path=write_lines(tmp_path / "rows.jsonl", records)))
    table = datasets.Dataset.from_list(records)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "splits")
    for name in ("rows.parquet", "saved", "splits"):
        rows = load_rows(DataRecipe(path=str(tmp_path / name)))
        assert [(row.prompt, row.completion) for row in rows] == [(row.prompt, row.completion) for row in lines]
        assert rows[1].where == f"{tmp_path / name}, row 2"
    assert len(load_rows(DataRecipe(path=str(tmp_path / "splits"), split="test"))) == 1
    with pytest.raises(DareError, match="did you mean 'train'"):
        load_rows(DataRecipe(path=str(tmp_path / "splits"), split="trian"))
    datasets.Dataset.from_list([GOOD, {"prompt": "p", "completion": ""}]).to_parquet(tmp_path / "bad.parquet")
    with pytest.raises(DareError, match="completion is empty") as error:
        load_rows(DataRecipe(path=str(tmp_path / "bad.parquet")))
    assert "row 2" in str(error.value)
    (tmp_path / "broken.parquet").write_text("no")
    with pytest.raises(DareError, match="cannot be read"):
        load_rows(DataRecipe(path=str(tmp_path / "broken.parquet")))


# Encoding: EOS


@pytest.mark.parametrize(
    ("eos", "spec", "tail"),
    [
        ("none", SPEC, 0),
        ("one", SPEC, 1),
        ("fill", SPEC, 5),  # to gen_length 8
        ("block", SPEC, 1),  # completion grid: 3 + 1 fills the block of 4
        ("block", BLOCKWISE, 1),  # sequence grid: 4 + 3 + 1 ends a block
        (None, SPEC, 5),
        (None, BLOCKWISE, 1),
    ],
)
def test_eos_policy_adds_scored_eos(eos: Any, spec: FamilySpec, tail: int) -> None:
    encoded = encode(text_row("1+2=", "abc"), spec, eos=eos)
    assert decode(PLAIN, encoded.prompt_ids) == "1+2="
    assert decode(PLAIN, encoded.completion_ids[:3]) == "abc"
    assert encoded.completion_ids[3:] == [EOS] * tail
    assert encoded.is_scored == [True] * (3 + tail)
    assert encoded.uid == "uid"


@given(
    prompt=st.text(alphabet="0123456789+", max_size=12),
    completion=st.text(alphabet="0123456789", min_size=1, max_size=12),
    block_length=st.integers(1, 8),
    is_sequence=st.booleans(),
)
def test_block_policy_always_ends_with_eos_at_the_end_of_a_block(
    prompt: str, completion: str, block_length: int, is_sequence: bool
) -> None:
    spec = dataclasses.replace(SPEC, block_grid="sequence" if is_sequence else "completion", block_length=block_length)
    encoded = encode(text_row(prompt, completion), spec, eos="block")
    end = len(encoded.completion_ids) + (len(encoded.prompt_ids) if is_sequence else 0)
    num_eos = len(encoded.completion_ids) - len(completion)
    assert end % block_length == 0
    assert 1 <= num_eos <= block_length
    assert encoded.completion_ids[len(completion) :] == [EOS] * num_eos


def test_fill_leaves_a_completion_of_full_length_without_eos() -> None:
    assert EOS not in encode(text_row(completion="12345678"), eos="fill").completion_ids


def test_fill_length_can_be_set_apart_from_decoding() -> None:
    assert len(encode(text_row(), eos="fill", gen_length=11).completion_ids) == 11
    with pytest.raises(ValidationError, match="gen_length needs eos: fill"):
        DataRecipe(eos="one", gen_length=11)


# Encoding: length


@pytest.mark.parametrize(
    ("completion", "data", "limit"),
    [
        ("123456789", {"eos": "fill"}, "gen_length 8"),
        ("123456", {"eos": "one", "max_length": 10}, "max_length 10"),
        ("1" * 70, {"eos": "none"}, "max_length 64"),
        ("1" * 70, {"eos": "none", "max_length": 1000}, "max_length 64"),
    ],
)
def test_a_row_that_is_too_long_is_named(completion: str, data: dict[str, Any], limit: str) -> None:
    with pytest.raises(DareError, match="too long") as error:
        encode(text_row(completion=completion), **data)
    assert "here" in str(error.value)
    assert limit in str(error.value)


def test_a_row_of_exactly_max_length_fits() -> None:
    encoded = encode(text_row(completion="12345"), eos="one", max_length=10)
    assert len(encoded.prompt_ids) + len(encoded.completion_ids) == 10


def test_long_rows_can_be_dropped_or_truncated() -> None:
    rows = [text_row(completion="3"), text_row(completion="123456789")]
    dropped = encode_rows(PLAIN, rows, DataRecipe(on_too_long="drop"), DECODE, SPEC)
    assert [decode(PLAIN, row.completion_ids) for row in dropped] == ["3"]
    _, cut = encode_rows(PLAIN, rows, DataRecipe(on_too_long="right"), DECODE, SPEC)
    assert decode(PLAIN, cut.completion_ids, has_special=True) == "12345678"  # unfinished: no EOS
    with pytest.raises(DareError, match="every row is too long"):
        encode_rows(PLAIN, rows[1:], DataRecipe(on_too_long="drop"), DECODE, SPEC)
    with pytest.raises(DareError, match="too long"):  # no room for any completion
        encode(text_row(prompt="1" * 64), on_too_long="right")


def test_rows_without_completion_with_masks_or_unknown_characters_are_refused() -> None:
    with pytest.raises(DareError, match="only a prompt"):
        encode(Row("uid", "here", "p", None))
    with pytest.raises(DareError, match="'X' is not in the vocabulary") as error:
        encode(text_row(completion="X"))
    assert "here" in str(error.value)
    with pytest.raises(DareError, match="mask token"):
        encode(text_row(completion="a<mask>"), tokenizer=CHAT)


# Encoding: conversations


def conversation(*contents: str, loss_turns: str = "last", tmp_path: Path) -> Row:
    path = write_lines(tmp_path / "chat.jsonl", [{"messages": turns(*contents)}])
    (row,) = load_rows(DataRecipe.model_validate({"path": path, "loss_turns": loss_turns}))
    return row


def test_last_turn_carries_loss_through_its_end_token(tmp_path: Path) -> None:
    encoded = encode(conversation("hi", "yo", "so", "ok", tmp_path=tmp_path), tokenizer=CHAT, eos="none")
    assert decode(CHAT, encoded.prompt_ids, has_special=True) == "u:hi<end>\na:yo<end>\nu:so<end>\na:"
    assert scored_text(encoded) == "ok<end>"


def test_all_turns_carry_loss_and_nothing_between_them(tmp_path: Path) -> None:
    row = conversation("hi", "yo", "so", "ok", loss_turns="all", tmp_path=tmp_path)
    encoded = encode(row, tokenizer=CHAT, eos="one")
    assert decode(CHAT, encoded.prompt_ids, has_special=True) == "u:hi<end>\na:"
    assert decode(CHAT, encoded.completion_ids, has_special=True) == "yo<end>\nu:so<end>\na:ok<end><eos>"
    assert scored_text(encoded) == "yo<end>" + "_" * len("\nu:so") + "_" + "_" * len("\na:") + "ok<end><eos>"


def test_an_end_of_turn_that_is_an_eos_is_not_doubled(tmp_path: Path) -> None:
    end = CHAT.convert_tokens_to_ids("<end>")
    spec = dataclasses.replace(SPEC, eos_ids=(EOS, end))
    row = conversation("hi", "yo", tmp_path=tmp_path)
    assert scored_text(encode(row, spec, CHAT, eos="one")) == "yo<end>"
    assert scored_text(encode(row, spec, CHAT, eos="fill")) == "yo<end>" + "<eos>" * 5
    assert scored_text(encode(row, spec, CHAT, eos="block")) == "yo<end><eos>"


def test_a_template_that_rewrites_history_is_an_error_for_all_turns(tmp_path: Path) -> None:
    rewriting = char_tokenizer(ALPHABET)
    rewriting.chat_template = (
        "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    with pytest.raises(DareError, match="rewrites earlier turns"):
        encode(conversation("hi", "yo", "so", "ok", loss_turns="all", tmp_path=tmp_path), tokenizer=rewriting)


def test_messages_without_a_template_name_the_row(tmp_path: Path) -> None:
    with pytest.raises(DareError, match="this tokenizer has none") as error:
        encode(conversation("hi", "yo", tmp_path=tmp_path))
    assert "chat.jsonl, line 1" in str(error.value)


# Tasks as data


def test_task_rows_encode_like_the_same_rows_from_a_file(tmp_path: Path) -> None:
    task = TaskChoice.model_validate({"name": "chain_sum", "train_size": 5, "eval_size": 2}).build(0)
    own = encode_rows(PLAIN, task_rows(task), DataRecipe(), DECODE, SPEC)
    prompts = [task.prompt("train", index) for index in range(5)]
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": p.text, "completion": p.answer} for p in prompts])
    read = encode_rows(PLAIN, load_rows(DataRecipe(path=path)), DataRecipe(), DECODE, SPEC)
    assert [(row.prompt_ids, row.completion_ids, row.is_scored) for row in own] == [
        (row.prompt_ids, row.completion_ids, row.is_scored) for row in read
    ]
    assert [row.uid for row in own] == [prompt.uid for prompt in prompts]


def test_inspect_shows_every_token_once() -> None:
    shown = inspect_row(PLAIN, encode(text_row("1+2=", "3"), eos="one"))
    assert shown == [(text, True, False) for text in "1+2="] + [("3", False, True), ("<eos>", False, True)]


# Order


@given(num_rows=st.integers(1, 40), batch_size=st.integers(1, 60), seed=st.integers(0, 5))
def test_every_row_is_visited_once_per_epoch(num_rows: int, batch_size: int, seed: int) -> None:
    num_steps = -(-3 * num_rows // batch_size)
    order = [index for step in range(num_steps) for index in row_indices(num_rows, batch_size, step, Key(seed))]
    for epoch in range(3):
        visited = Counter(order[epoch * num_rows : (epoch + 1) * num_rows])
        assert visited == Counter(range(num_rows))


def test_order_is_a_pure_function_of_the_step() -> None:
    late = row_indices(100, 8, 30, Key(1))
    assert [row_indices(100, 8, step, Key(1)) for step in range(31)][30] == late
    assert late == row_indices(100, 8, 30, Key(1))
    assert row_indices(100, 100, 0, Key(1)) != row_indices(100, 100, 1, Key(1))  # epochs differ
    assert row_indices(100, 100, 0, Key(1)) != row_indices(100, 100, 0, Key(2))  # and seeds


def test_batch_size_only_cuts_the_order() -> None:
    whole = row_indices(30, 60, 0, Key(3))
    assert [index for step in range(6) for index in row_indices(30, 10, step, Key(3))] == whole
