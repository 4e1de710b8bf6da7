"""Verifiable instructions of IFEval (Zhou et al. 2023): does a response do what it was told?

One function per instruction id of the published list, each of (response, arguments of the row). Where the original uses
nltk for words and sentences, ours are regular expressions: a word is a run of letters, digits and apostrophes, and a
sentence ends with ".", "!" or "?" before a space or the end. The language of a response is decided by its script, so an
instruction for a language that shares its script with others cannot be judged and is reported as such.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

Arguments = Mapping[str, Any]
MAX_CHARS = 100_000

_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?:\s|$)")
_SCRIPTS = {
    "ar": "\u0600-\u06ff", "fa": "\u0600-\u06ff", "ur": "\u0600-\u06ff", "hi": "\u0900-\u097f", "mr": "\u0900-\u097f",
    "ne": "\u0900-\u097f", "bn": "\u0980-\u09ff", "pa": "\u0a00-\u0a7f", "gu": "\u0a80-\u0aff", "ta": "\u0b80-\u0bff",
    "te": "\u0c00-\u0c7f", "kn": "\u0c80-\u0cff", "th": "\u0e00-\u0e7f", "ko": "\uac00-\ud7af", "ja": "\u3040-\u30ff",
    "zh": "\u4e00-\u9fff", "ru": "\u0400-\u04ff", "bg": "\u0400-\u04ff",
}  # fmt: skip


class CannotJudge(Exception):
    """The instruction is not in the list, or this response cannot be judged by it; the text says why."""


def follows(instruction: str, arguments: Arguments, response: str, prompt: str = "") -> bool:
    """Whether `response` follows one instruction. An empty response follows none. Raises CannotJudge."""
    if instruction not in VERIFIERS:
        raise CannotJudge(f"unknown instruction {instruction}")
    if not response.strip() or len(response) > MAX_CHARS:
        return False
    given = {name: value for name, value in arguments.items() if value is not None}
    if instruction == "combination:repeat_prompt":
        given.setdefault("prompt_to_repeat", prompt)
    try:
        return VERIFIERS[instruction](response, given)
    except KeyError as error:
        raise CannotJudge(f"{instruction} lacks the argument {error}") from None


def loosened(response: str) -> list[str]:
    """The variants of IFEval's loose accuracy: without the first line, the last, both, and without asterisks."""
    lines = response.split("\n")
    kept = [lines, lines[1:], lines[:-1], lines[1:-1]]
    variants = ["\n".join(part).strip() for part in kept]
    return variants + [variant.replace("*", "") for variant in variants]


def _compare(value: int, arguments: Arguments, count: str, relation: str) -> bool:
    if arguments[relation] == "less than":
        return value < int(arguments[count])
    if arguments[relation] == "at least":
        return value >= int(arguments[count])
    raise CannotJudge(f"relation {arguments[relation]!r}")


def _count(pattern: str, text: str) -> int:
    return len(re.findall(pattern, text, re.IGNORECASE))


def _keywords(response: str, arguments: Arguments) -> bool:
    return all(_count(re.escape(word), response) for word in arguments["keywords"])


def _keyword_frequency(response: str, arguments: Arguments) -> bool:
    return _compare(_count(re.escape(arguments["keyword"].strip()), response), arguments, "frequency", "relation")


def _forbidden_words(response: str, arguments: Arguments) -> bool:
    return not any(_count(rf"\b{re.escape(word)}\b", response) for word in arguments["forbidden_words"])


def _letter_frequency(response: str, arguments: Arguments) -> bool:
    number = response.lower().count(arguments["letter"].lower())
    return _compare(number, arguments, "let_frequency", "let_relation")


def _language(response: str, arguments: Arguments) -> bool:
    language = arguments["language"]
    letters = [character for character in response if character.isalpha()]
    if language in _SCRIPTS:
        return len(re.findall(f"[{_SCRIPTS[language]}]", response)) > len(letters) / 2
    if sum(character.isascii() for character in letters) <= len(letters) / 2:
        return False
    raise CannotJudge(f"the language {language!r} shares its script with others")


def _sentences(response: str, arguments: Arguments) -> bool:
    tail = _SENTENCE_END.split(response.strip())[-1].strip()
    number = len(_SENTENCE_END.findall(response.strip())) + bool(tail)
    return _compare(number, arguments, "num_sentences", "relation")


def _words(response: str, arguments: Arguments) -> bool:
    return _compare(len(_WORD.findall(response)), arguments, "num_words", "relation")


def _paragraphs(response: str, arguments: Arguments) -> bool:
    parts = re.split(r"\s?\*\*\*\s?", response)
    inner = parts[1:-1]
    number = sum(bool(part.strip()) for part in parts)
    return all(part.strip() for part in inner) and number == int(arguments["num_paragraphs"])


def _nth_paragraph(response: str, arguments: Arguments) -> bool:
    parts = [part for part in re.split(r"\n\n", response) if part.strip()]
    place = int(arguments["nth_paragraph"]) - 1
    if len(parts) != int(arguments["num_paragraphs"]) or not 0 <= place < len(parts):
        return False
    first = parts[place].strip().split()[0].lstrip("'\"").rstrip(".,?!'\"")
    return first.lower() == str(arguments["first_word"]).lower()


def _placeholders(response: str, arguments: Arguments) -> bool:
    return len(re.findall(r"\[[^\[\]]*\]", response)) >= int(arguments["num_placeholders"])


def _postscript(response: str, arguments: Arguments) -> bool:
    marker = arguments["postscript_marker"].strip().lower()
    patterns = {"p.p.s": r"\s*p\.\s?p\.\s?s.*$", "p.s.": r"\s*p\.\s?s\..*$"}
    pattern = patterns.get(marker, r"\s*" + re.escape(marker) + r".*$")
    return re.search(pattern, response.lower(), re.MULTILINE) is not None


def _bullets(response: str, arguments: Arguments) -> bool:
    number = len(re.findall(r"^\s*\*[^*].*$|^\s*-.*$", response, re.MULTILINE))
    return number == int(arguments["num_bullets"])


def _constrained(response: str, arguments: Arguments) -> bool:
    return any(answer in response for answer in ("My answer is yes.", "My answer is no.", "My answer is maybe."))


def _highlights(response: str, arguments: Arguments) -> bool:
    found = re.findall(r"\*\*([^\n*]+)\*\*|\*([^\n*]+)\*", response)
    return sum(bool("".join(pair).strip()) for pair in found) >= int(arguments["num_highlights"])


def _sections(response: str, arguments: Arguments) -> bool:
    splitter = re.escape(arguments["section_spliter"].strip())
    return len(re.split(rf"\s?{splitter}\s?\d+\s?", response)) - 1 >= int(arguments["num_sections"])


def _is_json(response: str, arguments: Arguments) -> bool:
    text = response.strip()
    for prefix in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(prefix)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str, arguments: Arguments) -> bool:
    return any(title.strip() for title in re.findall(r"<<([^<>\n]+)>>", response))


def _two_responses(response: str, arguments: Arguments) -> bool:
    parts = response.split("******")
    full = [part.strip() for part in parts if part.strip()]
    return all(part.strip() for part in parts[1:-1]) and len(full) == 2 and full[0] != full[1]


def _repeats_prompt(response: str, arguments: Arguments) -> bool:
    return response.strip().lower().startswith(arguments["prompt_to_repeat"].strip().lower())


def _ends_with(response: str, arguments: Arguments) -> bool:
    return response.strip().strip('"').lower().endswith(arguments["end_phrase"].strip().lower())


def _capital_words(response: str, arguments: Arguments) -> bool:
    number = sum(word.isupper() for word in _WORD.findall(response))
    return _compare(number, arguments, "capital_frequency", "capital_relation")


def _upper(response: str, arguments: Arguments) -> bool:
    return response.isupper()


def _lower(response: str, arguments: Arguments) -> bool:
    return response.islower()


def _no_commas(response: str, arguments: Arguments) -> bool:
    return "," not in response


def _quoted(response: str, arguments: Arguments) -> bool:
    text = response.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


VERIFIERS: dict[str, Callable[[str, Arguments], bool]] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _keyword_frequency,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _sentences,
    "length_constraints:number_paragraphs": _paragraphs,
    "length_constraints:number_words": _words,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": _is_json,
    "detectable_format:title": _title,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats_prompt,
    "startend:end_checker": _ends_with,
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": _upper,
    "change_case:english_lowercase": _lower,
    "punctuation:no_comma": _no_commas,
}
