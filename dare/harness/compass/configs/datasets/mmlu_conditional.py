"""mmlu_ppl_ac766d of OpenCompass, by the likelihood of the answer given the question."""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.mmlu.mmlu_ppl_ac766d import mmlu_datasets

from dare.harness.compass.inferencers import ConditionalLikelihoodInferencer

for _dataset in mmlu_datasets:
    _dataset["infer_cfg"]["inferencer"]["type"] = ConditionalLikelihoodInferencer
