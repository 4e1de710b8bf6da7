"""From command-line words to options: key=value pairs, prompts, and what an evaluation should use."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from dare.core.errors import DareError
from dare.core.recipe import Recipe, load_recipe
from dare.core.yaml_text import load_yaml

PromptWords = str | list[int] | list[dict[str, str]]


class FilePrompt(NamedTuple):
    """A prompt of a file, and its place there: FILE:LINE."""

    where: str
    words: PromptWords


@dataclass
class EvaluationSettings:
    """Plain data for `dare.api.evaluate`."""

    task: dict[str, Any]
    decode: dict[str, Any] = field(default_factory=dict)
    num: int = 256
    seed: int = 0


def parse_options(words: list[str]) -> dict[str, Any]:
    """`["gen_length=32", ...]` as a mapping with YAML values. Raises DareError for a word without "="."""
    options = {}
    for word in words:
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise DareError(f"cannot read the option '{word}'", expected="key=value, for example gen_length=32")
        try:
            options[key] = load_yaml(text)
        except yaml.YAMLError as error:
            raise DareError(f"cannot read the value of '{word}'", got=str(error)) from None
    return options


def evaluation_settings(
    checkpoint: str, task: str | None, recipe_file: Path | None, overrides: list[str]
) -> EvaluationSettings:
    """What to evaluate with: a recipe's task, held-out number, seed and decode options, then the overrides.

    The recipe is `recipe_file`, or without a task that of the run the checkpoint belongs to.
    Raises DareError if there is no task.
    """
    if recipe_file is None and task is None:
        recipe_file = find_run_recipe(Path(checkpoint))
    settings = _from_recipe(load_recipe(recipe_file)) if recipe_file else EvaluationSettings(task={})
    if task is not None and settings.task.get("name") != task:
        settings.task = {"name": task}
    if not settings.task:
        raise DareError("there is no task to evaluate on", fix="give --task NAME; `dare list tasks` shows them")
    for key, value in parse_options(overrides).items():
        if key.startswith("task."):
            settings.task[key.removeprefix("task.")] = value
        else:
            settings.decode[key.removeprefix("decode.")] = value
    return settings


def generation_options(checkpoint: str, overrides: list[str]) -> dict[str, Any]:
    """Decode options: those that the checkpoint's run is evaluated with, if it belongs to one, then the overrides."""
    recipe_file = find_run_recipe(Path(checkpoint))
    options = _from_recipe(load_recipe(recipe_file)).decode if recipe_file else {}
    return {**options, **parse_options(overrides)}


def find_run_recipe(checkpoint: Path) -> Path | None:
    """The resolved recipe of the run that `checkpoint` is: the run folder, or a folder in its `checkpoints`."""
    run_dirs = [checkpoint]
    if checkpoint.parent.name == "checkpoints":
        run_dirs.append(checkpoint.parent.parent)
    found = [run_dir / "recipe.yaml" for run_dir in run_dirs if (run_dir / "recipe.yaml").is_file()]
    return found[0] if found else None


def read_prompts(texts: list[str], id_lists: list[str], file: Path | None, *, is_chat: bool) -> list[PromptWords]:
    """All prompts in the order texts, ids, file. Raises DareError for malformed ones, or if there are none."""
    prompts: list[PromptWords] = [_chat(text) if is_chat else text for text in texts]
    prompts += [_parse_ids(words) for words in id_lists]
    if file is not None:
        prompts += [prompt.words for prompt in read_prompt_file(file, is_chat=is_chat)]
    if not prompts:
        raise DareError("there is no prompt", fix='give --prompt TEXT, --prompt-ids "1,2,3" or --file prompts.jsonl')
    return prompts


def _from_recipe(recipe: Recipe) -> EvaluationSettings:
    return EvaluationSettings(
        task=recipe.task.model_dump() if recipe.task else {},
        decode={**recipe.decode.model_dump(), "temperature": recipe.evaluation.temperature},
        num=recipe.evaluation.num,
        seed=recipe.seed,
    )


def _chat(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def _parse_ids(words: str) -> list[int]:
    try:
        return [int(word) for word in words.replace(",", " ").split()]
    except ValueError:
        raise DareError("token ids are integers", where="--prompt-ids", got=words, expected='"1,2,3"') from None


def read_prompt_file(path: Path, *, is_chat: bool) -> list[FilePrompt]:
    """The prompts of a file of JSON lines, in order. Raises DareError naming the line that is malformed."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DareError("cannot read the prompts", where=str(path), got=str(error)) from None
    places = [(f"{path}:{index}", line) for index, line in enumerate(lines, start=1) if line.strip()]
    return [FilePrompt(where, _read_line(line, where=where, is_chat=is_chat)) for where, line in places]


def _read_line(line: str, *, where: str, is_chat: bool) -> PromptWords:
    expected = '{"prompt": TEXT or MESSAGES}, or {"prompt_ids": [1, 2, 3]}'
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DareError("the line is not valid JSON", where=where, got=str(error), expected=expected) from None
    prompt = record.get("prompt") if isinstance(record, dict) else None
    ids = record.get("prompt_ids") if isinstance(record, dict) else None
    if isinstance(prompt, str):
        return _chat(prompt) if is_chat else prompt
    if isinstance(prompt, list) and prompt and all(_is_message(item) for item in prompt):
        return prompt
    if isinstance(ids, list) and all(type(item) is int for item in ids):
        return ids
    raise DareError("the line holds no prompt", where=where, got=line[:80], expected=expected)


def _is_message(item: object) -> bool:
    return isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
