"""The command line: instant where it can be, clear where the user went wrong."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from dare.cli import app
from dare.core.errors import DareError
from dare.core.recipe import load_recipe
from dare.core.registry import TABLES
from dare.terminal.schema import recipe_keys
from dare.terminal.settings import evaluation_settings, find_run_recipe, parse_options, read_prompts

HEAVY = {"torch", "transformers", "datasets", "matplotlib", "reasoning_gym", "numpy", "jinja2"}
RECIPE = """\
name: tiny
model: {create: {family: llada}}
algorithm: {name: espo, num_mc: 2}
task: chain_sum
decode: {gen_length: 8, block_length: 8, temperature: 1.0}
evaluation: {num: 40, temperature: 0.0}
train: {steps: 7}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(RECIPE)
    return path


def dare(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["train", "--help"],
        ["list"],
        ["check", "FILE"],
        ["show", "FILE", "train.steps=9"],
        ["show", "--schema"],
    ],
    ids=" ".join,
)
def test_instant_verbs_load_nothing_heavy(words: list[str], recipe_file: Path) -> None:
    """CPU seconds, not wall time, so that a busy machine does not matter."""
    code = (
        "import sys, time\n"
        "from dare.cli import app\n"
        "try:\n    app(sys.argv[2:])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "print('loaded:', *sorted(set(sys.argv[1].split()) & set(sys.modules)), file=sys.stderr)\n"
        "print(time.process_time(), file=sys.stderr)\n"
    )
    words = [str(recipe_file) if word == "FILE" else word for word in words]
    command = [sys.executable, "-c", code, " ".join(HEAVY), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded, seconds = done.stderr.splitlines()[-2:]
    assert loaded == "loaded:"
    assert float(seconds) < 1.0
    assert done.stdout


@pytest.mark.parametrize(
    "verb",
    [
        *("train", "eval", "eval compare", "eval table", "generate", "check", "show", "list", "report"),
        *("data inspect", "data path", "data fetch", "bench rollout"),
    ],
    ids=str,
)
def test_every_verb_explains_itself_with_an_example(verb: str) -> None:
    result = dare(*verb.split(), "--help")
    assert result.exit_code == 0
    assert f"dare {verb}" in result.output.partition("Example")[2]


def test_show_is_the_resolved_recipe(recipe_file: Path, tmp_path: Path) -> None:
    result = dare("show", recipe_file, "train.steps=9", "decode.temperature=0.7")
    assert result.exit_code == 0
    again = tmp_path / "again.yaml"
    again.write_text(result.stdout)
    assert load_recipe(again) == load_recipe(recipe_file, ["train.steps=9", "decode.temperature=0.7"])
    assert yaml.safe_load(result.stdout)["train"]["steps"] == 9


def test_schema_has_every_key() -> None:
    text = dare("show", "--schema").stdout
    keys = {key.name: key for key in recipe_keys()}
    assert keys["train.steps"].default == "100"
    assert keys["model.create.family"].default == "required"
    assert keys["decode.block_length"].type == "int | null"
    assert keys["model.dtype"].type == "float32 | bfloat16"
    for line in ("optimizer.betas", "algorithm.num_mc", "task.train_size", "data.eos", "# algorithm: {name: espo}"):
        assert line in text
    assert re.search(r"^executor\.name +str +local ", text, flags=re.MULTILINE)


def test_list_shows_every_row() -> None:
    text = dare("list").stdout
    for rows in TABLES.values():
        for name, row in rows.items():
            assert name in text
            assert row.summary in text
    assert dare("list", "tasks").stdout.split()[0] == next(iter(TABLES["tasks"]))


def test_list_recipes_finds_files_of_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "_base").mkdir(parents=True)
    (tmp_path / "recipes" / "_base" / "hidden.yaml").write_text("x: 1\n")
    (tmp_path / "recipes" / "mine.yaml").write_text("# A recipe of mine.\nname: x\n")
    monkeypatch.chdir(tmp_path)
    assert dare("list", "recipes").stdout == "recipes/mine.yaml  A recipe of mine.\n"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "nowhere.yaml"], "recipe not found"),
        (["train", "FILE", "trian.steps=3"], "did you mean 'train'"),
        (["train", "FILE", "train.steps"], "key=value"),
        (["train", "FILE", "decode.temperature=0"], "greedy rollouts"),
        (["show", "FILE", "algorithm.name=grop"], "unknown algorithm 'grop'"),
        (["show"], "give a recipe, or --schema"),
        (["list", "algoritms"], "did you mean 'algorithms'"),
        (["eval", "nowhere"], "give --task NAME"),
        (["eval", "nowhere", "--task", "chain_sum", "--device", "gpu"], "unknown device 'gpu'"),
        (["generate", "nowhere"], "there is no prompt"),
        (["generate", "nowhere", "--prompt-ids", "1,x"], "token ids are integers"),
        (["generate", "nowhere", "--file", "nowhere.jsonl"], "cannot read the prompts"),
        (["generate", "nowhere", "--prompt", "1", "--dtype", "float23"], "did you mean 'float32'"),
        (["report", "nowhere"], "not a run folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_messages_with_exit_code_2(words: list[str], expected: str, recipe_file: Path) -> None:
    result = dare(*[recipe_file if word == "FILE" else word for word in words])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_verbs_and_options_are_usage_errors() -> None:
    for words in (["trian"], ["train"], ["list", "--al"]):
        result = dare(*words)
        assert result.exit_code == 2
        assert "Usage" in result.stderr


def test_check_looks_at_every_recipe(recipe_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text(RECIPE.replace("temperature: 1.0", "temperature: 0.0"))
    result = dare("check", wrong, recipe_file)
    assert result.exit_code == 2
    assert str(wrong) in result.stderr
    assert f"{recipe_file}: ok" in result.stdout
    assert dare("check", recipe_file).exit_code == 0
    few = tmp_path / "few.yaml"
    few.write_text(RECIPE.replace("num: 40", "num: 4"))
    assert "warning: evaluation.num 4" in dare("check", few).stdout


def test_interrupt_ends_with_130_and_says_how_to_go_on(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dare.api.train", interrupted)
    result = dare("train", recipe_file, "--out", recipe_file.parent / "run")
    assert result.exit_code == 130
    assert result.stderr == "interrupted: the same command with --resume continues from the last checkpoint\n"


def test_missing_permission_is_a_message(recipe_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: Any, **options: Any) -> None:
        raise PermissionError(13, "Permission denied", "/protected")

    monkeypatch.setattr("dare.api.train", refused)
    result = dare("train", recipe_file)
    assert result.exit_code == 2
    assert "/protected" in result.stderr


def test_options_are_yaml_values() -> None:
    words = ["gen_length=32", "temperature=1e-1", "eos_stop=null", "unmask=entropy", "forbid_eos=true", "a=b=c"]
    assert parse_options(words) == {
        "gen_length": 32,
        "temperature": "1e-1",  # YAML 1.1 wants 1.0e-1; pydantic reads the text
        "eos_stop": None,
        "unmask": "entropy",
        "forbid_eos": True,
        "a": "b=c",
    }
    with pytest.raises(DareError, match="a list"):
        parse_options(["a=[1, a list"])


def test_prompts_come_in_order_from_everywhere(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "user", "content": "a\u2028b"}]
    records = [{"prompt": "x"}, {"prompt": messages}, {"prompt_ids": [4, 5]}]
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    assert read_prompts(["1+1="], ["1, 2,3"], file, is_chat=False) == ["1+1=", [1, 2, 3], "x", messages, [4, 5]]
    assert read_prompts(["hi"], [], None, is_chat=True) == [[{"role": "user", "content": "hi"}]]


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"prompt": 3}', '{"prompt": []}', '{"prompt_ids": [true]}', '{"text": "x"}']
)
def test_malformed_prompts_name_file_and_line(tmp_path: Path, line: str) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "x"}\n' + line + "\n")
    with pytest.raises(DareError, match=r"prompts\.jsonl:2"):
        read_prompts([], [], file, is_chat=False)


def test_evaluation_uses_the_settings_of_the_run(recipe_file: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-000007"
    checkpoint.mkdir(parents=True)
    assert find_run_recipe(checkpoint) is None
    (run / "recipe.yaml").write_text(load_recipe(recipe_file, ["seed=5"]).dump_yaml())
    for path in (run, checkpoint):
        settings = evaluation_settings(str(path), None, None, ["gen_length=16", "task.eval_size=60"])
        assert settings.task["name"] == "chain_sum"
        assert settings.task["eval_size"] == 60
        assert (settings.num, settings.seed) == (40, 5)
        assert settings.decode["temperature"] == 0.0  # the evaluation's, not the rollouts'
        assert (settings.decode["gen_length"], settings.decode["block_length"]) == (16, 8)
    other = evaluation_settings(str(run), "countdown", recipe_file, [])
    assert other.task == {"name": "countdown"}
    assert other.decode["block_length"] == 8
    assert evaluation_settings("hub/id", "countdown", None, ["decode.gen_length=4"]).decode == {"gen_length": 4}


DECODE = ("gen_length=8", "block_length=4", "temperature=1.0")


def test_generate_prints_text_ids_and_json(tiny_checkpoints: dict[str, Path]) -> None:
    words = ["generate", tiny_checkpoints["llada"], "--prompt", "12+7=", "--prompt-ids", "1,2,3", "--seed", 3, *DECODE]
    plain = dare(*words)
    assert plain.exit_code == 0
    assert plain.stdout.startswith("12+7=\n")
    assert plain.stdout.count("8 forwards") == 2
    assert dare(*words).stdout == plain.stdout
    records = [json.loads(line) for line in dare(*words, "--json").stdout.splitlines()]
    assert [record["prompt"] for record in records] == ["12+7=", [1, 2, 3]]
    assert records[0]["text"] in plain.stdout
    assert all(len(record["tokens"]) == len(record["step_map"]) for record in records)


def test_trace_shows_every_step_of_the_same_completion(tiny_checkpoints: dict[str, Path]) -> None:
    words = ["generate", tiny_checkpoints["sdar"], "--prompt", "12+7=", *DECODE, "eos_stop=false"]
    frames = dare(*words, "--trace").stdout
    plain = dare(*words).stdout
    assert frames.endswith("\n\n" + plain)
    lines = [line for line in frames.splitlines() if line.startswith("  1  12+7=")]
    assert [line.count("░") for line in lines] == list(range(len(lines) - 1, -1, -1))
    assert len(lines) == json.loads(dare(*words, "--json").stdout)["nfe"]


def test_train_eval_report_and_inspect(recipe_file: Path, tmp_path: Path) -> None:
    """The whole path of a user, on a model that learns nothing in two steps."""
    small = [
        "train.steps=2",
        "train.batch_size=4",
        "evaluation.num=6",
        "task={name: chain_sum, train_size: 32, eval_size: 8}",
    ]
    sizes = "model.create={family: llada, hidden_size: 16, num_layers: 1, num_heads: 2, mlp_size: 16}"
    words = [recipe_file, *small, sizes, "algorithm=sft"]
    inspected = dare("data", "inspect", *words, "--num", 2)
    assert inspected.exit_code == 0
    assert inspected.stdout.count("carry loss") == 2
    run = tmp_path / "run"
    trained = dare("train", *words, "--out", run)
    assert trained.exit_code == 0
    assert "step 2/2" in trained.stdout
    assert dare("train", *words, "--out", run).exit_code == 2  # never overwrites
    resumed = dare("train", *words, "train.steps=3", "--out", run, "--resume")
    assert resumed.exit_code == 0
    assert "resumed after step 2 of 3" in resumed.stdout
    evaluated = dare("eval", run, "--json", "--out", tmp_path / "evaluation")
    assert json.loads(evaluated.stdout)["num"] == 6
    assert json.loads((tmp_path / "evaluation" / "summary.json").read_text()) == json.loads(evaluated.stdout)
    last = json.loads((run / "eval.jsonl").read_text().splitlines()[-1])
    assert last["num_solved"] == json.loads(evaluated.stdout)["num_solved"]
    reported = dare("report", run)
    assert reported.stdout == f"{run / 'report' / 'index.html'}\n"


def test_quiet_training_says_nothing(recipe_file: Path, tmp_path: Path) -> None:
    small = [
        "train.steps=1",
        "train.batch_size=4",
        "evaluation.num=30",
        "task={name: chain_sum, train_size: 32, eval_size: 30}",
    ]
    sizes = "model.create={family: llada, hidden_size: 16, num_layers: 1, num_heads: 2, mlp_size: 16}"
    result = dare("train", recipe_file, *small, sizes, "algorithm=sft", "--out", tmp_path / "run", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (tmp_path / "run" / "run.json").is_file()
