"""Configurations of OpenCompass: finding them, making them for a diffusion model, checking their data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import opencompass
from mmengine.config import Config, ConfigDict
from opencompass.openicl.icl_inferencer import GenInferencer
from opencompass.openicl.icl_prompt_template import PromptTemplate
from opencompass.openicl.icl_retriever import ZeroRetriever
from opencompass.utils.build import build_dataset_from_cfg
from opencompass.utils.datasets_info import DATASETS_MAPPING

from dare.core.errors import DareError, unknown_name
from dare.evals.benchmarks.base import Style
from dare.evals.suite import Settings
from dare.harness.compass.benchmarks import (
    BenchmarkDataset,
    BenchmarkEvaluator,
    ChoiceEvaluator,
    SandboxedHumanEval,
    SandboxedMBPP,
)
from dare.harness.compass.inferencers import BenchmarkInferencer, ConditionalLikelihoodInferencer

OURS = Path(__file__).parent / "configs"
_THEIRS = Path(opencompass.__file__).parent / "configs"
_SCORED = ("PPLInferencer", "LLInferencer")  # inferencers that do not say what is to be scored, or say it our way
_SANDBOXED = {"HumanEvalEvaluator": SandboxedHumanEval, "MBPPEvaluator": SandboxedMBPP}
_RUNS_PROGRAMS = ("HumanEval", "Humaneval", "MBPP", "LCB", "APPS", "TACO", "DS1000", "BigCodeBench", "MultiplE")


def find_datasets(name: str) -> list[ConfigDict]:
    """The data sets of a configuration of OpenCompass or of ours, by file name, or of a file ending in .py.

    Raises DareError for a name that neither has, and for a configuration without data sets.
    """
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise DareError("the configuration is not there", where=name)
    else:
        found = {file.stem: file for folder in (_THEIRS, OURS) for file in sorted(folder.glob("datasets/**/*.py"))}
        if name not in found:
            error = unknown_name("configuration", name, found, where="--tasks")
            error.details["expected"] = f"one of OpenCompass's {len(found)} configurations of data sets, or dare_NAME"
            raise error
        path = found[name]
    config = Config.fromfile(str(path))
    datasets = [dataset for key in config if key == "datasets" or key.endswith("_datasets") for dataset in config[key]]
    if not datasets:
        raise DareError("the configuration has no data sets", where=str(path), expected="a list NAME_datasets")
    return [ConfigDict(dataset) for dataset in datasets]


def conditional_likelihood(datasets: Sequence[Any]) -> list[ConfigDict]:
    """The same data sets with the likelihood of the label's words given the question, see
    `ConditionalLikelihoodInferencer`, instead of the perplexity of the whole text."""
    changed = [ConfigDict(dataset) for dataset in datasets]
    for dataset in changed:
        if class_name(dataset["infer_cfg"]["inferencer"]["type"]) in _SCORED:
            dataset["infer_cfg"]["inferencer"]["type"] = ConditionalLikelihoodInferencer
    return changed


def sandboxed(datasets: Sequence[Any], *, is_weak_allowed: bool = False) -> list[ConfigDict]:
    """The same data sets with our sandbox where OpenCompass runs programs with the user's rights.

    Raises DareError for an evaluator of programs that has no drop-in.
    """
    changed = [ConfigDict(dataset) for dataset in datasets]
    for dataset in changed:
        evaluator = dataset["eval_cfg"]["evaluator"]
        name = class_name(evaluator["type"])
        if name in _SANDBOXED and evaluator.get("metric", "MBPP") == "MBPP":
            evaluator["type"] = _SANDBOXED[name]
            evaluator["is_weak_sandbox_allowed"] = is_weak_allowed
        elif name not in ("BenchmarkEvaluator", "SandboxedHumanEval", "SandboxedMBPP") and any(
            word in name for word in _RUNS_PROGRAMS
        ):
            raise DareError(
                "OpenCompass would run the model's programs without isolation",
                where=f"{dataset.get('abbr')}: {name}",
                fix="use dare_humaneval, dare_mbpp or a configuration with HumanEvalEvaluator or MBPPEvaluator",
            )
    return changed


def benchmark_datasets(
    name: str, settings: Settings, style: Style, *, is_weak_sandbox_allowed: bool = False
) -> list[ConfigDict]:
    """A benchmark of ours as a data set: documents, prompts, shots and scores of the native evaluation."""
    is_choice = settings.method == "likelihood"
    evaluator: dict[str, Any] = {"type": ChoiceEvaluator}
    if not is_choice:
        evaluator = {
            "type": BenchmarkEvaluator,
            "benchmark": name,
            "limit": settings.limit,
            "is_weak_sandbox_allowed": is_weak_sandbox_allowed,
        }
    return [
        ConfigDict(
            abbr=f"dare_{name}".replace(":", "_"),
            type=BenchmarkDataset,
            benchmark=name,
            style=style,
            num_shots=settings.num_shots,
            limit=settings.limit,
            method=settings.method,
            reader_cfg={"input_columns": ["prompt"], "output_column": "gold"},
            infer_cfg={
                # OpenCompass wants a template; ours are past it.
                "prompt_template": {"type": PromptTemplate, "template": "{prompt}"},
                "retriever": {"type": ZeroRetriever},
                "inferencer": {"type": ConditionalLikelihoodInferencer if is_choice else BenchmarkInferencer},
            },
            eval_cfg={"evaluator": evaluator},
        )
    ]


def check_data(dataset: ConfigDict) -> None:
    """Load a data set once. Raises DareError if its files are missing, instead of OpenCompass's download."""
    path = str(dataset.get("path") or "")
    local = str((DATASETS_MAPPING.get(path) or {}).get("local") or path)
    cache = os.environ.get("COMPASS_DATA_CACHE") or ""
    places = [Path(cache) / local, Path.home() / ".cache" / "opencompass" / local]
    if (path in DATASETS_MAPPING or Path(path).is_absolute()) and not any(place.exists() for place in places):
        raise DareError(
            f"the data of {dataset.get('abbr')} is not here",
            where=str(places[0] if cache else places[1]),
            expected=local,
            fix="put OpenCompass's data folder there, or set COMPASS_DATA_CACHE to the folder that holds it",
        )
    try:
        build_dataset_from_cfg(dataset)
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, AssertionError, ImportError) as error:
        raise DareError(
            f"OpenCompass cannot load {dataset.get('abbr')}", where=local, got=f"{type(error).__name__}: {error}"
        ) from error


def limit_rows(dataset: ConfigDict, limit: int | None) -> None:
    """Only the first rows of a data set that is not ours."""
    if limit is not None:
        dataset["reader_cfg"]["test_range"] = f"[0:{limit}]"


def is_generated(dataset: ConfigDict) -> bool:
    """Whether its inferencer asks for completions."""
    kind = dataset["infer_cfg"]["inferencer"]["type"]
    return class_name(kind) in (GenInferencer.__name__, BenchmarkInferencer.__name__)


def class_name(kind: Any) -> str:
    """The name of a class that a configuration gives as itself or by its dotted name."""
    return str(kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
