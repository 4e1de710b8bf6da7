"""The explicit tables: every plug-in is one row here, or an import path "package.module:Name" in a recipe.

Rows are strings, so listing and checking never import a plug-in's dependencies.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from dare.core.errors import DareError, unknown_name


class Row(NamedTuple):
    target: str  # "module:Name"
    summary: str
    attention: str | None = None  # families: "full" (masked models) or "block_causal" (block models)


ALGORITHMS: dict[str, Row] = {
    "sft": Row("dare.algorithms.sft:SFT", "supervised fine-tuning, 1/t-weighted ELBO (LLaDA; BD3-LM on block models)"),
    "trace_sft": Row(
        "dare.algorithms.trace_sft:TraceSFT", "distillation of the model's own verified trajectories, steps merged"
    ),
    "vrpo": Row("dare.algorithms.vrpo:VRPO", "preference pairs: DPO on low-variance ELBOs (LLaDA 1.5)"),
    "dpo": Row("dare.algorithms.dpo:DPO", "preference pairs: DPO on one draw, two-stream on block models (LLaDA2.0)"),
    "ipo": Row("dare.algorithms.ipo:IPO", "preference pairs: squared distance of the ELBO score to its target"),
    "kto": Row("dare.algorithms.kto:KTO", "good and bad completions, not paired (ELBO-KTO)"),
    "dtrpo": Row("dare.algorithms.dtrpo:DTRPO", "preference pairs: DPO on trajectories, one re-masked state each"),
    "d1": Row("dare.algorithms.d1:D1", "diffu-GRPO: one-step mean-field token ratios with prompt noise"),
    "coupled_grpo": Row("dare.algorithms.coupled_grpo:CoupledGRPO", "token ratios from coupled views (DiffuCoder)"),
    "espo": Row("dare.algorithms.espo:ESPO", "sequence-level ratio of coupled ELBO estimates"),
    "cj_grpo": Row("dare.algorithms.cj_grpo:CJGRPO", "token ratios replayed along the denoising trace"),
    "tracerl": Row(
        "dare.algorithms.tracerl:TraceRL", "token ratios along the trace, steps shrunk, KL to the old policy"
    ),
    "agrpo": Row("dare.algorithms.agrpo:AGRPO", "token ratios on a weighted sample of the trace's steps"),
    "justgrpo": Row("dare.algorithms.justgrpo:JustGRPO", "exact likelihood of left-to-right rollouts"),
    "unigrpo": Row("dare.algorithms.unigrpo:UniGRPO", "token ratios on randomly masked completions (MMaDA)"),
    "wd1": Row("dare.algorithms.wd1:WD1", "advantage-weighted log-likelihood without ratios"),
    "spg": Row("dare.algorithms.spg:SPG", "lower bound of good, upper bound of bad samples"),
    "bgpo": Row("dare.algorithms.bgpo:BGPO", "ELBO ratio per Monte-Carlo draw, linear where the advantage is positive"),
    "ebpo": Row("dare.algorithms.ebpo:EBPO", "sequence ratio of block ELBOs (LLaDA2.1)"),
    "gdpo": Row("dare.algorithms.gdpo:GDPO", "sequence ratio of ELBOs by Gaussian quadrature"),
    "mdpo": Row("dare.algorithms.mdpo:MDPO", "rewards every step's draft and trains the steps that matter"),
    "dtreerpo": Row("dare.algorithms.dtreerpo:DTreeRPO", "branching rollouts, siblings compared, self-distillation"),
    "tracerl_value": Row("dare.algorithms.tracerl_value:TraceRLValue", "trace replay with a diffusion value model"),
}

FAMILIES: dict[str, Row] = {
    "llada": Row("dare.families.llada:LLADA", "LLaDA 8B Base, Instruct, 1.5: masked, full attention", "full"),
    "llada_moe": Row("dare.families.llada_moe:LLADA_MOE", "LLaDA-MoE 7B-A1B: masked, full attention, experts", "full"),
    "dream": Row("dare.families.dream:DREAM", "Dream 7B, DiffuCoder, Dream-Coder: masked, shifted", "full"),
    "sdar": Row("dare.families.sdar:SDAR", "SDAR 1.7B, 4B, 8B and TraDo: block diffusion", "block_causal"),
    "sdar_moe": Row("dare.families.sdar_moe:SDAR_MOE", "SDAR 30B-A3B: block diffusion, experts", "block_causal"),
    "llada2": Row(
        "dare.families.llada2:LLADA2", "LLaDA2.0 and 2.1, mini and flash: block diffusion, experts", "block_causal"
    ),
}

TASKS: dict[str, Row] = {
    "countdown": Row("dare.tasks.countdown:Countdown", "reach a target number from given numbers (reasoning-gym)"),
    "chain_sum": Row("dare.tasks.chain_sum:ChainSum", "sums and differences of several numbers (reasoning-gym)"),
    "mini_sudoku": Row("dare.tasks.mini_sudoku:MiniSudoku", "4x4 sudoku (reasoning-gym)"),
    "benchmark": Row(
        "dare.evals.benchmarks.task:BenchmarkTask", "a benchmark with its own data and scorer, such as gsm8k"
    ),
    "rows": Row("dare.tasks.rows:Rows", "problems from your own data, judged by an answer column or your own function"),
    "reasoning_gym": Row("dare.tasks.reasoning_gym:ReasoningGym", "any reasoning-gym dataset, its own question text"),
}

EXECUTORS: dict[str, Row] = {
    "local": Row("dare.executors.choices:Local", "one process, CPU or one GPU"),
    "verl": Row("dare.executors.choices:Verl", "verl's Ray workers, FSDP2-sharded weights; extra dare-dllm[verl]"),
}

TABLES: dict[str, dict[str, Row]] = {
    "algorithms": ALGORITHMS,
    "families": FAMILIES,
    "tasks": TASKS,
    "executors": EXECUTORS,
}


_SINGULAR = {"algorithms": "algorithm", "families": "family", "tasks": "task", "executors": "executor"}


def check_name(table: str, name: str, *, where: str | None = None) -> str:
    """The import target of a row or of a path "package.module:Name". Raises DareError for an unknown name."""
    rows = TABLES[table]
    if name in rows:
        return rows[name].target
    if ":" in name:
        return name
    raise unknown_name(_SINGULAR[table], name, rows, where=where)


def resolve(table: str, name: str, *, where: str | None = None) -> Any:
    """The object behind a table row or an import path.

    Raises DareError for an unknown name or a path that does not import.
    """
    target = check_name(table, name, where=where)
    module_name, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise DareError(
            f"cannot import '{target}'",
            where=where,
            got=f"{type(error).__name__}: {error}",
            fix="check the import path",
        ) from error
