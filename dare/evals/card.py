"""The result card of a benchmark: manifest.json for programs, card.md for people."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dare.evals.backend import Backend
from dare.evals.benchmarks.base import Benchmark
from dare.evals.benchmarks.programs import ProgramBenchmark
from dare.evals.intervals import mean_interval, pass_at_k

if TYPE_CHECKING:
    from dare.evals.suite import Settings

FORMAT = 1
_PACKAGES = ("dare-dllm", "torch", "transformers", "tokenizers", "datasets", "numpy", "math-verify", "reasoning-gym")
_NUM_PROBLEMS_SHOWN = 5
Record = dict[str, Any]


def make_manifest(
    benchmark: Benchmark,
    backend: Backend,
    settings: Settings,
    identity: dict[str, Any],
    records: list[Record],
    seconds: float,
    facts: dict[str, Any],
) -> dict[str, Any]:
    """Everything about a finished run, as plain data. `records` are all records, in order."""
    is_generated = settings.method == "generate"
    sandbox = benchmark.sandbox if isinstance(benchmark, ProgramBenchmark) else None
    return {
        "format": FORMAT,
        "identity": identity,
        "headline": (benchmark.metrics if is_generated else ("acc",))[0],
        "scores": summarize(records),
        "counts": _counts(records) if is_generated else {"problems": 0},
        "cost": _cost(records) if is_generated else {},
        "groups": _groups(records),
        "problems": [record["problem"] for record in records if record["problem"]][:_NUM_PROBLEMS_SHOWN],
        "settings": settings.model_dump(mode="json"),
        "model": backend.describe(),
        "data": {"name": benchmark.name, "origin": benchmark.origin.description},
        "sandbox_level": None if sandbox is None else sandbox.level,
        "facts": facts,
        "versions": {name: package_version(name) for name in _PACKAGES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}",
        "seconds": round(seconds, 3),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def document_means(records: Sequence[Record], metric: str) -> list[float]:
    """The mean of a metric over the samples of each document, in the order of the documents."""
    values: dict[int, list[float]] = {}
    for record in records:
        values.setdefault(record["index"], []).append(record["scores"][metric])
    return [sum(samples) / len(samples) for _, samples in sorted(values.items())]


def summarize(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Per metric: mean over documents with its 95 % interval, and pass@k where there are k > 1 samples of each."""
    num_samples = max(record["sample"] for record in records) + 1
    result = {}
    for metric in records[0]["scores"]:
        means = document_means(records, metric)
        low, high = mean_interval(means)
        result[metric] = {"mean": sum(means) / len(means), "low": low, "high": high}
        if num_samples > 1 and all(round(mean * num_samples, 6).is_integer() for mean in means):
            k = 2
            while k <= num_samples:
                solved = [pass_at_k(num_samples, round(mean * num_samples), k) for mean in means]
                result[metric][f"pass@{k}"] = sum(solved) / len(solved)
                k *= 2
    return result


def _counts(records: Sequence[Record]) -> dict[str, Any]:
    extractors = records[0]["extracted"]
    return {
        "documents": len({record["index"] for record in records}),
        "completions": len(records),
        "truncated": sum(record["finish"] == "length" for record in records),
        "empty": sum(record["is_empty"] for record in records),
        "not_extracted": {name: sum(record["extracted"][name] is None for record in records) for name in extractors},
        "problems": sum(record["problem"] is not None for record in records),
    }


def _cost(records: Sequence[Record]) -> dict[str, float]:
    num_tokens, nfe = sum(record["num_tokens"] for record in records), sum(record["nfe"] for record in records)
    return {
        "tokens": num_tokens / len(records),
        "nfe": nfe / len(records),
        "tokens_per_forward": num_tokens / nfe,
    }


def _groups(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    names = sorted({record["group"] for record in records if record["group"]})
    metric = next(iter(records[0]["scores"]))
    found = {}
    for name in names:
        means = document_means([record for record in records if record["group"] == name], metric)
        found[name] = {"documents": len(means), "mean": sum(means) / len(means)}
    return found


def package_version(package: str) -> str | None:
    """The installed version of a package; None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def card_text(manifest: dict[str, Any]) -> str:
    """The card as Markdown."""
    identity, counts, cost = manifest["identity"], manifest["counts"], manifest["cost"]
    lines = [f"# {identity['task']}", "", f"Task hash `{identity['task_hash']}`; {manifest['data']['origin']}.", ""]
    lines += ["| metric | score | 95 % interval | pass@k |", "|---|---|---|---|"]
    for metric, score in manifest["scores"].items():
        passes = ", ".join(f"{name} {percent(value)}" for name, value in score.items() if name.startswith("pass@"))
        name = f"**{metric}**" if metric == manifest["headline"] else metric
        lines.append(
            f"| {name} | {percent(score['mean'])} | {percent(score['low'])} to {percent(score['high'])} | {passes} |"
        )
    lines.append("")
    facts = manifest["facts"]
    if "published" in facts:
        lines += [f"Published: {facts['published']} ({facts['source']}). {facts.get('note', '')}".rstrip(), ""]
    if "published" in facts and "overridden" in facts:
        lines += [f"Not with the published settings: {', '.join(facts['overridden'])} overridden.", ""]
    if cost:
        missing = ", ".join(f"{name} {num}" for name, num in counts["not_extracted"].items())
        lines += [
            f"{counts['documents']} documents, {counts['completions']} completions: {counts['truncated']} truncated, "
            f"{counts['empty']} empty, without an answer: {missing}; {counts['problems']} could not be judged.",
            "",
            f"{cost['tokens']:.1f} tokens, {cost['nfe']:.1f} NFE, {cost['tokens_per_forward']:.2f} tokens per forward.",
            "",
        ]
    lines += [f"- problem: {problem}" for problem in manifest["problems"]]
    for section in ("model", "settings", "versions"):
        lines += ["", f"## {section}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {value} |" for name, value in flatten(manifest[section]).items()]
    level = manifest["sandbox_level"]
    lines += [
        "",
        f"{manifest['seconds']} s, finished {manifest['finished']}, Python {manifest['python']}, {manifest['machine']}",
    ]
    lines += [f"Sandbox level: {level}"] if level else []
    return "\n".join(lines) + "\n"


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, dict):
            found.update(flatten(value, f"{prefix}{name}."))
        else:
            found[prefix + name] = value
    return found


def percent(share: float) -> str:
    """A share as a percentage with one decimal."""
    return f"{100 * share:.1f}"
