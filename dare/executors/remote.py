"""The local executor with rollouts on servers: updates happen here, completions come from there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self

from dare.algorithms.base import Algorithm
from dare.core.decode import Decode
from dare.core.engine import Progress
from dare.core.errors import DareError
from dare.core.recipe import Recipe
from dare.core.rng import Key
from dare.core.types import TraceBatch
from dare.executors.local import LocalEngine
from dare.families.base import Family
from dare.families.network import Network
from dare.remote import probe
from dare.remote.contract import Ask
from dare.remote.fleet import Fleet, Version
from dare.remote.trace import Layout
from dare.remote.weights import WeightFolders
from dare.rollout.engine import denoise
from dare.rollout.plan import check_prompts, make_plan

_PROBE_KEY = Key(0).fold("probe")


class RemoteEngine(LocalEngine):
    """`publish` counts versions; the next `generate` hands the weights to the servers before it asks them for rows."""

    def __init__(
        self,
        recipe: Recipe,
        family: Family,
        *,
        num_updates: int,
        needs_reference: bool,
        critic_lr: float | None = None,
        prepare: Callable[[Network], object] | None = None,
    ) -> None:
        super().__init__(
            recipe,
            family,
            num_updates=num_updates,
            needs_reference=needs_reference,
            critic_lr=critic_lr,
            prepare=prepare,
        )
        if family.spec.attention != "block_causal":
            raise DareError(
                "rollout servers run block models",
                where="rollout.engine",
                got=f"family {family.spec.name}, full attention",
                fix="use rollout.engine: dare, or a model such as SDAR or LLaDA2",
            )
        self.options, self.decode = recipe.rollout, recipe.decode
        self.name = recipe.algorithm.name
        self.is_corrected = recipe.train.correction != "none"
        self.algorithm: Algorithm[Any] = recipe.algorithm.build()
        self.fleet = Fleet(recipe.rollout)
        self.folders = WeightFolders(recipe.rollout.weights_dir)
        self.where = ", ".join(recipe.rollout.urls)
        self.version: Version | None = None  # what servers are given: the weights at version `given`
        self.given = -1
        self.max_length = family.spec.max_length
        self.reading: probe.Reading | None = None

    @classmethod
    def create(cls, recipe: Recipe, tokenizer: Any, *, needs_reference: bool, critic_lr: float | None = None) -> Self:
        """As `LocalEngine.create`; the servers get the weights and answer a probe.

        Raises DareError if a server does not answer, runs another model or does not sample, or if it does not return
        what the algorithm needs.
        """
        early = Fleet(recipe.rollout)
        early.facts()  # before a large model is loaded in vain
        early.close()
        engine = super().create(recipe, tokenizer, needs_reference=needs_reference, critic_lr=critic_lr)
        engine.start()
        return engine

    def start(self) -> None:
        """Find out what the servers are and what they return."""
        for url, facts in zip(self.options.urls, self.fleet.facts(), strict=True):
            ours = self.family.config.get("model_type")
            if facts.model_type is not None and facts.model_type != ours:
                raise DareError(
                    "the rollout server runs another kind of model",
                    where=url,
                    got=f"{facts.model_type}, {facts.model}",
                    expected=f"{ours}, as in model",
                    fix="start it with the checkpoint in model.path",
                )
            self.max_length = min(self.max_length, facts.max_length or self.max_length)
        self._verify()
        trace = self._probe(self.decode.temperature)
        self._require(trace)
        if trace.temperature:
            self._check_temperature(trace)

    def generate(
        self,
        prompts: list[list[int]],
        decode: Decode,
        key: Key,
        sample_ids: list[int],
        on_progress: Progress | None = None,
        *,
        has_drafts: bool = False,
        branching: tuple[int, ...] = (),
        num_alternatives: int = 0,
    ) -> TraceBatch:
        if has_drafts or branching or num_alternatives:
            raise ValueError("recipes that need drafts, trees or predictions are refused before an engine is made")
        if self.given != self.weights_version and not self.fleet.confirms_versions:
            self._verify()
        trace = self._rows(prompts, decode, key, sample_ids, on_progress)
        if trace.temperature and probe.has_collapsed(trace, prompts):
            self._check_temperature(self._probe(trace.temperature))
        if self.options.commit_logp == "scored" and "steps" not in trace.missing:
            return probe.with_scored_logp(trace, self.score)
        return trace

    def close(self) -> None:
        """End all connections; a temporary folder of weights is gone."""
        self.fleet.close()
        self.folders.close()

    def _rows(
        self, prompts: list[list[int]], decode: Decode, key: Key, sample_ids: list[int], on_progress: Progress | None
    ) -> TraceBatch:
        """The rollout as the servers return it, with the current weights."""
        if not prompts:
            raise DareError("there is no prompt to complete", got="an empty list")
        plan = make_plan(self.family, decode)
        check_prompts(self.family, prompts)
        layout = Layout(self.family, plan, prompts)
        asks = [
            Ask(
                row=row,
                prompt=prompt,
                num_tokens=layout.num_tokens(row),
                key=key,
                sample_id=sample_id,
                temperature=decode.temperature,
                top_k=decode.top_k,
                top_p=decode.top_p,
                is_eos_ignored=self.options.is_eos_ignored,
            )
            for row, (prompt, sample_id) in enumerate(zip(prompts, sample_ids, strict=True))
        ]
        self._check_lengths(asks)
        settled, total = [0], sum(ask.num_tokens for ask in asks)

        def advance(row: int) -> None:
            settled[0] += asks[row].num_tokens
            if on_progress is not None:
                on_progress(settled[0], total)

        check = partial(layout.checked, numbering=self.fleet.contract.numbering, options=self.options)
        rows = self.fleet.generate(asks, self._give(), check, advance)
        return layout.trace(rows, sample_ids, self.weights_version)

    def _give(self) -> Version:
        """The current weights where servers find them; earlier versions are removed."""
        if self.version is None or self.given != self.weights_version:
            folder, label = self.folders.write(self.family, self.weights_version)
            self.version, self.given = Version(folder, label), self.weights_version
            self.folders.keep(folder)
        return self.version

    def _check_lengths(self, asks: list[Ask]) -> None:
        for ask in asks:
            length = len(ask.prompt) + ask.num_tokens
            if length > self.max_length:
                raise DareError(
                    "a prompt and its completion are longer than the rollout servers allow",
                    where=f"row {ask.row}",
                    got=f"{len(ask.prompt)} + {ask.num_tokens} tokens",
                    expected=f"at most {self.max_length}",
                    fix="shorten the prompt or decode.gen_length, or start the servers with a longer context",
                )

    def _probe(self, temperature: float) -> TraceBatch:
        """A few short completions of one prompt."""
        prompts = probe.probe_prompts(self.spec)
        return self._rows(prompts, self._probe_decode(temperature), _PROBE_KEY, list(range(len(prompts))), None)

    def _verify(self) -> None:
        """Raise DareError if greedy completions show another model, or weights of before the last update."""
        before = None if self.fleet.confirms_versions else self.reading
        trace = self._probe(0.0)
        self.reading = probe.check_model(trace, self.score, self.options.max_gap, self.where, before)

    def _check_temperature(self, trace: TraceBatch) -> None:
        """Compare a probe whose rows are all equal with what the trainer's own engine makes of it."""
        if probe.num_distinct(trace) > 1:
            return
        prompts, decode = probe.probe_prompts(self.spec), self._probe_decode(trace.temperature)
        local = denoise(self.family, prompts, decode, _PROBE_KEY, list(range(len(prompts))))
        probe.check_temperature(trace, local, self.where)

    def _probe_decode(self, temperature: float) -> Decode:
        return probe.probe_decode(self.decode, make_plan(self.family, self.decode).block_length, temperature)

    def _require(self, trace: TraceBatch) -> None:
        """Raise DareError if the algorithm needs what the servers do not return."""
        reads_logp = self.algorithm.reads_recorded or self.is_corrected
        name = "train.correction" if self.is_corrected else self.name
        if "steps" in trace.missing and (self.algorithm.needs_step_map or reads_logp):
            raise DareError(
                f"{name} replays the rollout step by step, and the rollout server returns no step map",
                where=self.where,
                got="tokens" if "logp" in trace.missing else "tokens and log-probs",
                expected="the step of every token",
                fix="use a server that returns step maps, or an algorithm that needs none, such as espo",
            )
        if "logp" in trace.missing and reads_logp and self.options.commit_logp == "server":
            raise DareError(
                f"{name} reads the log-probs of the rollout, and the rollout server returns none",
                where=self.where,
                fix="set rollout.commit_logp: scored, or do without (old: scored, no rollout_cap, correction: none)",
            )
