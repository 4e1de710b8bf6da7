"""The RL loop.

prompts -> generate G completions each -> rewards -> advantages
        -> the groups that are trained on
        -> views of mu inner iterations, drawn and scored before any step
        -> mu x (loss on log-probs, replayed backward, optimizer step) -> publish
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from dare.algorithms.base import Algorithm
from dare.core.decode import Decode
from dare.core.engine import Engine
from dare.core.recipe import Recipe
from dare.core.rng import Key, stable_id
from dare.core.text import Prompt
from dare.core.types import Drafts, Samples, TraceBatch
from dare.data.order import row_indices
from dare.diffusion.trace import draft_tokens, scored_mask
from dare.evals.runner import Scored, as_record, evaluate_task, score_trace
from dare.families.tokenizer import decode as decode_text
from dare.families.tokenizer import encode_prompt, token_piece
from dare.rewards.mix import RewardMix
from dare.rollout.stats import rollout_stats
from dare.rollout.trace_file import NUM_ALTERNATIVES, save_trace
from dare.tasks.base import Task
from dare.training.ahead import Rollouts
from dare.training.correction import corrected
from dare.training.groups import kept_groups, select_groups
from dare.training.session import Session
from dare.training.update import plan_iterations, update

Row = TypeVar("Row")


def run_online(session: Session, engine: Engine, algorithm: Algorithm[Any], task: Task[Any], tokenizer: Any) -> None:
    """Train on rewards from `session.first_step` to the end, evaluating, logging and saving on the way."""
    recipe, key = session.recipe, Key(session.recipe.seed)
    mix = reward_mix(recipe, task)
    rollouts = _rollouts(session, engine, algorithm, task, tokenizer, key)
    if session.first_step == 0 and recipe.evaluation.at_start:
        evaluate_held_out(session, engine, task, tokenizer, step=0)
    for step in session.steps():
        distinct = _prompts_of_step(recipe, task, step, key)
        prompts = _repeated(distinct, recipe.train.completions_per_prompt)
        with session.phase("rollout"):
            rollout = rollouts.take(step)
            trace = rollout.trace
        with session.phase("reward"):
            scored = score_trace(task, prompts, trace, tokenizer)
            if trace.drafts is not None:
                trace = replace(trace, drafts=judge_drafts(trace.drafts, trace, task, prompts, tokenizer, mix))
            everything = build_samples(algorithm, trace, scored, recipe.train.completions_per_prompt, mix)
            everything = replace(everything, progress=(step - 1) / recipe.train.steps)
            samples = trained_samples(recipe, everything, scored)
        with session.phase("update"):
            samples, weights = corrected(engine, samples, recipe.train.correction, recipe.train.correction_cap)
            num = recipe.train.updates_per_rollout if samples.canvas.batch_size else 0
            iterations = plan_iterations(engine, algorithm, samples, key.fold("views", step), num)
            updates = [update(engine, algorithm, samples, iteration) for iteration in iterations]
            engine.publish()
        metrics = {**rollout_metrics(trace, scored, everything), **_mean(updates), **weights}
        if recipe.train.overlap != "none":
            metrics["staleness"] = float(rollout.staleness)
        if not mix.is_plain:
            metrics["trained_reward"] = _mean_trained_reward(everything)
        if recipe.groups.is_filtering:
            metrics["kept_groups"] = len(set(samples.group_B.tolist())) / len(distinct)
        if updates and step == session.first_step + 1 and "mismatch_kl" not in metrics:
            session.reporter.message(
                f"warning: {recipe.algorithm.name} scores no canvas that the rollout saw, so the mismatch between "
                "trainer and rollout is not measured"
            )
        session.record_step(step, metrics, num_tokens=int(samples.is_scored_BS.sum()))
        if session.is_due(recipe.log.samples_every, step):
            _show_samples(session, step, scored, tokenizer)
        if session.is_due(recipe.evaluation.every, step):
            evaluate_held_out(session, engine, task, tokenizer, step)
        if session.is_due(recipe.checkpoint.every, step):
            session.save(step, engine, tokenizer)


def _rollouts(
    session: Session, engine: Engine, algorithm: Algorithm[Any], task: Task[Any], tokenizer: Any, key: Key
) -> Rollouts:
    """The run's rollouts, from where its checkpoint left them."""
    recipe = session.recipe
    num = recipe.train.completions_per_prompt

    def generate(step: int) -> TraceBatch:
        distinct = _prompts_of_step(recipe, task, step, key)
        sample_ids = [stable_id(prompt.uid, row) for row, prompt in enumerate(_repeated(distinct, num))]
        return engine.generate(
            _repeated([encode_prompt(tokenizer, prompt) for prompt in distinct], num),
            recipe.decode,
            key.fold("rollout", step),
            sample_ids,
            session.advance,
            has_drafts="drafts" in algorithm.needs,
            branching=algorithm.branching(num),
        )

    rollouts = Rollouts(generate, is_ahead=recipe.train.overlap == "one_step")
    if session.resumed_from is not None:
        rollouts.load(session.resumed_from)
    session.write_more = rollouts.save
    return rollouts


def build_samples(
    algorithm: Algorithm[Any], trace: TraceBatch, scored: list[Scored], completions_per_prompt: int, mix: RewardMix
) -> Samples:
    """Rollouts as training samples; rows are group-major."""
    parts = [
        mix.trained(item.reward, len(item.completion.tokens), is_finished=item.completion.finish == "eos")
        for item in scored
    ]
    reward_B = torch.tensor([mix.total(part) for part in parts], dtype=torch.float32)
    group_B = torch.arange(len(scored)) // completions_per_prompt
    if mix.recipe.combine == "decoupled":
        advantage_B = torch.zeros(len(scored))
        for name, weight in mix.weights.items():
            part_B = torch.tensor([part[name] for part in parts], dtype=torch.float32)
            advantage_B = advantage_B + weight * algorithm.advantages(part_B, group_B)
    else:
        advantage_B = algorithm.advantages(reward_B, group_B)
    return Samples(
        canvas=trace.canvas,
        is_scored_BS=scored_mask(trace),
        sample_id_B=trace.sample_id_B,
        advantage_B=advantage_B,
        group_B=group_B,
        mask_id=trace.mask_id,
        step_map_BS=None if "steps" in trace.missing else trace.step_map_BS,
        is_rewritten=trace.edits is not None or trace.decode.get("remask", "none") != "none",
        rollout_logp_BS=None if "logp" in trace.missing else trace.logp_BS,
        rollout_temperature=trace.temperature or 1.0,
        eos_ids=trace.eos_ids,
        reward_B=reward_B,
        drafts=trace.drafts,
        tree=trace.tree,
    )


def reward_mix(recipe: Recipe, task: Task[Any]) -> RewardMix:
    """The recipe's reward section. Raises DareError if a weight names a part that the task does not have."""
    mix = RewardMix(recipe.reward, recipe.decode.gen_length)
    prompt = task.prompt("train", 0)
    mix.check_names([task.reward(prompt, text) for text in ("", prompt.answer or "")])
    return mix


def trained_samples(recipe: Recipe, samples: Samples, scored: list[Scored]) -> Samples:
    """The samples of the groups that the recipe trains on, possibly none."""
    if not recipe.groups.is_filtering:
        return samples
    is_solved_B = torch.tensor([item.reward.is_solved for item in scored])
    groups = kept_groups(
        recipe.groups, samples.advantage_B, is_solved_B, samples.group_B, recipe.train.prompts_per_step
    )
    return select_groups(samples, groups)


def judge_drafts(
    drafts: Drafts, trace: TraceBatch, task: Task[Any], prompts: list[Prompt], tokenizer: Any, mix: RewardMix
) -> Drafts:
    """The drafts with the trained reward of each as a completion; equal drafts of a prompt are judged once."""
    known: dict[tuple[str, str, int, bool], float] = {}
    rewards, ends = [], [[token] for token in trace.eos_ids]
    for row, tokens in zip(drafts.sample_D.tolist(), draft_tokens(drafts, trace), strict=True):
        prompt, text, is_finished = prompts[row], decode_text(tokenizer, tokens), tokens[-1:] in ends
        draft = (prompt.uid, text, len(tokens), is_finished)
        if draft not in known:
            parts = mix.trained(task.judge(prompt, text), len(tokens), is_finished=is_finished)
            known[draft] = mix.total(parts)
        rewards.append(known[draft])
    return replace(drafts, reward_D=torch.tensor(rewards, dtype=torch.float32))


def rollout_metrics(trace: TraceBatch, scored: list[Scored], samples: Samples) -> dict[str, float]:
    """What a rollout looked like: rewards and their parts, solve rate, dead groups, lengths, EOS, NFE."""
    groups: dict[int, set[float]] = defaultdict(set)
    for group, item in zip(samples.group_B.tolist(), scored, strict=True):
        groups[group].add(item.reward.value)
    parts = sorted({part for item in scored for part in item.reward.parts})
    num = len(scored)
    return {
        "reward": sum(item.reward.value for item in scored) / num,
        "solve_rate": sum(item.reward.is_solved for item in scored) / num,
        **{f"reward/{part}": sum(item.reward.parts.get(part, 0.0) for item in scored) / num for part in parts},
        "zero_variance_groups": sum(len(values) == 1 for values in groups.values()) / len(groups),
        **rollout_stats(trace),
    }


def evaluate_held_out(session: Session, engine: Engine, task: Task[Any], tokenizer: Any, step: int) -> None:
    """Evaluate on held-out problems and log the result."""
    recipe = session.recipe
    session.enter("evaluate")
    decode = recipe.decode.model_copy(update={"temperature": recipe.evaluation.temperature})

    def generate(prompts: list[list[int]], decode: Decode, key: Key, sample_ids: list[int]) -> TraceBatch:
        return engine.generate(prompts, decode, key, sample_ids, session.advance)

    result, records = evaluate_task(
        generate,
        tokenizer,
        task,
        name=recipe.task.name if recipe.task else "",
        decode=decode,
        num=recipe.evaluation.num,
        key=Key(recipe.seed).fold("evaluation"),
        num_records=recipe.evaluation.num_records,
    )
    session.record_evaluation(step, result, [{"split": "eval", **record} for record in records])
    if recipe.log.traces:
        save_traces(session, engine, task, tokenizer, decode, step)


def save_traces(session: Session, engine: Engine, task: Task[Any], tokenizer: Any, decode: Decode, step: int) -> None:
    """Generate the first held-out completions again, the same ones, and keep what every denoising step thought."""
    num = min(session.recipe.log.traces, task.size("eval"))
    prompts = [task.prompt("eval", index) for index in range(num)]
    trace = engine.generate(
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        decode,
        Key(session.recipe.seed).fold("evaluation"),
        [stable_id(prompt.uid) for prompt in prompts],
        num_alternatives=NUM_ALTERNATIVES,
    )
    save_trace(
        session.run_dir / "traces" / f"step-{step:06d}.safetensors",
        trace,
        spec=engine.spec,
        decode=decode,
        piece=partial(token_piece, tokenizer),
        labels=[prompt.uid for prompt in prompts],
    )


def _prompts_of_step(recipe: Recipe, task: Task[Any], step: int, key: Key) -> list[Prompt]:
    """The prompts of a step, once each; a pure function of the step."""
    num = recipe.train.prompts_per_step * recipe.groups.oversample
    chosen = row_indices(task.size("train"), num, step - 1, key.fold("prompts"))
    return [task.prompt("train", index) for index in chosen]


def _repeated(rows: list[Row], num: int) -> list[Row]:
    """Each row `num` times in a row: group-major."""
    return [row for row in rows for _ in range(num)]


def _show_samples(session: Session, step: int, scored: list[Scored], tokenizer: Any) -> None:
    shown = scored[:: session.recipe.train.completions_per_prompt][:4]
    session.record_samples(step, [{"split": "train", **as_record(item, tokenizer)} for item in shown])
    session.reporter.samples(
        [(item.prompt.text or item.prompt.uid, item.text, dict(item.reward.parts)) for item in shown]
    )


def _mean_trained_reward(samples: Samples) -> float:
    return 0.0 if samples.reward_B is None else float(samples.reward_B.double().mean())


def _mean(rows: list[dict[str, float]]) -> dict[str, float]:
    """Means over inner iterations, each over those that have the metric; nothing if there were none."""
    names = {name: None for row in rows for name in row}  # in order
    found = {name: [row[name] for row in rows if name in row] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items()}
