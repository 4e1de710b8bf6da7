"""ARC_c_ppl_a450bd of OpenCompass, by the likelihood of the answer given the question."""

from mmengine.config import read_base

with read_base():
    from opencompass.configs.datasets.ARC_c.ARC_c_ppl_a450bd import ARC_c_datasets

from dare.harness.compass.inferencers import ConditionalLikelihoodInferencer

for _dataset in ARC_c_datasets:
    _dataset["infer_cfg"]["inferencer"]["type"] = ConditionalLikelihoodInferencer
