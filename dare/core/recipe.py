"""A recipe: one YAML file that reproduces a run. Schema, loading, overrides, checks. No torch.

    base: ../_base/tiny_llada.yaml      # at most one parent, deep-merged
    algorithm: {name: espo, num_mc: 2}
    train: {steps: 100}

Dotted overrides (`train.steps=50`) are applied last; the resolved recipe is written beside the run.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from dare.core.data_recipe import DataRecipe
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.lora_recipe import LoraRecipe
from dare.core.options import Options
from dare.core.recipe_errors import explain
from dare.core.reference_recipe import ReferenceRecipe
from dare.core.registry import resolve
from dare.core.reward_recipe import GroupRecipe, RewardRecipe
from dare.core.rollout_recipe import RolloutRecipe
from dare.core.validation_recipe import ValidationRecipe
from dare.core.yaml_text import load_yaml


class Plugin(BaseModel):
    """A row of a table by name, with the plug-in's own options beside the name."""

    model_config = ConfigDict(extra="allow", frozen=True)
    table: ClassVar[str]
    name: str

    @model_validator(mode="before")
    @classmethod
    def _resolve(cls, data: Any) -> Any:
        """Validate the options against the plug-in's Config and fill in its defaults."""
        if isinstance(data, str):
            data = {"name": data}
        if not isinstance(data, dict) or "name" not in data:
            raise ValueError("give a name and its options, for example {name: espo}")
        options = {key: value for key, value in data.items() if key != "name"}
        name = str(data["name"])
        config_type = resolve(cls.table, name).Config
        try:
            config = config_type.model_validate(options)
        except ValidationError as error:
            raise explain(error, config_type, where=f"options of {cls.table}: {name}") from None
        return {"name": name, **config.model_dump(mode="json")}

    def build(self, *args: Any) -> Any:
        """The plug-in, constructed with its options and `args`."""
        plugin = resolve(self.table, self.name)
        return plugin(plugin.Config.model_validate(self.model_extra or {}), *args)

    def with_options(self, options: Options) -> Self:
        """The same plug-in with other options."""
        return self.model_validate({"name": self.name, **options.model_dump(mode="json")})

    @property
    def type(self) -> Any:
        return resolve(self.table, self.name)


class AlgorithmChoice(Plugin):
    table: ClassVar[str] = "algorithms"


class TaskChoice(Plugin):
    table: ClassVar[str] = "tasks"


class ExecutorChoice(Plugin):
    table: ClassVar[str] = "executors"


class CreateRecipe(Options):
    """A small model from scratch, with official field names in its config.json."""

    family: str = Field(description="a row of the families table")
    hidden_size: int = Field(128, ge=2)
    num_layers: int = Field(4, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1, description="default: num_heads")
    mlp_size: int = Field(384, ge=1)
    max_length: int = Field(256, ge=1, description="positions the model can address, tokens")
    block_length: int | None = Field(None, ge=1, description="block models: the grid; default: the family's")
    tie_embeddings: bool = False


class ModelRecipe(Options):
    """Where the policy comes from: a checkpoint, or a new small model. Exactly one."""

    path: str | None = Field(None, description="checkpoint folder, run folder (its last checkpoint) or hub id")
    create: CreateRecipe | None = None
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="compute; optimizer and masters are float32")
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _one_source(self) -> ModelRecipe:
        if (self.path is None) == (self.create is None):
            raise ValueError("give exactly one of path (a checkpoint) and create (a new model)")
        return self


Correction = Literal["none", "geometric", "sequence"]


class TrainRecipe(Options):
    steps: int = Field(100, ge=1, description="rollouts (online) or optimizer steps (offline)")
    batch_size: int = Field(64, ge=1, description="offline: rows per optimizer step")
    prompts_per_step: int = Field(16, ge=1, description="online: prompts per rollout")
    completions_per_prompt: int = Field(8, ge=1, description="online: group size G")
    updates_per_rollout: int = Field(1, ge=1, description="online: optimizer steps per rollout (mu)")
    overlap: Literal["none", "one_step"] = Field(
        "none",
        description="online: one_step makes the next rollout before this step's update, with the weights before it, "
        "so that neither has to wait for the other",
    )
    correction: Correction = Field(
        "none",
        description="online: weigh rollouts by the probability of their commits now over that when they were made, of "
        "all tokens (sequence) or its geometric mean per token; costs a scoring pass over the rollout's states",
    )
    correction_cap: float = Field(2.0, ge=1.0, description="what weights of the correction are truncated to")
    micro_batch_views: int = Field(256, ge=1, description="views per forward and backward; never changes the result")
    micro_batch_tokens: int = Field(
        16384, ge=1, description="positions per forward and backward, padding included; never changes the result"
    )
    recompute: Literal["none", "selective", "full"] = Field(
        "none",
        description="what a backward computes again instead of keeping it: nothing; all but matrix products and "
        "attention; whole layers. Less memory, more time, the same result",
    )
    is_compiled: bool = Field(False, description="run the network through torch.compile; needs a compiler")
    pack_length: int | None = Field(
        None,
        ge=1,
        description="tokens per forward and backward, instead of micro_batch_views: views are laid end to end, each a "
        "document that sees itself only, and no padding is computed; never changes the result",
    )
    step_timeout_s: float | None = Field(
        3600.0,
        gt=0.0,
        description="seconds without a sign of life (a phase, a denoising step) after which a run counts as hung: it "
        "writes its stacks to hang.txt and ends; null: never",
    )


class OptimizerRecipe(Options):
    """AdamW with fp32 masters."""

    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.0, ge=0.0, le=1.0, description="where linear and cosine end, as a share of lr")
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0.0, description="on matrices only")
    max_grad_norm: float = Field(1.0, gt=0)
    moments: Literal["float32", "8bit"] = Field("float32", description="8bit: stored blockwise; needs bitsandbytes")


class EvaluationRecipe(Options):
    """Held-out evaluation with the recipe's decode settings, greedy unless `temperature` says otherwise."""

    every: int | None = Field(None, ge=1, description="steps between evaluations; null: only at start and end")
    num: int = Field(256, ge=1, description="held-out problems")
    at_start: bool = True
    temperature: float = Field(0.0, ge=0.0)
    num_records: int = Field(16, ge=0, description="completions kept per evaluation for the report")


class CheckpointRecipe(Options):
    every: int | None = Field(None, ge=1, description="steps between checkpoints; null: only at the end")
    keep_last: int = Field(2, ge=1)
    stop_within_s: float = Field(
        30.0, gt=0.0, description="seconds that a run has after SIGINT or SIGTERM to save the last whole step and end"
    )


class LogRecipe(Options):
    every: int = Field(1, ge=1, description="steps between lines on the console")
    samples_every: int | None = Field(20, ge=1, description="steps between logged completions; null: only at the end")
    traces: int = Field(0, ge=0, description="held-out completions per evaluation kept for `dare view`, in traces/")
    tensorboard: bool = Field(False, description="needs the extra dare-dllm[tensorboard]")
    peak_tflops: float | None = Field(
        None, gt=0.0, description="the device's peak in TFLOP/s, for the utilisation (MFU); default: known GPUs'"
    )
    wandb_project: str | None = Field(None, description="needs the extra dare-dllm[wandb]")


class Recipe(Options):
    """Everything that determines a run."""

    name: str = Field(min_length=1, description="shown in logs and reports")
    seed: int = Field(0, ge=0)
    executor: ExecutorChoice = Field(
        default_factory=lambda: ExecutorChoice(name="local"),
        description="where it runs: a name, or a name with options",
    )
    model: ModelRecipe
    lora: LoraRecipe | None = Field(
        None, description="train an adapter of the model in model.path; default: all weights"
    )
    algorithm: AlgorithmChoice
    task: TaskChoice | None = None
    data: DataRecipe | None = Field(None, description="offline rows; default: the task's problems and answers")
    reward: RewardRecipe = Field(RewardRecipe(), description="online: what completions are trained towards")
    groups: GroupRecipe = Field(GroupRecipe(), description="online: which groups of completions are trained on")
    decode: Decode = Decode()
    rollout: RolloutRecipe = Field(RolloutRecipe(), description="online: who denoises; default: this process")
    train: TrainRecipe = TrainRecipe()
    reference: ReferenceRecipe = ReferenceRecipe()
    optimizer: OptimizerRecipe = OptimizerRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    validation: ValidationRecipe | None = Field(None, description="offline: held-out loss; default: none")
    checkpoint: CheckpointRecipe = CheckpointRecipe()
    log: LogRecipe = LogRecipe()

    def dump_yaml(self) -> str:
        """The resolved recipe; loading it again gives an equal recipe."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def load_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read, merge with the parent, apply overrides and validate.

    Raises DareError naming the file and the key of every problem.
    """
    return parse_recipe(with_overrides(read_recipe(Path(path)), overrides), where=str(path))


def with_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """`data` itself, changed by dotted overrides. Raises DareError for one that cannot be read."""
    for override in overrides:
        _apply(data, override)
    return data


def read_recipe(path: Path) -> dict[str, Any]:
    """The plain data of a recipe file, merged with its parent, not yet validated. Raises DareError for a bad file."""
    data = _read(path)
    parent = data.pop("base", None)
    if parent is None:
        return data
    parent_path = path.parent / str(parent)
    base = _read(parent_path)
    if "base" in base:
        raise DareError("a base recipe cannot have a base itself", where=str(parent_path), fix="merge the two")
    return merge(base, data)


def parse_recipe(data: dict[str, Any], *, where: str) -> Recipe:
    """Validate plain data. Raises DareError listing every key that is wrong."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise explain(error, Recipe, where=where) from None
    except DareError as error:
        raise error.inside(where) from None
    return recipe


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise DareError(
            f"recipe not found: {path}", fix="give the path of a YAML file; `dare list recipes` shows the shipped ones"
        )
    try:
        data = load_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DareError("the recipe is not valid YAML", where=str(path), got=str(error)) from None
    if not isinstance(data, dict):
        raise DareError("a recipe is a mapping of keys", where=str(path), got=type(data).__name__)
    return data


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a plug-in with another name replaces its parent's options instead of mixing with them."""
    merged = dict(parent)
    for key, value in child.items():
        old = merged.get(key)
        is_other_plugin = (
            isinstance(value, dict) and isinstance(old, dict) and value.get("name") not in (None, old.get("name"))
        )
        if isinstance(value, dict) and isinstance(old, dict) and not is_other_plugin:
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def _apply(data: dict[str, Any], override: str) -> None:
    """One dotted override, `a.b.c=value` with a YAML value."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise DareError(f"cannot read the override '{override}'", expected="key=value, for example train.steps=50")
    try:
        value = load_yaml(text)
    except yaml.YAMLError as error:
        raise DareError(f"cannot read the value of the override '{override}'", got=str(error)) from None
    *parents, leaf = key.split(".")
    node = data
    for part in parents:
        child = node.get(part)
        if not isinstance(child, dict):
            child = {} if child is None else {"name": child}
            node[part] = child
        node = child
    node[leaf] = value
