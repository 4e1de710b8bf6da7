"""docs/presets.md, made from paper.yaml: python -m dare.evals.presets.page > docs/presets.md"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dare.evals.presets import published_models

_HEAD = """# Published scores

What `--preset paper` runs and holds its results against: every model as its authors ran it. The scores are theirs;
none was measured by us. This page is made from `dare/evals/presets/paper.yaml` by
`python -m dare.evals.presets.page`. The length is that of the completion in tokens, the block what is denoised
together.
"""


def page() -> str:
    """The page as Markdown: a section for each model, a row for each benchmark."""
    parts = [_HEAD]
    for name, model in published_models().items():
        parts.append(f"## {name}\n\nFamily `{model['family']}`, {model['style']} prompts. Source: {model['source']}.\n")
        rows = [_row(task, settings) for task, settings in model["tasks"].items()]
        parts.append("\n".join(["| benchmark | published | settings | note |", "|---|---|---|---|", *rows, ""]))
    return "\n".join(parts)


def _row(task: str, row: Mapping[str, Any]) -> str:
    decode = dict(row.get("decode", {}))
    words = []
    if row.get("method") == "likelihood":
        num = row["likelihood"]["num_samples"]
        words.append(f"likelihood, {num} draw{'s' if num > 1 else ''}")
    else:
        words.append(f"length {decode.pop('gen_length')}, block {decode.pop('block_length')}")
    if row.get("num_shots"):
        words.append(f"{row['num_shots']} shots")
    words += [f"`{key}={_word(value)}`" for key, value in decode.items()]
    return f"| {task} | {row['published']} | {', '.join(words)} | {row.get('note', '')} |"


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


if __name__ == "__main__":
    print(page(), end="")
