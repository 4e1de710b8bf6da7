"""Requests that nobody thought of: never a 5xx, never an answer that the schema does not know, never a hang."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from dare.core.decode import Decode
from tests.serve.conftest import HOST, Served

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
FUZZ: dict[str, Any] = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/loglikelihood"])
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_every_answer_is_one_of_the_schema(
    path: str, mode: schemathesis.GenerationMode, served: dict[str, Served]
) -> None:
    api = schemathesis.openapi.from_url(f"http://{HOST}:{served['sdar'].port}/openapi.json")
    operation = api[path]["POST"]

    @settings(max_examples=6, **FUZZ)
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        case.validate_response(case.call(timeout=30), checks=CHECKS)

    run()


NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 4, 0.5, 1.0, -1, 10**9, 10**30, 1e300, float("nan"), float("inf")]), st.integers(0, 9)
)
VALUES = st.one_of(NUMBERS, st.booleans(), st.none(), st.text(max_size=3), st.lists(NUMBERS, max_size=2))
LIKELY = {
    name: st.sampled_from([*field.annotation.__args__, "x"])  # type: ignore[union-attr]
    for name, field in Decode.model_fields.items()
    if name in ("unmask", "schedule", "remask", "cache")
}
DECODES = st.dictionaries(st.sampled_from(sorted(Decode.model_fields)), VALUES, max_size=3).flatmap(
    lambda options: st.fixed_dictionaries({}, optional=LIKELY).map(lambda likely: {**options, **likely})
)


@pytest.mark.parametrize("family", ["llada", "sdar"])
@settings(max_examples=40, **FUZZ)
@given(decode=DECODES)
def test_decode_options_are_refused_or_work(family: str, served: dict[str, Served], decode: dict[str, Any]) -> None:
    answer = served[family].ask("/v1/completions", {"prompt": "ab", "max_tokens": 4, "dare": {"decode": decode}})
    assert answer.status in (200, 400), answer.text
    if answer.status == 400:
        assert answer.error["param"]
