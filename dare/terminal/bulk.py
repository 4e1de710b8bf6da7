"""`dare generate --file --out`: thousands of prompts, each result on disk once it exists, resumable at any point."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.files import JsonLines, write_text
from dare.core.rng import Key, stable_id
from dare.core.types import TraceBatch
from dare.diffusion.trace import to_completions
from dare.model import Model, sample_ids_of
from dare.rollout.engine import denoise
from dare.rollout.plan import check_prompts, make_plan
from dare.terminal.settings import FilePrompt

_POOL_BATCHES = 16  # prompts that are laid out together, in batches: bounds memory, and the share of half-empty batches


class BulkResult(NamedTuple):
    """How many completions the file holds, and how many of them were there before."""

    num_total: int
    num_kept: int


class _Job(NamedTuple):
    """A prompt, the id that names its random numbers, and one that names everything its completion depends on."""

    prompt: FilePrompt
    ids: list[int]
    sample_id: int
    digest: int


def generate_file(
    model: Model,
    prompts: Sequence[FilePrompt],
    out: Path,
    decode: Decode,
    *,
    seed: int,
    checkpoint: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> BulkResult:
    """Complete every prompt into the JSON lines `out`; what a run that was stopped or killed left there is kept.

    A line is {"index": place among the prompts, "id": ..., "prompt": ..., "text": ..., "tokens": ..., ...}. Lines
    appear as rows end and are put in the order of the prompts when all are there. Completions are those of
    `Model.generate` with all prompts in one call, however often the run was interrupted.

    checkpoint   the name of the weights, so that lines of other ones are not taken for these
    on_progress  called with (positions settled, all completion positions), those of kept lines included
    Raises DareError, before anything is computed, for a prompt that does not fit, naming its line, and for an output
    file that holds something else.
    """
    jobs = _jobs(model, prompts, decode, seed=seed, checkpoint=checkpoint)
    records = _read_back(out, jobs)
    num_kept = len(records)
    left = [index for index in range(len(jobs)) if index not in records]
    log = JsonLines(out)
    size = decode.batch_size * _POOL_BATCHES
    for start in range(0, len(left), size):
        pool = left[start : start + size]

        def write(rows: list[int], part: TraceBatch, pool: list[int] = pool) -> None:
            for row, completion in zip(rows, to_completions(part), strict=True):
                index = pool[row]
                job = jobs[index]
                content = dataclasses.asdict(model.with_text(completion))
                record = {"index": index, "id": f"{job.digest:016x}", "prompt": job.prompt.words, **content}
                log.write(record)
                records[index] = record

        def report(done: int, total: int, num_done: int = num_kept + start, num: int = len(pool)) -> None:
            if on_progress is not None:
                per_row = total / num
                on_progress(round(num_done * per_row) + done, round(len(jobs) * per_row))

        denoise(
            model.family,
            [jobs[index].ids for index in pool],
            decode,
            Key(seed).fold("generate"),
            [jobs[index].sample_id for index in pool],
            on_progress=report,
            on_finished=write,
        )
    log.close()
    lines = [json.dumps(records[index], ensure_ascii=False) + "\n" for index in range(len(jobs))]
    write_text(out, "".join(lines))
    return BulkResult(len(jobs), num_kept)


def _jobs(model: Model, prompts: Sequence[FilePrompt], decode: Decode, *, seed: int, checkpoint: str) -> list[_Job]:
    """All prompts encoded and checked."""
    plan = make_plan(model.family, decode)
    encoded = []
    for prompt in prompts:
        try:
            ids = model.encode(prompt.words)
            check_prompts(model.family, [ids])
            model.family.empty_canvas([ids], decode.gen_length, plan.block_length)
        except DareError as error:
            raise error.inside(prompt.where) from None
        encoded.append(ids)
    options = {key: value for key, value in sorted(decode.model_dump(mode="json").items()) if key != "batch_size"}
    settings = stable_id(checkpoint, seed, json.dumps(options))
    return [
        _Job(prompt, ids, sample_id, stable_id(settings, sample_id))
        for prompt, ids, sample_id in zip(prompts, encoded, sample_ids_of(encoded), strict=True)
    ]


def _read_back(out: Path, jobs: Sequence[_Job]) -> dict[int, dict[str, Any]]:
    """The lines that an earlier run left, by index; a line that it was writing when it died is cut off."""
    records: dict[int, dict[str, Any]] = {}
    if not out.exists():
        if not out.parent.is_dir():
            raise DareError("the folder of the output does not exist", where=str(out.parent), fix="create it")
        return records
    data = out.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        where = f"{out}:{number}"
        try:
            record = json.loads(line)
            index, digest = record["index"], record["id"]
            is_same = 0 <= index < len(jobs) and digest == f"{jobs[index].digest:016x}"
        except (ValueError, KeyError, TypeError, RecursionError):
            raise DareError(
                "the output file exists and holds something else", where=where, fix="choose another --out"
            ) from None
        if not is_same or index in records:
            raise DareError(
                "the output file belongs to other prompts, options, weights or another seed",
                where=where,
                fix="give the same ones to continue it, or choose another --out",
            )
        records[index] = record
    if len(whole) < len(data):
        os.truncate(out, len(whole))
    return records
