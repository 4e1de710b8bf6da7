"""winogrande_ll_c5cf57 of OpenCompass, by the likelihood of the answer given the question."""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.winogrande.winogrande_ll_c5cf57 import winogrande_datasets

from dare.harness.compass.inferencers import ConditionalLikelihoodInferencer

for _dataset in winogrande_datasets:
    _dataset["infer_cfg"]["inferencer"]["type"] = ConditionalLikelihoodInferencer
