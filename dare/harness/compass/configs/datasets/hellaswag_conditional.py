"""hellaswag_ppl_47bff9 of OpenCompass, by the likelihood of the answer given the question."""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.hellaswag.hellaswag_ppl_47bff9 import hellaswag_datasets

from dare.harness.compass.inferencers import ConditionalLikelihoodInferencer

for _dataset in hellaswag_datasets:
    _dataset["infer_cfg"]["inferencer"]["type"] = ConditionalLikelihoodInferencer
