"""Secrets do not belong into logs: what looks like one, or is the value of a variable that names one, is hidden."""

from __future__ import annotations

import os
import re

HIDDEN = "<hidden>"  # a plain value of YAML and JSON strings
_SHORTEST = 8  # values of variables below this are words that occur anyway

# Tokens of Hugging Face, OpenAI and Anthropic, GitHub, GitLab, AWS, Slack, Google, and anything sent as a bearer.
_SHAPES = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}"
    r"|AKIA[A-Z0-9]{16}|xox[abprs]-[\w-]{10,}|AIza[\w-]{30,})"
)
_BEARER = re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}")
_IN_ADDRESS = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@]+@")
_NAMED = re.compile(r"(?i)(?:\w+_)?(?:API_?KEY|ACCESS_KEY|PRIVATE_KEY|TOKEN|SECRET|PASSWORD|PASSWD)")
# A line of YAML or JSON, or an assignment: `api_key: VALUE`. Not `max_tokens: 3`, nor `api_key_env: NAME`.
_ASSIGNED = re.compile(
    r"(?im)(\b(?:[a-z0-9]+_)*(?:api_?key|access_token|auth_token|hf_token|secret|password|passwd)[\"']?\s*[:=]\s*[\"']?)"
    r"(?!null\b|None\b|true\b|false\b|[\"'\s,}])[^\s\"',}]+"
)


def hide_secrets(text: str) -> str:
    """The text with every secret replaced by `<hidden>`; text without any comes back as it is.

    Secrets are tokens of a known shape, bearer tokens, passwords in addresses, values of keys such as `api_key` and
    `password`, and the values of environment variables that are named so.
    """
    text = _SHAPES.sub(HIDDEN, text)
    text = _BEARER.sub(rf"\1{HIDDEN}", text)
    text = _IN_ADDRESS.sub(rf"\1{HIDDEN}@", text)
    text = _ASSIGNED.sub(rf"\1{HIDDEN}", text)
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _NAMED.fullmatch(name) and value in text:
            text = text.replace(value, HIDDEN)
    return text
