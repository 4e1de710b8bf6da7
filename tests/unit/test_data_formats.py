"""Row formats: what the columns mean, which rows are refused, what becomes of them as tokens."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject
from hypothesis import strategies as st
from pydantic import ValidationError

from dare.core.data_recipe import DataRecipe, RowSource
from dare.core.errors import DareError
from dare.core.recipe import parse_recipe
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.data.formats import detect_format
from dare.data.read import Tally, load_rows
from dare.data.rows import PairRow, PreferencePair, Row, TextRow
from dare.families.tokenizer import decode
from dare.training.data import RowEncoder, encode_pairs, encode_rows
from tests.unit.test_data import BLOCKWISE, CHAT, DECODE, EOS, MASK, PLAIN, SPEC, turns, write_lines

USER, GOOD, BAD = (
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "yes"},
    {"role": "assistant", "content": "no"},
)


def read(tmp_path: Path, rows: Sequence[Any], **data: Any) -> list[Any]:
    return load_rows(DataRecipe(path=write_lines(tmp_path / "rows.jsonl", rows), **data))


def refused(tmp_path: Path, row: Any, good: Any, **data: Any) -> str:
    """The error of a file whose third line is `row`."""
    with pytest.raises(DareError) as error:
        read(tmp_path, [good, good, row], **data)
    assert "rows.jsonl, line 3" in str(error.value)
    return str(error.value)


# Sources


def test_columns_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a", "id": 7}]
    (row,) = read(tmp_path, rows, columns={"prompt": "question", "completion": "answer"})
    assert (row.prompt, row.completion, row.meta) == ("q", "a", {"id": 7})
    (row,) = read(tmp_path, rows, columns={"prompt": "question"})
    assert (row.completion, row.meta) == (None, {"answer": "a", "id": 7})
    with pytest.raises(ValidationError, match="columns"):
        DataRecipe(path="x.jsonl", columns={"promt": "question"})
    with pytest.raises(DareError, match="did you mean 'question'"):
        read(tmp_path, [rows[0]], columns={"prompt": "qestion"}, format="prompt_only")


def test_compressed_files_and_folders_are_read_in_order_of_names(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    write_lines(folder / "b.jsonl", [{"text": "two"}])
    with gzip.open(folder / "a.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "one"}) + "\n")
    (folder / "README.md").write_text("no rows")
    rows = load_rows(DataRecipe(path=str(folder)))
    assert [(row.uid, row.all_text()) for row in rows] == [("folder/0", "one"), ("folder/1", "two")]
    assert rows[0].where == f"{folder / 'a.jsonl.gz'}, line 1"
    whole = (folder / "a.jsonl.gz").read_bytes()
    for broken in (whole[:-12], b"\x1f\x8b" + bytes(20), b"no gzip"):
        (folder / "a.jsonl.gz").write_bytes(broken)
        with pytest.raises(DareError, match="compressed file cannot be read"):
            load_rows(DataRecipe(path=str(folder)))


def test_a_recipe_names_one_source_or_several() -> None:
    two = [{"path": "a.jsonl"}, {"path": "b.jsonl", "weight": 3}]
    assert [source.weight for source in DataRecipe.model_validate({"sources": two}).all_sources] == [1.0, 3.0]
    assert [source.path for source in DataRecipe(path="a.jsonl").all_sources] == ["a.jsonl"]
    for wrong in (
        {"path": "a.jsonl", "sources": two},
        {"sources": two, "columns": {"prompt": "q"}},
        {"sources": [{"path": "a.jsonl", "weight": 0}]},
        {"sources": [{"weight": 1}]},
        {"is_streaming": True},
        {"path": "a", "on_too_long": "truncate"},
        {"path": "a", "loss_roles": ["assistent"]},
        {"path": "a", "loss_roles": []},
    ):
        with pytest.raises(ValidationError):
            DataRecipe.model_validate(wrong)


# Bad rows


CHATS = {"messages": [USER, GOOD]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}\n', "not valid Unicode"),
        ('{"messages": ' + "[" * 100_000 + "\n", "not valid JSON"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty assistant message"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "malformed message"),
        ({"messages": []}, "messages is malformed"),
        ({"prompt": "p", "completion": "c"}, "give other rows a source of their own"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(row: Any, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, row, CHATS)


def test_bad_rows_can_be_skipped_and_are_counted(tmp_path: Path) -> None:
    rows = [CHATS, "{oops\n", {"messages": [USER]}, CHATS, {"messages": [USER, {"role": "assistant", "content": ""}]}]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    tally = Tally()
    found = load_rows(DataRecipe(path=path, on_bad_row="skip"), tally)
    assert [row.uid for row in found] == ["rows.jsonl/0", "rows.jsonl/3"]  # names do not depend on what was skipped
    assert (tally.num_read, tally.num_bad) == (5, 3)
    assert [error.details["where"] for error in tally.errors] == [f"{path}, line {number}" for number in (2, 3, 5)]
    (warning,) = tally.warnings()
    assert warning.startswith("3 of 5 rows are malformed and were skipped; the first one: not valid JSON;")
    with pytest.raises(DareError, match="every row is malformed"):
        load_rows(DataRecipe(path=write_lines(tmp_path / "rows.jsonl", rows[2:3]), on_bad_row="skip"))
    with pytest.raises(DareError, match="no known columns"):
        load_rows(DataRecipe(path=write_lines(tmp_path / "rows.jsonl", rows[1:2]), on_bad_row="skip"))


def test_rows_that_cannot_be_encoded_can_be_skipped_too() -> None:
    rows = [Row(str(i), f"line {i}", "1+1=", completion) for i, completion in enumerate(("2", "X", "3", None))]
    tally = Tally()
    found = encode_rows(PLAIN, rows, DataRecipe(on_bad_row="skip"), DECODE, SPEC, tally)
    assert [row.uid for row in found] == ["0", "2"]
    assert [error.details["where"].split(",")[0] for error in tally.errors] == ["line 1", "line 3"]
    with pytest.raises(DareError, match="no row is left"):
        encode_rows(PLAIN, rows[1:2], DataRecipe(on_bad_row="skip"), DECODE, SPEC)


# Chat


def test_text_can_be_put_as_a_chat_with_a_system_message(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    (row,) = read(tmp_path, [{"prompt": "q", "completion": "yes"}], is_chat=True, system="be brief")
    assert (row.prompt, row.completion) == ((system, USER), (GOOD,))
    own = {"role": "system", "content": "be long"}
    rows = read(tmp_path, [CHATS, {"messages": [own, USER, GOOD]}], system="be brief")
    assert [row.prompt[0]["content"] for row in rows] == ["be brief", "be long"]
    with pytest.raises(DareError, match=r"plain text has no system message[\s\S]*is_chat"):
        read(tmp_path, [{"prompt": "q", "completion": "a"}], system="s")


def test_loss_on_chosen_roles(tmp_path: Path) -> None:
    roles = ("user", "assistant")
    (row,) = read(tmp_path, [{"messages": turns("hi", "yo", "so", "ok")}], loss_turns="all", loss_roles=roles)
    data = DataRecipe(loss_roles=roles, eos="none")
    (encoded,) = encode_rows(CHAT, [row], data, DECODE, SPEC)
    text = decode(CHAT, encoded.prompt_ids + encoded.completion_ids, has_special=True)
    scored = [i for i, has_loss in zip(encoded.completion_ids, encoded.is_scored, strict=True) if has_loss]
    assert text == "u:hi<end>\na:yo<end>\nu:so<end>\na:ok<end>"
    # Of a user's turn the header is part of what the template writes; the assistant's is given.
    assert decode(CHAT, scored, has_special=True) == "u:hi<end>yo<end>u:so<end>ok<end>"
    with pytest.raises(DareError, match="must be the user's"):
        read(tmp_path, [{"messages": turns("hi", "yo")}], loss_roles=["user"])


# Preference


def pair(row: PairRow, spec: Any = SPEC, tokenizer: Any = PLAIN, **data: Any) -> PreferencePair:
    (found,) = encode_pairs(tokenizer, [row], DataRecipe(**data), DECODE, spec)
    return found


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": [USER], "chosen": "yes", "rejected": "no"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]},
    ],
)
def test_pairs_come_with_a_prompt_or_as_whole_conversations(columns: Any, tmp_path: Path) -> None:
    (row,) = read(tmp_path, [columns])
    assert (row.prompt, row.chosen, row.rejected) == ((USER,), (GOOD,), (BAD,))
    found = pair(row, tokenizer=CHAT, eos="none")
    assert found.chosen.prompt_ids == found.rejected.prompt_ids
    assert decode(CHAT, found.chosen.completion_ids, has_special=True) == "yes<end>"
    assert decode(CHAT, found.rejected.completion_ids, has_special=True) == "no<end>"
    assert (found.chosen.uid, found.rejected.uid) == ("rows.jsonl/0/chosen", "rows.jsonl/0/rejected")


TEXT_PAIR = {"prompt": "1+1=", "chosen": "2", "rejected": "3"}


def test_pairs_of_text_and_their_eos(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [TEXT_PAIR])
    found = pair(row, eos="one")
    assert decode(PLAIN, found.chosen.prompt_ids) == "1+1="
    assert found.chosen.completion_ids[1:] == found.rejected.completion_ids[1:] == [EOS]
    assert found.chosen.is_scored == [True, True]
    assert found.num_tokens == 12
    (row,) = read(tmp_path, [TEXT_PAIR], is_chat=True)
    assert row.prompt == ({"role": "user", "content": "1+1="},)
    assert row.chosen == ({"role": "assistant", "content": "2"},)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "chosen and rejected are equal"),
        ({"prompt": "q", "chosen": "a"}, "no rejected"),
        ({"prompt": "q", "chosen": "", "rejected": "a"}, "chosen is empty"),
        ({"chosen": "a", "rejected": "b"}, "the pair has no prompt"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [BAD]}, "prompt is text, the chosen messages"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "r"}, BAD]}, "does not answer the prompt"),
        ({"chosen": [USER, GOOD], "rejected": [USER, GOOD, USER, GOOD]}, "chosen does not answer the prompt"),
        ({"chosen": [USER, GOOD, USER], "rejected": [USER, BAD]}, "chosen does not answer the prompt"),
    ],
)
def test_a_malformed_pair_is_named(columns: Any, message: str, tmp_path: Path) -> None:
    assert message in refused(tmp_path, columns, TEXT_PAIR)


def test_sides_that_become_equal_and_rows_that_are_no_pairs_are_refused() -> None:
    row = PairRow("u", "line 4", "1+1=", "123", "124")
    with pytest.raises(DareError, match=r"the same tokens[\s\S]*line 4"):
        pair(row, eos="none", max_length=6, on_too_long="right")
    with pytest.raises(DareError, match="the row is no pair"):
        encode_pairs(PLAIN, [Row("u", "line 4", "1", "2")], DataRecipe(), DECODE, SPEC)
    with pytest.raises(DareError, match="the row is a pair"):
        encode_rows(PLAIN, [row], DataRecipe(), DECODE, SPEC)


@given(
    prompt=st.text(alphabet="0123456789", max_size=30),
    chosen=st.text(alphabet="abcdef", min_size=1, max_size=20),
    rejected=st.text(alphabet="abcdef", min_size=1, max_size=20),
    max_length=st.integers(2, 40),
    is_blockwise=st.booleans(),
)
def test_both_sides_of_a_pair_keep_the_same_prompt_however_it_is_cut(
    prompt: str, chosen: str, rejected: str, max_length: int, is_blockwise: bool
) -> None:
    spec = BLOCKWISE if is_blockwise else SPEC
    data = DataRecipe(eos="block" if is_blockwise else "one", max_length=max_length, on_too_long="left")
    row = PairRow("u", "here", prompt, chosen, rejected)
    try:
        found = RowEncoder(PLAIN, data, DECODE, spec).encode_pair(row)
    except DareError:  # no room for a completion, or equal sides
        reject()
    assert found is not None
    assert found.chosen.prompt_ids == found.rejected.prompt_ids
    kept = decode(PLAIN, found.chosen.prompt_ids)
    assert prompt.endswith(kept)
    for side, text in ((found.chosen, chosen), (found.rejected, rejected)):
        assert side.num_tokens <= max_length
        assert decode(PLAIN, side.completion_ids).startswith(text)  # completions are never cut from the left
        if is_blockwise:
            assert side.num_tokens % spec.block_length == 0


# Truncation


def test_cutting_the_prompt_keeps_the_completion_and_is_counted() -> None:
    rows = [Row("a", "line 1", "123456789", "abc"), Row("b", "line 2", "1", "abc")]
    tally = Tally()
    data = DataRecipe(eos="one", max_length=8, on_too_long="left")
    first, second = encode_rows(PLAIN, rows, data, DECODE, SPEC, tally)
    assert decode(PLAIN, first.prompt_ids) == "6789"
    assert decode(PLAIN, first.completion_ids, has_special=True) == "abc<eos>"
    assert decode(PLAIN, second.prompt_ids) == "1"
    assert (tally.num_truncated, tally.num_dropped) == (1, 0)
    with pytest.raises(DareError, match=r"too long[\s\S]*line 3"):
        encode_rows(PLAIN, [Row("c", "line 3", "1", "a" * 9)], data, DECODE, SPEC)


# Raw text


def test_raw_text_is_cut_into_rows_that_are_all_learnt(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"text": "abcdefghij"}])
    assert row == TextRow("rows.jsonl/0", f"{tmp_path / 'rows.jsonl'}, line 1", "abcdefghij")
    pieces = encode_rows(PLAIN, [row], DataRecipe(max_length=4), DECODE, SPEC)
    assert [decode(PLAIN, piece.completion_ids, has_special=True) for piece in pieces] == ["abcd", "efgh", "ij<eos>"]
    assert [piece.uid for piece in pieces] == [f"rows.jsonl/0/{i}" for i in range(3)]
    assert all(piece.prompt_ids == [] and all(piece.is_scored) for piece in pieces)
    blocks = encode_rows(PLAIN, [row], DataRecipe(max_length=6), DECODE, BLOCKWISE)
    assert [piece.num_tokens for piece in blocks] == [4, 4, 4]  # whole blocks, the last one filled with EOS
    assert blocks[-1].completion_ids[2:] == [EOS, EOS]
    with pytest.raises(DareError, match="eos: fill is for completions"):
        encode_rows(PLAIN, [row], DataRecipe(eos="fill"), DECODE, SPEC)
    assert "text is empty" in refused(tmp_path, {"text": ""}, {"text": "a"})


@given(text=st.text(alphabet="abcdefghij", min_size=1, max_size=200), max_length=st.integers(2, 64))
def test_no_character_of_a_raw_text_is_lost(text: str, max_length: int) -> None:
    pieces = encode_rows(PLAIN, [TextRow("u", "here", text)], DataRecipe(max_length=max_length), DECODE, SPEC)
    assert all(piece.num_tokens <= max_length for piece in pieces)
    joined = [token for piece in pieces for token in piece.completion_ids]
    assert decode(PLAIN, joined, has_special=True) == text + "<eos>"


@pytest.mark.parametrize("spec", [SPEC, BLOCKWISE], ids=["masked", "block"])
def test_a_share_of_raw_rows_is_cropped_to_random_lengths(spec: FamilySpec) -> None:
    """At the rate, uniformly, by row alone; without a key (validation) never."""
    rows = [TextRow(f"t{i}", "here", "abcdefghij" * 4) for i in range(600)]
    data = DataRecipe(max_length=40, eos="none", crop_rate=0.5)
    kept = [RowEncoder(PLAIN, data, DECODE, spec, key=Key(3)).encode(row)[0].num_tokens for row in rows]
    assert kept == [RowEncoder(PLAIN, data, DECODE, spec, key=Key(3)).encode(row)[0].num_tokens for row in rows]
    is_cut = [num < 40 for num in kept]
    assert 0.4 < sum(is_cut) / len(rows) < 0.6
    lengths = [num for num in kept if num < 40]
    assert min(lengths) <= 4
    assert 15 < sum(lengths) / len(lengths) < 26
    if spec is BLOCKWISE:
        assert all(num % 4 == 0 for num in kept)
    assert all(RowEncoder(PLAIN, data, DECODE, spec).encode(row)[0].num_tokens == 40 for row in rows[:50])
    never = DataRecipe(max_length=40, eos="none")
    assert all(RowEncoder(PLAIN, never, DECODE, spec, key=Key(3)).encode(row)[0].num_tokens == 40 for row in rows[:50])


# Token ids


def test_token_rows_carry_loss_where_their_labels_do(tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, -100, 4, -100]}])
    (encoded,) = encode_rows(PLAIN, [row], DataRecipe(), DECODE, SPEC)
    assert (encoded.prompt_ids, encoded.completion_ids) == ([1], [2, 3, 4])
    assert encoded.is_scored == [True, False, True]


@pytest.mark.parametrize(
    ("ids", "labels", "message"),
    [
        ([1, 2], [-100], "differ in length"),
        ([1, 2], [-100, 3], "position 1"),
        ([1, 2], [-100, -100], "no label carries loss"),
        ([1, True], [-100, 1], "input_ids is malformed"),
        ([], [], "input_ids is malformed"),
        ("12", [1, 2], "input_ids is malformed"),
    ],
)
def test_malformed_token_rows_are_named(ids: Any, labels: Any, message: str, tmp_path: Path) -> None:
    good = {"input_ids": [1], "labels": [1]}
    assert message in refused(tmp_path, {"input_ids": ids, "labels": labels}, good)


@pytest.mark.parametrize(("wrong", "message"), [(len(CHAT), "does not have"), (-1, "does not have"), (MASK, "mask")])
def test_labels_outside_the_vocabulary_are_named(wrong: int, message: str, tmp_path: Path) -> None:
    (row,) = read(tmp_path, [{"input_ids": [1, wrong], "labels": [-100, wrong]}])
    with pytest.raises(DareError, match=message) as error:
        encode_rows(PLAIN, [row], DataRecipe(), DECODE, SPEC)
    assert "rows.jsonl, line 1" in str(error.value)


# Detection


def detected(rows: Sequence[dict[str, Any]]) -> str:
    records: list[Any] = [(f"line {i}", row) for i, row in enumerate(rows)]
    return detect_format(records, RowSource(path="rows.jsonl"))


def test_the_format_is_that_of_most_rows() -> None:
    whole, bare = {"prompt": "p", "completion": "c"}, {"prompt": "p"}
    assert detected([whole, bare]) == "prompt_completion"
    assert detected([whole, whole, CHATS]) == "prompt_completion"
    assert detected([whole, bare, bare]) == "prompt_only"
    assert detected([{**whole, "completion": None}]) == "prompt_only"
    assert detected([{**TEXT_PAIR, "messages": [USER]}]) == "preference"
    assert detected([{"text": "t"}, {"messages": []}, {"input_ids": [1], "labels": [1]}, {"x": 1}]) == "messages"
    with pytest.raises(DareError, match="no known columns"):
        detected([{"chosen": "a"}, {"rejected": "b"}])


def test_a_misspelt_key_of_a_source_is_told_the_right_one() -> None:
    content = {"data": {"sources": [{"path": "a.jsonl"}, {"path": "b.jsonl", "wieght": 2}]}}
    with pytest.raises(DareError, match=r"data\.sources\.1\.wieght: unknown key; did you mean 'weight'"):
        parse_recipe({"name": "r", "model": {"path": "m"}, "algorithm": "sft", **content}, where="r.yaml")
