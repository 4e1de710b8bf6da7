"""A DARE model for `opencompass --config-dir $(dare eval configs) --models dare_model`.

The checkpoint (or the URL of a server) is the environment variable DARE_CHECKPOINT; copy the file for other settings.
"""

import os

from dare.harness.compass.model import DareModel

models = [
    {
        "abbr": "dare",
        "type": DareModel,
        "path": os.environ.get("DARE_CHECKPOINT", ""),
        "max_seq_len": 4096,
        "max_out_len": 256,
        "batch_size": 64,
        "decode": {},
        "likelihood": {"num_samples": 128},
        "run_cfg": {"num_gpus": 0},
    }
]
