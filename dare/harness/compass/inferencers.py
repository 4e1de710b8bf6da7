"""How OpenCompass's data sets are put to a diffusion model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opencompass.openicl.icl_inferencer import GenInferencer
from opencompass.openicl.icl_inferencer.icl_base_inferencer import PPLInferencerOutputHandler
from opencompass.openicl.icl_inferencer.icl_ppl_inferencer import PPLInferencer
from opencompass.registry import ICL_INFERENCERS

from dare.harness.compass.model import DareModel


@ICL_INFERENCERS.register_module()
class ConditionalLikelihoodInferencer(PPLInferencer):  # type: ignore[misc]
    """The label whose words are most probable given the question; takes the place of PPLInferencer and LLInferencer.

    What is scored given what:
      rows with the columns contexts and continuations   as they say
      rows with a column cont (LLInferencer)             the end of the label's prompt that it names, given the rest
      all others (PPLInferencer)                         what follows the words that all labels' prompts begin with

    Predictions also hold `logps`, nats, in the order of the labels; OpenCompass's PPL is their negative.
    """

    model: DareModel

    def inference(
        self,
        retriever: Any,
        ice_template: Any = None,
        prompt_template: Any = None,
        output_json_filepath: str | None = None,
        output_json_filename: str | None = None,
        normalizing_str: str | None = None,
    ) -> list[Any]:
        """The predicted label of every row, also written to OpenCompass's file of predictions."""
        handler = PPLInferencerOutputHandler()
        labels = self.labels
        rows = retriever.test_ds
        if "continuations" in rows.column_names:
            documents = [list(zip(row["contexts"], row["continuations"], strict=True)) for row in rows]
            names: list[list[Any]] = [list(range(len(document))) for document in documents]
        else:
            if labels is None:
                labels = retriever.get_labels(ice_template=ice_template, prompt_template=prompt_template)
            examples = [retriever.generate_ice(found, ice_template=ice_template) for found in retriever.retrieve()]
            handler.save_ice(self.model.parse_template(examples, mode="ppl"))
            ends = rows["cont"] if "cont" in rows.column_names else [None] * len(rows)
            documents = []
            for index, (example, end) in enumerate(zip(examples, ends, strict=True)):
                prompts = [
                    retriever.generate_label_prompt(
                        index, example, label, ice_template=ice_template, prompt_template=prompt_template
                    )
                    for label in labels
                ]
                texts = [str(text) for text in self.model.parse_template(prompts, mode="ppl")]
                documents.append(split_texts(texts) if end is None else [(t.removesuffix(end), end) for t in texts])
            names = [labels] * len(documents)
        predictions = []
        for index, (document, choices, logps) in enumerate(
            zip(documents, names, self.model.score_choices(documents), strict=True)
        ):
            for label, (context, continuation), logp in zip(choices, document, logps, strict=True):
                handler.save_prompt_and_ppl(label, continuation, context + continuation, -logp, index)
            handler.results_dict[str(index)]["logps"] = logps
            predictions.append(choices[logps.index(max(logps))])
        handler.save_predictions(predictions)
        if retriever.dataset_reader.output_column:
            handler.save_golds(rows[retriever.dataset_reader.output_column])
        folder = Path(output_json_filepath or self.output_json_filepath)
        folder.mkdir(parents=True, exist_ok=True)
        handler.write_to_json(str(folder), output_json_filename or self.output_json_filename)
        return predictions


@ICL_INFERENCERS.register_module()
class BenchmarkInferencer(GenInferencer):  # type: ignore[misc]
    """Prompts as the column `prompt` has them, a JSON string or JSON messages, past OpenCompass's templates.

    Those would replace every "{idx}" in a prompt by the row's number, in programs too.
    """

    def get_generation_prompt_list_from_retriever_indices(
        self,
        ice_idx_list: list[list[int]],
        retriever: Any,
        gen_field_replace_token: str,
        max_seq_len: int | None = None,
        ice_template: Any = None,
        prompt_template: Any = None,
    ) -> list[Any]:
        return [json.loads(prompt) for prompt in retriever.test_ds["prompt"]]


def split_texts(texts: Sequence[str]) -> list[tuple[str, str]]:
    """What a question's label prompts have in common as the context, up to a border of words, and the rest of each.

    The space before a word belongs to the continuation. A prompt that ends where another goes on keeps its last word.
    """
    size = 0
    while size < min(map(len, texts)) - 1 and len({text[size] for text in texts}) == 1:
        size += 1
    while size > 0 and not texts[0][size - 1].isspace():
        size -= 1
    while size > 0 and texts[0][size - 1].isspace():
        size -= 1
    return [(text[:size], text[size:]) for text in texts]
