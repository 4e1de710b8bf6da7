"""What a rollout spends: seconds by part, and how much the network was asked to do. For `dare bench rollout`."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["packing", "backbone", "head", "sampling", "bookkeeping"]


@dataclass
class Meter:
    """Counts that forwards and samplers add to; seconds are CPU time of the process.

    num_forwards     calls of the network
    num_tokens       tokens that went through all layers but the last, and through the last one's keys and values
    num_read         hidden states that were read: what the last layer computed besides
    num_pairs        query-key pairs of one layer before the last
    num_read_pairs   those of the last layer
    num_logit_rows   rows of logits
    """

    num_forwards: int = 0
    num_tokens: int = 0
    num_read: int = 0
    num_pairs: int = 0
    num_read_pairs: int = 0
    num_logit_rows: int = 0
    seconds: dict[Part, float] = field(
        default_factory=lambda: {"packing": 0.0, "backbone": 0.0, "head": 0.0, "sampling": 0.0, "bookkeeping": 0.0}
    )
    _part: Part = "bookkeeping"
    _since: float = field(default_factory=time.process_time)

    def switch(self, part: Part) -> None:
        """What follows belongs to `part`."""
        now = time.process_time()
        self.seconds[self._part] += now - self._since
        self._part, self._since = part, now
