"""Several rollout servers as one: rows are spread by sample id, and go to another server when theirs is gone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dare.core.errors import DareError, unknown_name
from dare.core.rollout_recipe import RolloutRecipe
from dare.remote.client import Client, Deadline, Unavailable, read_api_key
from dare.remote.contract import Answer, Ask, BadAnswer, Call, Contract, Facts
from dare.remote.lmdeploy import LMDeploy
from dare.remote.sglang import SGLang
from dare.remote.trace import Row

CONTRACTS: dict[str, Contract] = {"sglang": SGLang(), "lmdeploy": LMDeploy()}
Check = Callable[[Answer, int], Row]


@dataclass(frozen=True)
class Version:
    """Weights that servers are to have: the folder that holds them and the label that they go by."""

    folder: Path
    label: str


class Server:
    """One server, the version that it was last seen to have, and why it is out of the current rollout, if it is."""

    def __init__(self, client: Client, contract: Contract) -> None:
        self.client, self.contract = client, contract
        self.label: str | None = None  # unknown: at the start, and after it was gone
        self.confirms = False  # whether it says which version it has
        self.failure: Unavailable | None = None
        self._lock = threading.Lock()

    def facts(self, deadline: Deadline) -> Facts:
        """What it says about itself. Raises Unavailable."""
        bodies = [self._call(call, "asking what it serves", deadline) for call in self.contract.inquiries()]
        try:
            return self.contract.facts(bodies)
        except BadAnswer as error:
            raise Unavailable(self.client.url, "asking what it serves", str(error)) from None

    def ensure(self, version: Version, deadline: Deadline) -> None:
        """Make it load `version` unless it has it. Raises Unavailable, also if it says that it has another one."""
        with self._lock:
            if self.failure is not None:
                raise self.failure
            if self.label == version.label:
                return
            doing = f"loading weights {version.label}"
            for call in self.contract.update(version.folder, version.label):
                self._call(call, doing, deadline)
            found = self.facts(deadline).version
            self.confirms = found is not None
            if found is not None and found != version.label:
                raise Unavailable(self.client.url, doing, f"it answers that it has {found}")
            self.label = version.label

    def generate(self, ask: Ask, version: Version, check: Check, deadline: Deadline) -> Row:
        """One row, made with `version`. Raises Unavailable."""

        def read(body: bytes, attempt: int) -> Row:
            answer = self.contract.answer(body, ask, attempt)
            if answer.version is not None and answer.version != version.label:
                self.label = None  # it was started again, or somebody else updates it
                raise BadAnswer(f"the row was made with weights {answer.version}, not {version.label}")
            if self.contract.logp_temperature(ask.temperature) != (ask.temperature or 1.0):
                answer = Answer(answer.tokens, answer.steps, None, answer.version)
            return check(answer, ask.row)

        return self.client.ask(
            partial(self.contract.generate, ask),
            read,
            doing=f"generating row {ask.row} (sample id {ask.sample_id}) with weights {version.label}",
            deadline=deadline,
            recover=lambda: self.ensure(version, deadline),
        )

    def _call(self, call: Call, doing: str, deadline: Deadline) -> bytes:
        def read(body: bytes, attempt: int) -> bytes:
            if call.method == "POST":
                self.contract.check_update(call, body)
            return body

        return self.client.ask(lambda attempt: call, read, doing=f"{doing}, {call.path}", deadline=deadline)


class Fleet:
    """The servers of a recipe."""

    def __init__(self, options: RolloutRecipe) -> None:
        """Raises DareError if the API key is not set."""
        if options.engine not in CONTRACTS:
            raise unknown_name("rollout engine", options.engine, CONTRACTS, where="rollout.engine")
        self.options, self.contract = options, CONTRACTS[options.engine]
        key = read_api_key(options)
        self.servers = [Server(Client(url, options, key), self.contract) for url in options.urls]

    def facts(self) -> list[Facts]:
        """What every server says. Raises DareError for one that is not there: at the start all have to be."""
        deadline = Deadline(self.options.deadline_s)
        try:
            return [server.facts(deadline) for server in self.servers]
        except Unavailable as error:
            raise _gone([error]) from None

    @property
    def confirms_versions(self) -> bool:
        """Whether every server says which weights it has."""
        return all(server.confirms for server in self.servers)

    def generate(
        self, asks: Sequence[Ask], version: Version, check: Check, on_row: Callable[[int], None] | None = None
    ) -> list[Row]:
        """The rows, in order, each asked for until it is whole, of whichever server.

        on_row  called with the place of each row that has arrived
        Raises DareError if a row cannot be had from any server in time; no row is lost or taken twice.
        """
        deadline = Deadline(self.options.deadline_s)
        self._ensure_all(version, deadline)
        rows: dict[int, Row] = {}
        pool = ThreadPoolExecutor(min(self.options.concurrency, len(asks)), thread_name_prefix="dare-rollout")
        try:
            places = {pool.submit(self._row, ask, version, check, deadline): place for place, ask in enumerate(asks)}
            for future in as_completed(places):
                rows[places[future]] = future.result()
                if on_row is not None:
                    on_row(places[future])
        except BaseException:
            self.close()  # ends what is under way, so that nobody waits for it
            raise
        finally:
            pool.shutdown(cancel_futures=True)
        return [rows[place] for place in range(len(asks))]

    def close(self) -> None:
        """End all connections; the fleet is not used afterwards."""
        for server in self.servers:
            server.client.close()

    def _ensure_all(self, version: Version, deadline: Deadline) -> None:
        """Give every server the weights, all at once; one that was gone gets another chance."""

        def ensure(server: Server) -> None:
            server.failure = None
            try:
                server.ensure(version, deadline)
            except Unavailable as error:
                server.label, server.failure = None, error

        with ThreadPoolExecutor(len(self.servers), thread_name_prefix="dare-weights") as pool:
            list(pool.map(ensure, self.servers))  # to raise what was raised
        if all(server.failure is not None for server in self.servers):
            raise self._gone()

    def _row(self, ask: Ask, version: Version, check: Check, deadline: Deadline) -> Row:
        first = ask.sample_id % len(self.servers)
        for server in self.servers[first:] + self.servers[:first]:
            if server.failure is not None:
                continue
            try:
                return server.generate(ask, version, check, deadline)
            except Unavailable as error:
                if error.is_late:
                    raise _gone([error]) from None
                server.label, server.failure = None, error
        raise self._gone()

    def _gone(self) -> DareError:
        return _gone([server.failure for server in self.servers if server.failure is not None])


def _gone(errors: list[Unavailable]) -> DareError:
    last = errors[-1]
    others = "; ".join(f"{error.url}: {error.reason}" for error in errors[:-1])
    return DareError(
        "no rollout server answers" if others else "the rollout server does not answer",
        where=f"{last.url}, {last.doing}",
        got=last.reason + (f"; before that {others}" if others else ""),
        fix="look at the server and start it again; a run continues from its last checkpoint with --resume",
    )
