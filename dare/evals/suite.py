"""Run one benchmark: every document answered and judged once, resumable, shardable, the same however it is cut up.

    OUT/TASK/settings.json           written first: a folder holds one run
    OUT/TASK/records-0of1.jsonl      one line per judged completion, appended chunk by chunk (one file per shard)
    OUT/TASK/records.jsonl           all of them in order       \\
    OUT/TASK/manifest.json           the result card             > only when every document is done
    OUT/TASK/card.md                 the same, to read          /

A folder without manifest.json is an unfinished run, whatever else it holds.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.files import JsonLines, read_json, read_lines, write_json, write_text
from dare.core.options import Options
from dare.core.rng import stable_id
from dare.core.text import Prompt
from dare.evals.backend import Backend, Continuation, Stream, continuations, hash_file, likelihood_stream
from dare.evals.benchmarks.base import Benchmark, Document, Method, Style
from dare.evals.card import card_text, make_manifest
from dare.evals.likelihood import Likelihood

_CHUNK = 64  # completions or documents between two writes; never changes a result
Record = dict[str, Any]


class Settings(Options):
    """How one benchmark is run. Everything here is in the result card; batch sizes change nothing."""

    method: Method = Field("generate", description="generate: judge completions; likelihood: the most probable choice")
    style: Literal["auto", "chat", "text"] = Field("auto", description="auto: chat if the model has a chat template")
    num_shots: int = Field(0, ge=0, description="solved examples before the question")
    num_samples: int = Field(1, ge=1, description="completions per document, for avg@k and pass@k")
    limit: int | None = Field(None, ge=1, description="only the first documents; default: all")
    seed: int = Field(0, ge=0, description="of sampling and of likelihood masks")
    decode: Decode = Decode()
    likelihood: Likelihood = Likelihood()


@dataclass(frozen=True)
class Shard:
    """Documents with index % count == number."""

    number: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From "0/4". Raises DareError for anything else."""
        number, separator, count = text.partition("/")
        if separator and number.isdigit() and count.isdigit() and int(number) < int(count):
            return cls(int(number), int(count))
        raise DareError(
            "a shard is NUMBER/COUNT with 0 <= NUMBER < COUNT", where="--shard", got=text, fix="--shard 0/4"
        )


@dataclass(frozen=True)
class _Work:
    benchmark: Benchmark
    backend: Backend
    settings: Settings
    style: Style
    documents: list[Document]
    prompts: list[Prompt]
    solved: str  # examples before a likelihood's context
    stream: Stream  # of completions


def run_benchmark(
    backend: Backend,
    benchmark: Benchmark,
    settings: Settings,
    out: Path,
    *,
    shard: Shard | None = None,
    facts: dict[str, Any] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any] | None:
    """Run a shard of a benchmark in OUT/TASK, going on where an earlier run stopped.

    Returns the manifest when all documents of all shards are done, None while other shards are missing.
    `facts` go into the manifest as they are (preset, published score). `on_progress`: (done, all) of this shard.
    Raises DareError for settings that do not fit, data that is not there, or a folder with another run.
    """
    shard = shard or Shard()
    work = _prepare(backend, benchmark, settings)
    folder = out / benchmark.name.replace(":", "_")
    identity = _identity(work)
    _claim(folder, {"identity": identity, "settings": _lasting(settings), "num_shards": shard.count})
    if (folder / "manifest.json").is_file():
        finished: dict[str, Any] = read_json(folder / "manifest.json", "the manifest")
        return finished
    _run_shard(work, folder, shard, on_progress)
    records = [record for i in range(shard.count) for record in read_lines(_part(folder, Shard(i, shard.count)))]
    if len(records) < len(work.documents) * _num_samples(settings):
        return None
    records.sort(key=lambda record: (record["index"], record["sample"]))
    write_text(folder / "records.jsonl", _lines(records))
    seconds = sum(read_json(path, "times")["seconds"] for path in folder.glob("times-*.json"))
    manifest = make_manifest(benchmark, backend, settings, identity, records, seconds, facts or {})
    write_text(folder / "card.md", card_text(manifest))
    write_json(folder / "manifest.json", manifest)  # last: it says that the run is whole
    for path in (*folder.glob("records-*.jsonl"), *folder.glob("times-*.json")):
        path.unlink(missing_ok=True)  # the last two shards may end at the same time
    return manifest


def _prepare(backend: Backend, benchmark: Benchmark, settings: Settings) -> _Work:
    if settings.method not in benchmark.methods:
        raise DareError(
            f"{benchmark.name} cannot be judged by {settings.method}",
            where="method",
            got=settings.method,
            expected=", ".join(benchmark.methods),
        )
    if settings.decode.temperature == 0.0 and settings.num_samples > 1:
        raise DareError(
            "greedy completions of a document are all equal, so more than one tells nothing",
            where="num_samples",
            got=settings.num_samples,
            fix="set temperature, for example to 0.7, or num_samples to 1",
        )
    documents = benchmark.documents()[: settings.limit]
    shots = benchmark.shots(settings.num_shots)
    style = _pick_style(backend, settings)
    prompts = [benchmark.prompt(document, shots, style) for document in documents]
    stream = Stream(settings.seed, ("evaluation", benchmark.name))
    return _Work(benchmark, backend, settings, style, documents, prompts, solved_examples(shots), stream)


def _pick_style(backend: Backend, settings: Settings) -> Style:
    if settings.method == "generate":
        return backend.default_style() if settings.style == "auto" else settings.style
    if settings.style == "chat":
        raise DareError(
            "likelihoods are those of plain text",
            where="task.style",
            got="chat",
            fix="set style to text, or leave it out",
        )
    return "text"


def solved_examples(shots: Sequence[Document]) -> str:
    """Examples before a likelihood's context, each with its right choice."""
    right = [shot.requests[shot.gold_choice] for shot in shots if shot.gold_choice is not None]
    return "".join(f"{context}{text}\n\n" for context, text in right)


def _identity(work: _Work) -> dict[str, Any]:
    """What makes two runs comparable: the task hash covers prompts, data and scoring, but no sampler."""
    path = work.benchmark.data_path()
    prompts = [prompt.text or [dict(message) for message in prompt.messages or ()] for prompt in work.prompts]
    asked: Any = prompts
    if work.settings.method == "likelihood":
        asked = [work.solved, *(document.requests for document in work.documents)]
    identity = {
        "task": work.benchmark.name,
        "version": work.benchmark.version,
        "method": work.settings.method,
        "style": work.style,
        "num_shots": work.settings.num_shots,
        "num_documents": len(work.documents),
        "prompts_sha256": _hash(asked),
        "golds_sha256": _hash([document.gold for document in work.documents]),
        "data_sha256": None if path is None else hash_file(path),
    }
    return {**identity, "task_hash": _hash(identity)[:16]}


def _claim(folder: Path, wanted: dict[str, Any]) -> None:
    """Make the folder this run's, or check that it is. Raises DareError naming what differs."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "settings.json"
    if not path.is_file():
        write_json(path, wanted)
        return
    found = read_json(path, "the settings of the run")
    differing = sorted(
        f"{section}.{name}" if isinstance(wanted[section], dict) else section
        for section in wanted
        for name in (wanted[section] if isinstance(wanted[section], dict) else ("",))
        if _at(found, section, name) != _at(json.loads(json.dumps(wanted)), section, name)
    )
    if differing:
        raise DareError(
            "the folder holds a run with other settings",
            where=str(folder),
            got=f"different {', '.join(differing)}",
            fix="choose another --out, or remove the folder",
        )


def _at(data: Any, section: str, name: str) -> Any:
    part = data.get(section)
    return part.get(name) if name and isinstance(part, dict) else part


def _run_shard(work: _Work, folder: Path, shard: Shard, on_progress: Callable[[int, int], None] | None) -> None:
    path = _part(folder, shard)
    done = {(record["index"], record["sample"]) for record in read_lines(path)}
    samples = range(_num_samples(work.settings))
    wanted = [(i, j) for i in range(len(work.documents)) if i % shard.count == shard.number for j in samples]
    missing = [item for item in wanted if item not in done]
    times = folder / f"times-{shard.number}of{shard.count}.json"
    seconds = read_json(times, "times")["seconds"] if times.is_file() else 0.0
    log = JsonLines(path)
    try:
        log.truncate(_whole_bytes(path))  # a line that was being written when an earlier run was killed
        for start in range(0, len(missing), _CHUNK):
            begin = time.perf_counter()
            chunk = missing[start : start + _CHUNK]
            judge = _judge_choices if work.settings.method == "likelihood" else _judge_completions
            for record in judge(work, chunk):
                log.write(record)
            log.size()  # synced
            seconds += time.perf_counter() - begin
            write_json(times, {"seconds": seconds})
            if on_progress is not None:
                on_progress(len(wanted) - len(missing) + start + len(chunk), len(wanted))
    finally:
        log.close()
        work.benchmark.close()


def _judge_completions(work: _Work, items: Sequence[tuple[int, int]]) -> list[Record]:
    documents = [work.documents[index] for index, _ in items]
    ids = [stable_id(document.uid, "sample", sample) for document, (_, sample) in zip(documents, items, strict=True)]
    prompts = [work.prompts[index] for index, _ in items]
    completions = work.backend.generate(prompts, work.settings.decode, work.stream, ids)
    texts = [work.benchmark.cut(completion.text or "", work.style) for completion in completions]
    outcomes = work.benchmark.score_all(documents, texts)
    records = []
    for (index, sample), document, completion, text, outcome in zip(
        items, documents, completions, texts, outcomes, strict=True
    ):
        records.append(
            {
                "index": index,
                "sample": sample,
                "uid": document.uid,
                "group": document.group,
                "gold": document.gold,
                "text": text,
                "scores": dict(outcome.scores),
                "extracted": dict(outcome.extracted),
                "problem": outcome.problem,
                "num_tokens": len(completion.tokens),
                "nfe": completion.nfe,
                "finish": completion.finish,
                "is_empty": not text.strip(),
            }
        )
    return records


def _judge_choices(work: _Work, items: Sequence[tuple[int, int]]) -> list[Record]:
    """The most probable choice: by log-likelihood (acc), and by log-likelihood per byte (acc_norm)."""
    asked: list[Continuation] = []
    for index, _ in items:
        document = work.documents[index]
        asked += continuations(document.requests, work.solved)
    stream = likelihood_stream(work.settings.seed)
    values = iter(work.backend.log_likelihoods(asked, work.settings.likelihood, stream))
    records = []
    for index, sample in items:
        document = work.documents[index]
        logps = [next(values) for _ in document.requests]
        norms = [logp / len(text.encode()) for logp, (_, text) in zip(logps, document.requests, strict=True)]
        picks = {"acc": logps.index(max(logps)), "acc_norm": norms.index(max(norms))}
        records.append(
            {
                "index": index,
                "sample": sample,
                "uid": document.uid,
                "group": document.group,
                "gold": document.gold,
                "logps": [round(logp, 5) for logp in logps],
                "picks": picks,
                "scores": {name: float(pick == document.gold_choice) for name, pick in picks.items()},
                "problem": None,
            }
        )
    return records


def _num_samples(settings: Settings) -> int:
    return settings.num_samples if settings.method == "generate" else 1


def _part(folder: Path, shard: Shard) -> Path:
    return folder / f"records-{shard.number}of{shard.count}.jsonl"


def _whole_bytes(path: Path) -> int:
    return path.read_bytes().rfind(b"\n") + 1


def _lines(records: list[Record]) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def _lasting(settings: Settings) -> dict[str, Any]:
    """Settings without those that change no result, so that a run may go on with another batch size."""
    data = settings.model_dump(mode="json")
    for section in ("decode", "likelihood"):
        data[section].pop("batch_size")
    return data


def _hash(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
