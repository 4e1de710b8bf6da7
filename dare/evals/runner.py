"""Evaluation by generation: the same decode settings and scorer as training, so the two cannot drift apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dare.core.decode import Decode
from dare.core.rng import Key, stable_id
from dare.core.text import Completion, Prompt, Reward
from dare.core.types import TraceBatch
from dare.diffusion.trace import scored_mask, to_completions
from dare.evals.intervals import wilson
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_prompt, token_piece
from dare.rollout.stats import rollout_stats
from dare.tasks.base import Task

Generate = Callable[[list[list[int]], Decode, Key, list[int]], TraceBatch]


@dataclass(frozen=True)
class Scored:
    """One prompt, what was generated for it, and its reward."""

    prompt: Prompt
    completion: Completion
    text: str
    reward: Reward
    blocks: list[int]  # of each token of the completion


def score_trace(task: Task[Any], prompts: list[Prompt], trace: TraceBatch, tokenizer: Any) -> list[Scored]:
    """Decode and reward every row of a rollout; `prompts` has one entry per row."""
    scored = []
    is_scored_BS = scored_mask(trace)
    for row, (prompt, completion) in enumerate(zip(prompts, to_completions(trace), strict=True)):
        text = decode_text(tokenizer, completion.tokens)
        blocks = trace.canvas.block_BS[row][is_scored_BS[row]].tolist()
        scored.append(Scored(prompt, completion, text, task.judge(prompt, text), blocks))
    return scored


def evaluate_task(
    generate: Generate,
    tokenizer: Any,
    task: Task[Any],
    *,
    name: str,
    decode: Decode,
    num: int,
    key: Key,
    split: str = "eval",
    num_records: int | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Solve the first `num` problems of a split once each.

    Returns a summary (counts, empty answers, solve rate with its 95 % Wilson interval, mean reward and its parts, NFE,
    tokens per forward, EOS and truncation rates, decode settings) and a record per problem (the first `num_records`).
    Solve rate and reward are kept apart: partial credit never counts as solved.
    """
    prompts = [task.prompt(split, index) for index in range(min(num, task.size(split)))]
    ids = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    trace = generate(ids, decode, key, [stable_id(prompt.uid) for prompt in prompts])
    scored = score_trace(task, prompts, trace, tokenizer)
    num_solved = sum(item.reward.is_solved for item in scored)
    low, high = wilson(num_solved, len(scored))
    parts = sorted({part for item in scored for part in item.reward.parts})
    summary: dict[str, Any] = {
        "task": name,
        "split": split,
        "num": len(scored),
        "num_solved": num_solved,
        "solve_rate": num_solved / len(scored),
        "low": low,
        "high": high,
        "num_empty": sum(not item.text.strip() for item in scored),
        "reward_mean": sum(item.reward.value for item in scored) / len(scored),
        **{f"reward/{part}": sum(i.reward.parts.get(part, 0.0) for i in scored) / len(scored) for part in parts},
        **rollout_stats(trace),
        "decode": decode.model_dump(mode="json"),
    }
    return summary, [as_record(item, tokenizer) for item in scored[:num_records]]


def as_record(item: Scored, tokenizer: Any) -> dict[str, Any]:
    """A completion as plain data, with the denoising step of every token."""
    completion = item.completion
    text = item.prompt.text
    if text is None:
        text = "\n".join(f"{message['role']}: {message['content']}" for message in item.prompt.messages or ())
    return {
        "uid": item.prompt.uid,
        "prompt": text,
        "completion": item.text,
        "reward": item.reward.value,
        "parts": dict(item.reward.parts),
        "is_solved": item.reward.is_solved,
        "finish": completion.finish,
        "nfe": completion.nfe,
        "tokens": [token_piece(tokenizer, token) for token in completion.tokens],
        "step_map": completion.step_map,
        "block": item.blocks,
        "logp": [round(value, 4) for value in completion.logp],
    }
