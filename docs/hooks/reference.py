"""Pages of the documentation that are read off the code: commands, recipe keys, shipped recipes, papers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import typer

from dare.cli import app
from dare.core.registry import ALGORITHMS, TABLES, resolve
from dare.terminal.listing import headline, recipe_files
from dare.terminal.schema import Key, plugin_keys, recipe_keys


def cli_page() -> str:
    """Every command with what its --help says."""
    root = typer.main.get_command(app)
    parts = ["# Commands", "What `--help` says, command by command. A mistake ends with exit code 2 and one message."]
    for name, command in _leaves(root, "dare"):
        context = typer.Context(command, info_name=name)
        usage = " ".join([name, *command.collect_usage_pieces(context)])
        text, _, examples = (command.help or "").partition("\b\n")
        parts += [f"## {name}", f"```\n{usage}\n```", *_paragraphs(text)]
        code = [line.strip() for line in examples.splitlines()[1:] if line.strip()]
        parts += ["```bash\n" + "\n".join(code) + "\n```"] if code else []
        records = [item.get_help_record(context) for item in command.params]
        rows = [(f"`{record[0]}`", record[1]) for record in records if record is not None]
        parts += [_table(("parameter", "meaning"), rows)] if rows else []
    return "\n\n".join(parts) + "\n"


def recipe_page() -> str:
    """Every key of a recipe by section, then the options of every algorithm, task and executor."""
    parts = [
        "# Recipe keys",
        "A recipe is one YAML file; `dare show RECIPE` fills in every default, `dare check RECIPE` finds mistakes, and "
        "`base: FILE` starts from another recipe. Dotted overrides on the command line win: `train.steps=500`.",
    ]
    for section, keys in groupby(recipe_keys(), key=_section):
        parts += [f"## {section}", _key_table(list(keys))]
    for table, key in (("algorithms", "algorithm"), ("tasks", "task"), ("executors", "executor")):
        for name, row in TABLES[table].items():
            parts += [f"## {key}: {name}", f"{row.summary[0].upper()}{row.summary[1:]}."]
            options = plugin_keys(table, name)
            parts.append(_key_table(options) if options else "No options.")
    return "\n\n".join(parts) + "\n"


def recipes_page() -> str:
    """The shipped recipes with their texts."""
    parts = [
        "# Shipped recipes",
        "Each is small enough for a CPU and names what to change for a published checkpoint. Run one with "
        "`dare train recipes/tiny/NAME.yaml --out runs/NAME`; those that continue another name it in `model.path`.",
    ]
    for path in recipe_files():
        title = f"recipes/{path.parent.name}/{path.name}"
        text = path.read_text(encoding="utf-8")
        parts += [f"## {path.stem}", headline(path), f'```yaml title="{title}"\n{text}```']
    return "\n\n".join(parts) + "\n"


def papers_page(algorithms: str) -> str:
    """Which paper is where, from the table of docs/algorithms.md."""
    rows = []
    for name, row in ALGORITHMS.items():
        line = algorithms.partition(f"| `{name}` | ")[2]  # of its first row: later tables are about variants
        rows.append((f"`{name}`", line.partition(" |")[0], row.summary, _kinds(name)))
    table = _table(("algorithm", "paper", "what it is", "models"), rows).replace("](", "](../")
    return f"# Paper index\n\nFormulas, and where we differ: [algorithms](../algorithms.md).\n\n{table}\n"


def _kinds(name: str) -> str:
    forbidden = resolve("algorithms", name).forbidden
    kinds = {"full": "masked", "block_causal": "block"}
    return ", ".join(word for kind, word in kinds.items() if kind not in forbidden)


def _leaves(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
    for word, child in (children or {}).items():
        yield from _leaves(child, f"{name} {word}")


def _section(key: Key) -> str:
    section, dot, _ = key.name.partition(".")
    return section if dot else "top level"


def _key_table(keys: Sequence[Key]) -> str:
    rows = [(f"`{key.name}`", f"`{key.type}`", f"`{key.default}`", key.description) for key in keys]
    return _table(("key", "type", "default", "meaning"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    """A bar would end the cell, but for one in a code span, where a backslash would show."""
    return text if text.startswith("`") else text.replace("|", "\\|")


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]
