"""Reference log-probs on disk: scored once by the model before it is trained, then read.

One entry per row and its views, under a digest of everything that its log-probs depend on beside the weights: tokens,
masks, targets, blocks, temperature. An entry is whole or absent, and a damaged one is an error.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from dare.core.engine import Engine
from dare.core.errors import DareError
from dare.core.types import Samples, Views

_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.25}  # nats of one token, between two passes of one model


class ReferenceStore:
    """A file of log-probs. `identity` says of which model; a file of another one is refused."""

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._readable():
            self._db = sqlite3.connect(path)
            self._db.execute("CREATE TABLE IF NOT EXISTS model (identity TEXT)")
            self._db.execute("CREATE TABLE IF NOT EXISTS entry (digest BLOB PRIMARY KEY, crc INTEGER, logp BLOB)")
            found = self._db.execute("SELECT identity FROM model").fetchone()
            if found is None:
                with self._db:
                    self._db.execute("INSERT INTO model VALUES (?)", (identity,))
        if found is not None and found[0] != identity:
            raise DareError(
                "the stored reference log-probs are those of another model",
                where=str(path),
                got=found[0],
                expected=identity,
                fix="give reference.path another file, or delete this one",
            )

    def close(self) -> None:
        self._db.close()

    def missing(self, views: Views, samples: Samples) -> list[int]:
        """The rows of `samples` that have no entry for these views."""
        return [row for row, digest in enumerate(_digests(views, samples)) if self._read(digest) is None]

    def write(self, logp_RS: Tensor, views: Views, samples: Samples, rows: list[int]) -> None:
        """Store the log-probs of all views of these rows, all or none."""
        digests = _digests(views, samples)
        entries = []
        for row in rows:
            is_own_R = views.sample_R == row
            data = logp_RS[is_own_R][views.is_target_RS[is_own_R]].float().numpy().tobytes()
            entries.append((digests[row], zlib.crc32(data), data))
        with self._readable(), self._db:
            self._db.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", entries)

    def read(self, views: Views, samples: Samples) -> Tensor:
        """float32 [R, S]: the stored log-probs, as `Engine.score` returned them.

        Raises DareError if a row has no entry, or a damaged one.
        """
        logp_RS = torch.zeros(views.noisy_RS.shape)
        for row, digest in enumerate(_digests(views, samples)):
            data = self._read(digest)
            if data is None:
                raise DareError(
                    "a row has no stored reference log-probs",
                    where=str(self.path),
                    fix="start a new run: they are scored before its first step; or set reference.mode: live",
                )
            own_R = (views.sample_R == row).nonzero()[:, 0]
            is_target_RS = torch.zeros_like(views.is_target_RS)
            is_target_RS[own_R] = views.is_target_RS[own_R]
            logp_N = torch.frombuffer(bytearray(data), dtype=torch.float32) if data else torch.zeros(0)
            logp_RS[is_target_RS] = logp_N
        return logp_RS

    def _read(self, digest: bytes) -> bytes | None:
        with self._readable():
            found = self._db.execute("SELECT crc, logp FROM entry WHERE digest = ?", (digest,)).fetchone()
        if found is None:
            return None
        crc, data = found
        if zlib.crc32(data) != crc:
            raise self._damaged("a checksum does not match")
        return bytes(data)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise self._damaged(str(error)) from None

    def _damaged(self, got: str) -> DareError:
        return DareError(
            "the stored reference log-probs cannot be read",
            where=str(self.path),
            got=got,
            fix="delete the file; it is written again before the first step",
        )


def score_missing(store: ReferenceStore, engine: Engine, views: Views, samples: Samples) -> int:
    """Score what has no entry yet with the policy, which must be the reference still; returns the number of rows."""
    rows = store.missing(views, samples)
    if rows:
        part = torch.isin(views.sample_R, torch.tensor(rows)).nonzero()[:, 0]
        logp_RS = torch.zeros(views.noisy_RS.shape)
        logp_RS[part] = engine.score(views.rows(part), samples)
        store.write(logp_RS, views, samples, rows)
    return len(rows)


def check_store(store: ReferenceStore, engine: Engine, views: Views, samples: Samples, dtype: str) -> None:
    """Score these rows again and compare. Raises DareError if the entries are not those of the engine's policy."""
    gap = float((engine.score(views, samples) - store.read(views, samples)).abs().max())
    if gap > _TOLERANCE[dtype]:
        raise DareError(
            "the stored reference log-probs are not those of this model",
            where=str(store.path),
            got=f"a difference of {gap:.3g} nats",
            expected=f"at most {_TOLERANCE[dtype]}",
            fix="delete the file, or give reference.path another one",
        )


def _digests(views: Views, samples: Samples) -> list[bytes]:
    """A digest of each row's views, which does not depend on padding."""
    canvas, digests = samples.canvas, []
    for row in range(canvas.batch_size):
        length = int(canvas.is_real_BS[row].sum())
        is_own_R = views.sample_R == row
        state = hashlib.blake2b(f"{canvas.attention} {length} {views.temperature}".encode(), digest_size=16)
        columns = (views.noisy_RS, views.context_RS, views.target_RS, views.is_target_RS)
        for column in (*(c[is_own_R] for c in columns), canvas.block_BS[row : row + 1]):
            state.update(column[:, :length].long().contiguous().numpy().tobytes())
        digests.append(state.digest())
    return digests
