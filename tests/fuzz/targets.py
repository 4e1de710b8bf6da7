"""Everything that is read from outside, fed with hostile input: the reader returns, or raises one DareError.

A target writes what hypothesis draws into a folder and reads it back the way the program does.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from dare.core.checks import check
from dare.core.data_recipe import DataRecipe
from dare.core.recipe import load_recipe
from dare.data.read import Tally, load_rows
from dare.families.adapter_files import read_adapter
from dare.families.shards import Shards
from dare.families.tokenizer import char_tokenizer, load_tokenizer
from dare.families.weights import create_family, load_family, read_spec
from dare.report.run_data import load_run
from dare.report.trace_page import write_trace_page
from dare.rollout.trace_file import load_trace
from dare.training.checkpoint import read_state
from tests.golden_checkpoints import GOLDEN

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes" / "tiny").glob("*.yaml"))
FAMILIES = ("dream", "llada", "llada2_1", "llada_moe", "sdar", "sdar_moe")

NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([0, -1, 1, 2, 3, 2**31, 2**63, 10**18, 10**400]),
    st.floats(allow_nan=True, allow_infinity=True),
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=8), st.sampled_from(["", "..", "/etc/passwd", "\ud800"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)
SNIPPETS = st.sampled_from(
    [
        "[" * 5000,
        "{a: " * 3000,
        "a: &a [*a]",
        "a: &a [1,1,1,1,1,1,1,1,1]\n"
        + "\n".join(f"{c}: &{c} [{','.join(['*' + p] * 9)}]" for p, c in zip("abcdefghij", "bcdefghijk", strict=True)),
        "name: 2001-13-45",
        "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 5000,
        "? [a, b]\n: c",
        "? {a: b}\n: c",
        "!!python/object/apply:os.system [echo]",
        "a: !!binary '@'",
        "a: !!set {b, c}",
        "<<: 3",
        "a: !!timestamp x",
        "base: ..",
        "base: [1]",
        "base: {a: b}",
        "1: 2\nnull: 3\n2.5: 4\ntrue: 5",
        "\x00",
        "\ufeffname: a",
        "model: {create: {family: llada, hidden_size: 1e400}}",
        "a: 1:2:3",
        "a: .inf\nb: .nan",
    ]
)


@dataclass(frozen=True)
class Target:
    """`read` gets what `strategy` draws and an empty folder; DareError is its only way to refuse."""

    name: str
    strategy: SearchStrategy[Any]
    read: Callable[[Any, Path], object]


# Recipes


def _changed(data: Any, place: list[int], value: Any) -> Any:
    """A copy of plain data with one value replaced: at each level, the entry that `place` says, modulo their number."""
    if not place or not isinstance(data, dict | list) or not data:
        return value
    first, *rest = place
    if isinstance(data, dict):
        key = list(data)[first % len(data)]
        return {**data, key: _changed(data[key], rest, value)}
    index = first % len(data)
    return [*data[:index], _changed(data[index], rest, value), *data[index + 1 :]]


PLACES = st.lists(st.integers(0, 30), min_size=1, max_size=3)


@cache
def _resolved(index: int) -> dict[str, Any]:
    recipe = load_recipe(RECIPES[index % len(RECIPES)])
    return json.loads(json.dumps(recipe.model_dump(mode="json")))


@st.composite
def _recipes(draw: st.DrawFn) -> str:
    if draw(st.booleans()):
        return draw(st.one_of(SNIPPETS, st.text(max_size=60)))
    data = _resolved(draw(st.integers(0, len(RECIPES) - 1)))
    for _ in range(draw(st.integers(1, 2))):
        data = _changed(data, draw(PLACES), draw(VALUES))
    return yaml.safe_dump(data, allow_unicode=True)


def _read_recipe(text: str, folder: Path) -> object:
    path = folder / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    return check(load_recipe(path))


def _read_override(text: str, folder: Path) -> object:
    return check(load_recipe(RECIPES[0], [text]))


OVERRIDES = st.one_of(
    SNIPPETS.map(lambda text: f"train.steps={text}"),
    st.builds(
        lambda key, value: f"{key}={value}",
        st.sampled_from(
            ["train.steps", "task", "task.name", "model.create.family.x", "name", "", ".", "a..b", "decode"]
        ),
        st.text(max_size=20),
    ),
)

# Data

ROW_KEYS = st.sampled_from(
    ["messages", "prompt", "completion", "chosen", "rejected", "text", "input_ids", "labels", "role", "content", "x"]
)
MESSAGES = st.lists(
    st.one_of(VALUES, st.fixed_dictionaries({"role": st.one_of(VALUES, st.just("user")), "content": VALUES})),
    max_size=3,
)
ROWS = st.dictionaries(ROW_KEYS, st.one_of(VALUES, MESSAGES), max_size=4)
LINES = st.one_of(
    ROWS.map(lambda row: json.dumps(row).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=20),
    st.sampled_from([b"[" * 100_000, b'{"text": ' + b"9" * 5000 + b"}", b'{"text": "\\ud800"}', b"NaN", b""]),
)


def _read_rows(lines: tuple[list[bytes], bool, bool], folder: Path) -> object:
    content, is_skipping, is_chat = lines
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(content))
    data = DataRecipe(path=str(path), on_bad_row="skip" if is_skipping else "error", is_chat=is_chat)
    return load_rows(data, Tally())


def _read_packed(content: bytes, folder: Path) -> object:
    path = folder / "rows.jsonl.gz"
    path.write_bytes(content)
    return load_rows(DataRecipe(path=str(path)), Tally())


@cache
def _parquet() -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    rows = {"prompt": ["a", "b", "c"] * 20, "completion": ["x", "y", None] * 20}
    pyarrow.parquet.write_table(pyarrow.table(rows), file)
    return file.getvalue()


def _read_parquet(content: bytes, folder: Path) -> object:
    path = folder / "rows.parquet"
    path.write_bytes(content)
    return load_rows(DataRecipe(path=str(path)), Tally())


@st.composite
def _damaged(draw: st.DrawFn, whole: Callable[[], bytes]) -> bytes:
    """Bytes of a good file, some of them changed, cut or put in."""
    content = bytearray(whole())
    for _ in range(draw(st.integers(1, 4))):
        # The places that structure a file are at its ends.
        start = draw(
            st.integers(0, len(content)) | st.integers(0, min(64, len(content))) | st.just(max(len(content) - 8, 0))
        )
        kind = draw(st.sampled_from(["set", "cut", "insert", "end"]))
        some = draw(st.binary(min_size=1, max_size=8))
        if kind == "set":
            content[start : start + len(some)] = some
        elif kind == "cut":
            del content[start : start + draw(st.integers(1, 64))]
        elif kind == "insert":
            content[start:start] = some
        else:
            del content[start:]
    return bytes(content)


# Checkpoints


@st.composite
def _configs(draw: st.DrawFn) -> tuple[str, str]:
    name = draw(st.sampled_from(FAMILIES))
    config = json.loads((GOLDEN / name / "config.json").read_text())
    config.setdefault("mask_token_id", 126)
    for _ in range(draw(st.integers(1, 3))):
        config = _changed(config, draw(PLACES), draw(VALUES))
        if not isinstance(config, dict):
            break
    return name, json.dumps(config)


def _read_config(config: tuple[str, str], folder: Path) -> object:
    name, text = config
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").symlink_to(GOLDEN / name / "model.safetensors")
    return load_family(folder)


JSON_TEXTS = st.one_of(
    VALUES.map(json.dumps),
    st.sampled_from(["[" * 100_000, "9" * 5000, "", "{", '{"a": 1e999}', "\ufeff{}", "null", "[]", "3"]),
)


def _read_any_config(texts: tuple[str, str], folder: Path) -> object:
    config, generation = texts
    (folder / "config.json").write_text(config)
    (folder / "generation_config.json").write_text(generation)
    return read_spec(folder)


@cache
def _weights(dtype: str = "F32") -> bytes:
    header = {"a": {"dtype": dtype, "shape": [2, 2], "data_offsets": [0, 16]}, "__metadata__": {"format": "pt"}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


@st.composite
def _headers(draw: st.DrawFn) -> bytes:
    """A safetensors file whose header is any JSON."""
    header = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}
    text = json.dumps(_changed(header, draw(PLACES), draw(VALUES))).encode()
    length = draw(st.just(len(text)) | st.integers(0, 2**64 - 1))
    return length.to_bytes(8, "little") + text + bytes(16)


WEIGHTS = st.one_of(_headers(), _damaged(_weights), st.binary(max_size=40))


def _read_weights(content: bytes, folder: Path) -> object:
    (folder / "model.safetensors").write_bytes(content)
    shards = Shards(folder)
    return [tensor.shape for _, tensor in shards.tensors()]


INDEXES = st.one_of(
    JSON_TEXTS,
    st.dictionaries(
        st.text(max_size=4),
        st.one_of(VALUES, st.sampled_from(["..", "../a", "/etc/passwd", "a/../b", "x.safetensors"])),
        max_size=3,
    ).map(lambda names: json.dumps({"weight_map": names})),
)


def _read_index(text: str, folder: Path) -> object:
    (folder / "model.safetensors.index.json").write_text(text)
    (folder / "x.safetensors").write_bytes(_weights())
    return Shards(folder).shapes


@st.composite
def _states(draw: st.DrawFn) -> str:
    state = {"format": 1, "step": 3, "seed": 0, "log_bytes": {"metrics": 10}, "files": {"x": 2}}
    return json.dumps(_changed(state, draw(PLACES), draw(VALUES)))


def _read_state(text: str, folder: Path) -> object:
    (folder / "trainer").mkdir()
    (folder / "trainer" / "state.json").write_text(text)
    (folder / "x").write_bytes(b"12")
    return read_state(folder)


@st.composite
def _adapters(draw: st.DrawFn) -> tuple[str, bytes]:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], "bias": "none"}
    return json.dumps(_changed(config, draw(PLACES), draw(VALUES))), draw(WEIGHTS)


def _read_adapter(files: tuple[str, bytes], folder: Path) -> object:
    config, weights = files
    (folder / "adapter_config.json").write_text(config)
    (folder / "adapter_model.safetensors").write_bytes(weights)
    return read_adapter(folder)


@cache
def _tokenizer_files(folder: Path) -> dict[str, str]:
    char_tokenizer("abc").save_pretrained(folder)
    files = {path.name: path.read_text() for path in folder.iterdir()}
    shutil.rmtree(folder)
    return files


@st.composite
def _tokenizers(draw: st.DrawFn) -> tuple[bool, list[int], Any]:
    return draw(st.booleans()), draw(PLACES), draw(VALUES)


def _read_tokenizer(change: tuple[bool, list[int], Any], folder: Path) -> object:
    is_config, place, value = change
    for name, text in _tokenizer_files(folder / "whole").items():
        if name == ("tokenizer_config.json" if is_config else "tokenizer.json"):
            text = json.dumps(_changed(json.loads(text), place, value))
        (folder / name).write_text(text)
    return load_tokenizer(folder)


# What the program has written itself


@cache
def _trace() -> bytes:
    import tempfile

    import torch

    from dare.core.decode import Decode
    from dare.core.rng import Key
    from dare.rollout.engine import denoise
    from dare.rollout.trace_file import save_trace

    torch.set_num_threads(1)
    sizes = {"vocab_size": 12, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "mlp_size": 16, "max_length": 32}
    family = create_family("llada", **sizes, mask_id=11, eos_id=10, pad_id=9, seed=0, block_length=4)
    decode = Decode(gen_length=4, block_length=4)
    trace = denoise(family, [[1, 2], [3]], decode, Key(0), [0, 1], num_alternatives=2)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.safetensors"
        save_trace(path, trace, spec=family.spec, decode=decode, piece=str)
        return path.read_bytes()


@st.composite
def _traces(draw: st.DrawFn) -> bytes:
    """A trace with one change in its header or in what its metadata says, tensors left where they were."""
    if draw(st.booleans()):
        return draw(_damaged(_trace))
    content = _trace()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if draw(st.booleans()):
        info = _changed(json.loads(header["__metadata__"]["dare_trace"]), draw(PLACES), draw(VALUES))
        header["__metadata__"]["dare_trace"] = json.dumps(info)
    else:
        header = _changed(header, draw(PLACES), draw(VALUES))
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def _read_trace(content: bytes, folder: Path) -> object:
    path = folder / "trace.safetensors"
    path.write_bytes(content)
    return write_trace_page([load_trace(path)], folder / "page")


def _read_run(files: tuple[str, list[bytes], str], folder: Path) -> object:
    recipe, lines, status = files
    (folder / "recipe.yaml").write_bytes(recipe.encode("utf-8", "surrogatepass"))
    for name in ("metrics", "timing", "eval", "samples", "validation"):
        (folder / f"{name}.jsonl").write_bytes(b"\n".join([*lines, b""]))
    (folder / "run.json").write_text(status)
    return load_run(folder)


TARGETS = (
    Target("recipe", _recipes(), _read_recipe),
    Target("override", OVERRIDES, _read_override),
    Target("JSON lines", st.tuples(st.lists(LINES, max_size=4), st.booleans(), st.booleans()), _read_rows),
    Target("gzip", st.binary(max_size=60), _read_packed),
    Target("Parquet", _damaged(_parquet), _read_parquet),
    Target("config.json", _configs(), _read_config),
    Target("any config", st.tuples(JSON_TEXTS, JSON_TEXTS), _read_any_config),
    Target("safetensors", WEIGHTS, _read_weights),
    Target("index of shards", INDEXES, _read_index),
    Target("trainer state", st.one_of(JSON_TEXTS, _states()), _read_state),
    Target("adapter", _adapters(), _read_adapter),
    Target("tokenizer", _tokenizers(), _read_tokenizer),
    Target("trace", _traces(), _read_trace),
    Target("run folder", st.tuples(_recipes(), st.lists(LINES, max_size=3), JSON_TEXTS), _read_run),
)
