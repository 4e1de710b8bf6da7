"""The native networks against the numbers of the published code: logits, losses and gradients of small checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from dare.core.types import Canvas, Views
from dare.diffusion import blocks
from dare.families.base import Family
from dare.families.layers.moe import recorded_routes
from tests.golden_checkpoints import golden_case as case
from tests.golden_checkpoints import golden_family as family_of
from tests.golden_checkpoints import load_golden

ATOL = 1e-4  # logits; the reference's own equivalent paths differ by up to 1.3e-5
RTOL = 1e-5  # losses and gradients


def check_logits(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=ATOL, rtol=0.0)


def scored(
    family: Family,
    noisy_RS: Tensor,
    context_RS: Tensor,
    is_target_RS: Tensor,
    rows: list[int],
    block_length: int | None = None,
) -> Tensor:
    """view_logp of full rows (of `rows` real tokens each) against their own clean tokens."""
    clean = [context_RS[i, :length].tolist() for i, length in enumerate(rows)]
    canvas = family.canvas([[] for _ in rows], clean, block_length)
    views = views_of(noisy_RS, context_RS, context_RS, is_target_RS)
    return family.view_logp(views, canvas)


def views_of(noisy_RS: Tensor, context_RS: Tensor, target_RS: Tensor, is_target_RS: Tensor) -> Views:
    count = noisy_RS.shape[0]
    return Views(
        noisy_RS=noisy_RS,
        context_RS=context_RS,
        target_RS=target_RS,
        is_target_RS=is_target_RS,
        weight_RS=is_target_RS.float(),
        sample_R=torch.arange(count),
        view_R=torch.zeros(count, dtype=torch.int64),
    )


MASKED = ("llada", "llada_moe", "llada_moe_variant", "dream")
BLOCK = ("sdar", "sdar_moe", "llada2_0", "llada2_1")
MIXTURES = [
    ("llada_moe", "full_b2_t17", "full_b2_t17"),
    ("llada_moe", "full_b3_t9", "full_b3_t9"),
    ("llada_moe_variant", "full_b2_t17", "full_b2_t17"),
    ("llada_moe_variant", "full_b3_t9", "full_b3_t9"),
    ("sdar_moe", "full", "full_router"),
    ("llada2_0", "full", "full"),
    ("llada2_1", "full", "full"),
]
PLAIN = [(name, label) for name in MASKED for label in ("full_b2_t17", "full_b3_t9")] + [(n, "full") for n in BLOCK]
FULL = [*PLAIN, ("llada_variant", "full"), ("llada_tied", "full"), ("sdar_tied", "full")]
BLOCK_CAUSAL = [(n, f"block_causal_bl{k}") for n in BLOCK for k in (1, 4, 8)] + [("sdar_tied", "block_causal_bl4")]


def unshifted(family: Family, raw_BSV: Tensor, is_real_BS: Tensor) -> Tensor:
    """Stored logits are raw; a shifted family's score the next token, and a row's first token scores itself."""
    if not family.spec.is_shifted:
        return raw_BSV
    moved = raw_BSV.clone()
    for row, is_real_S in enumerate(is_real_BS):
        first = int(is_real_S.nonzero()[0])
        moved[row, first + 1 :] = raw_BSV[row, first:-1]
    return moved


@pytest.mark.parametrize(("name", "label"), FULL)
def test_full_attention(name: str, label: str) -> None:
    family = family_of(name)
    _, tensors = case(name, "forward", label)
    # One block that spans the row is full attention for a block model; a masked model ignores the length.
    logits = family.logits(tensors["input_ids"], block_length=tensors["input_ids"].shape[1])
    check_logits(logits, unshifted(family, tensors["logits"], torch.ones_like(tensors["input_ids"])))


@pytest.mark.parametrize(("name", "label"), PLAIN)
def test_final_hidden_states(name: str, label: str) -> None:
    family = family_of(name)
    _, tensors = case(name, "forward", label)
    ids_BT = tensors["input_ids"]
    hidden = family.hidden(ids_BT, torch.arange(ids_BT.shape[1]).expand_as(ids_BT), None)
    check_logits(hidden, tensors["hidden_final_normed"])


@pytest.mark.parametrize(("name", "label"), PLAIN)
def test_hidden_states_on_the_way(name: str, label: str) -> None:
    """The embedding's output, which enters the first layer, and what enters the second."""
    network, (_, tensors) = family_of(name).network, case(name, "forward", label)
    ids_BT = tensors["input_ids"]
    layers = next(module for module in network.modules() if isinstance(module, torch.nn.ModuleList))
    entered: list[Tensor] = []
    hooks = [layer.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for layer in layers]
    network(ids_BT, torch.arange(ids_BT.shape[1]).expand_as(ids_BT), None)
    for hook in hooks:
        hook.remove()
    assert torch.equal(entered[0], tensors["hidden_first"])
    check_logits(entered[1], tensors["hidden_mid"])


@pytest.mark.parametrize("name", MASKED)
@pytest.mark.parametrize("label", ["pad_left", "pad_right"])
def test_padding_of_a_masked_model(name: str, label: str) -> None:
    _, tensors = case(name, "forward", label)
    is_real_BS = tensors["attention_mask"].bool()
    logits = family_of(name).logits(tensors["input_ids"], is_real_BS)
    expected = unshifted(family_of(name), tensors["logits"], is_real_BS)
    check_logits(logits[is_real_BS], expected[is_real_BS])


@pytest.mark.parametrize(("name", "label"), BLOCK_CAUSAL)
def test_block_causal(name: str, label: str) -> None:
    meta, tensors = case(name, "forward", label)
    check_logits(family_of(name).logits(tensors["input_ids"], block_length=meta["block_length"]), tensors["logits"])


@pytest.mark.parametrize("name", BLOCK)
def test_left_padding_of_a_block_model(name: str) -> None:
    meta, tensors = case(name, "forward", "left_pad_block_causal")
    is_real_BS = tensors["valid"].bool()
    logits = family_of(name).logits(tensors["input_ids"], is_real_BS, meta["block_length"])
    check_logits(logits[is_real_BS], tensors["logits"][is_real_BS])


@pytest.mark.parametrize("name", BLOCK)
def test_cached_blocks(name: str) -> None:
    meta, tensors = case(name, "forward", "cached_blocks")
    family, clean_BS = family_of(name), tensors["clean_ids"]
    length, start, count = meta["block_length"], meta["prefill"], clean_BS.shape[0]
    block_S = torch.arange(clean_BS.shape[1]) // length
    memory = family.cache(count, clean_BS.shape[1])

    def run(ids_BT: Tensor, first: int) -> Tensor:
        position_BT = torch.arange(first, first + ids_BT.shape[1]).expand_as(ids_BT)
        visible = (block_S <= block_S[first : first + ids_BT.shape[1], None])[None, None]
        return family.hidden(ids_BT, position_BT, visible, memory)

    with torch.no_grad():
        run(clean_BS[:, :start], 0)
        for index, expected in enumerate(tensors["logits"]):
            hidden = run(tensors["noisy_blocks"][index], start)
            check_logits(family.row_logits(hidden.flatten(0, 1)).view_as(expected), expected)
            run(clean_BS[:, start : start + length], start)
            start += length


@pytest.mark.parametrize("name", BLOCK)
def test_two_stream(name: str) -> None:
    meta, tensors = case(name, "forward", "two_stream")
    family, length = family_of(name), meta["n"]
    noisy, clean = tensors["noisy_ids"], tensors["clean_ids"]
    is_real = torch.ones_like(clean, dtype=torch.bool)
    position = blocks.positions(is_real)
    mask = blocks.two_stream_mask(position // meta["block_length"], is_real)
    assert torch.equal(mask[0, 0], tensors["mask"])
    hidden = family.hidden(torch.cat([noisy, clean], 1), position.repeat(1, 2), mask)
    check_logits(family.row_logits(hidden.flatten(0, 1)).view(2, 2 * length, -1), tensors["logits"])

    expected = tensors["logits"][:, :length].log_softmax(-1).gather(-1, clean[..., None])[..., 0]
    check_logits(scored(family, noisy, clean, is_real, [length, length], meta["block_length"]), expected)


@pytest.mark.parametrize(("name", "label", "router_label"), MIXTURES)
def test_routing(name: str, label: str, router_label: str) -> None:
    """Raw router logits and the set of chosen experts, layer by layer."""
    family, ids_BT = family_of(name), case(name, "forward", label)[1]["input_ids"]
    _, tensors = case(name, "forward", router_label)
    with recorded_routes(family.network) as routes:
        family.logits(ids_BT, block_length=ids_BT.shape[1])
    layers = sorted(key.removeprefix("router_logits_layer") for key in tensors if key.startswith("router_logits"))
    assert len(routes) == len(layers)
    for layer, route in zip(layers, routes, strict=True):
        check_logits(route.logits_NE, tensors[f"router_logits_layer{layer}"].view_as(route.logits_NE))
        expected = tensors[f"topk_experts_layer{layer}"].view_as(route.expert_NA)
        assert torch.equal(route.expert_NA.sort(-1).values, expected)


@pytest.mark.parametrize("name", ["llada2_0", "llada2_1"])
def test_training_loss_and_gradients_of_a_mixture(name: str) -> None:
    """Mean cross-entropy of the masked tokens of the noisy stream; gradients reach every expert and router."""
    meta, tensors = case(name, "forward", "two_stream")
    family, labels = load_golden(name), tensors["labels"]
    is_target = labels != -100
    clean, rows = tensors["clean_ids"], [meta["n"]] * 2
    assert torch.equal(clean[is_target], labels[is_target])
    logp_RS = scored(family, tensors["noisy_ids"], clean, is_target, rows, meta["block_length"])
    torch.testing.assert_close(-logp_RS, tensors["token_ce"], atol=ATOL, rtol=0.0)

    loss = -logp_RS.sum() / is_target.sum()
    assert loss.item() == pytest.approx(meta["loss_same_position"], rel=RTOL)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = official_grads(family)
    assert grads.keys() == meta["grad_norms"].keys()
    for parameter, grad in grads.items():
        assert grad.norm().item() == pytest.approx(meta["grad_norms"][parameter], rel=RTOL), parameter


def official_grads(family: Family) -> dict[str, Tensor]:
    """Gradients under the names of the checkpoint, which has one matrix per expert."""
    shadow = copy.deepcopy(family.network)
    for parameter, source in zip(shadow.parameters(), family.network.parameters(), strict=True):
        assert source.grad is not None
        parameter.data = source.grad
    buffers = dict(shadow.named_buffers())
    return {name: grad for name, grad in shadow.state_dict().items() if name not in buffers}


@pytest.mark.parametrize("label", ["train_two_stream", "train_two_stream_packed"])
def test_training_loss_and_gradients_of_a_block_model(label: str) -> None:
    meta, tensors = case("sdar", "forward", label)
    family = load_golden("sdar")
    is_answer = tensors["labels"] != -100
    is_target = is_answer & (tensors["noisy_ids"] == family.spec.mask_id)
    # Every packed document becomes a row of its own; the width is that of the longest.
    lengths = [length for packed in meta["sequence_lengths"] for length in packed]
    rows = {
        key: unpack(value, lengths)
        for key, value in {
            "noisy": tensors["noisy_ids"],
            "clean": tensors["input_ids"],
            "is_target": is_target,
            "p": tensors["p_mask"],
        }.items()
    }
    logp_RS = scored(family, rows["noisy"], rows["clean"], rows["is_target"], lengths)
    torch.testing.assert_close(-logp_RS[rows["is_target"]], tensors["token_ce"], atol=ATOL, rtol=0.0)
    assert bool((logp_RS[~rows["is_target"]] == 0).all())

    loss = -(logp_RS[rows["is_target"]] / rows["p"][rows["is_target"]]).sum() / is_answer.sum()
    assert loss.item() == pytest.approx(meta["loss"], rel=RTOL)
    loss.backward()  # type: ignore[no-untyped-call]
    grads = {name: parameter.grad for name, parameter in family.network.named_parameters()}
    assert grads.keys() == meta["grad_norms"].keys()
    for name, grad in grads.items():
        assert grad is not None
        assert grad.norm().item() == pytest.approx(meta["grad_norms"][name], rel=RTOL), name
        stored = tensors.get("grad__" + name.replace(".", "__"))
        if stored is not None:
            torch.testing.assert_close(grad, stored, atol=RTOL * stored.abs().max().item(), rtol=RTOL)


def unpack(value_BS: Tensor, lengths: list[int]) -> Tensor:
    """[documents, longest]: the documents of packed rows, right-padded with zeros."""
    documents = torch.split(value_BS.flatten(), lengths)
    return torch.nn.utils.rnn.pad_sequence(list(documents), batch_first=True)


@pytest.mark.parametrize("label", ["ll_plain", "ll_single_token"])
def test_likelihood(label: str) -> None:
    meta, tensors = case("llada", "likelihood", label)
    family = family_of("llada")
    clean = torch.cat([tensors["prompt"], tensors["answer"]])
    values = []
    for noisy_RS, p_RS in zip(tensors["noisy_batches"], tensors["p_mask"], strict=True):
        context_RS = clean.expand_as(noisy_RS)
        is_target_RS = noisy_RS == meta["mask_id"]
        logp_RS = scored(family, noisy_RS, context_RS, is_target_RS, [len(clean)] * len(noisy_RS))
        values.append((logp_RS / p_RS).sum() / meta["batch_size"])
    assert torch.stack(values).mean().item() == pytest.approx(meta["value"], rel=RTOL)


def test_likelihood_with_guidance() -> None:
    meta, tensors = case("llada", "likelihood", "ll_cfg")
    family = family_of("llada")
    num_prompt = len(tensors["prompt"])
    clean = torch.cat([tensors["prompt"], tensors["answer"]])
    values = []
    for noisy_RS, p_RS in zip(tensors["noisy_batches"], tensors["p_mask"], strict=True):
        unprompted_RS = noisy_RS.clone()
        unprompted_RS[:, :num_prompt] = meta["mask_id"]
        without, conditional = family.logits(unprompted_RS), family.logits(noisy_RS)
        guided = without + (meta["cfg_scale"] + 1) * (conditional - without)
        logp_RS = guided.log_softmax(-1).gather(-1, clean.expand_as(noisy_RS)[..., None])[..., 0]
        is_target_RS = noisy_RS == meta["mask_id"]
        values.append((logp_RS / p_RS)[is_target_RS].sum() / meta["batch_size"])
    assert torch.stack(values).mean().item() == pytest.approx(meta["value"], rel=RTOL)


def test_fine_tuning_loss_of_a_masked_model() -> None:
    meta, tensors = case("llada", "likelihood", "sft_masked_ce")
    noisy_BS, clean_BS = tensors["noisy_ids"], tensors["input_ids"]
    is_target_BS = noisy_BS == family_of("llada").spec.mask_id
    logp_BS = scored(family_of("llada"), noisy_BS, clean_BS, is_target_BS, [clean_BS.shape[1]] * 3)
    torch.testing.assert_close(-logp_BS, tensors["token_ce"], atol=ATOL, rtol=0.0)
    weighted_B = -(logp_BS / tensors["p_mask"][:, None]).sum(-1)
    assert (weighted_B / tensors["answer_lengths"]).mean().item() == pytest.approx(meta["loss"], rel=RTOL)
    assert weighted_B.sum().item() / clean_BS.numel() == pytest.approx(meta["pretrain_style_loss"], rel=RTOL)


def test_masked_cross_entropy_of_a_shifted_model() -> None:
    meta, tensors = case("dream", "likelihood", "masked_ce")
    noisy_BS, clean_BS = tensors["noisy_ids"], tensors["input_ids"]
    is_target_BS = noisy_BS == family_of("dream").spec.mask_id
    logp_BS = scored(family_of("dream"), noisy_BS, clean_BS, is_target_BS, [clean_BS.shape[1]] * 3)
    torch.testing.assert_close(-logp_BS, tensors["token_ce"], atol=ATOL, rtol=0.0)
    assert -logp_BS.sum().item() == pytest.approx(meta["sum"], rel=RTOL)
    assert -(logp_BS.sum(-1) / tensors["t"]).sum().item() == pytest.approx(meta["sum_over_t"], rel=RTOL)


@pytest.mark.parametrize("which", ["a", "b", "all"])
def test_coupled_masks_of_a_shifted_model(which: str) -> None:
    _, tensors = case("dream", "likelihood", "coupled_masks")
    family, clean_BS = family_of("dream"), tensors["input_ids"]
    is_target_BS = tensors[f"noisy_{which}"] == family.spec.mask_id
    assert bool(is_target_BS.any(-1).all())
    logp_BS = scored(family, tensors[f"noisy_{which}"], clean_BS, is_target_BS, [clean_BS.shape[1]] * 3)
    torch.testing.assert_close(logp_BS[is_target_BS], tensors[f"logp_{which}"][is_target_BS], atol=ATOL, rtol=0.0)


def test_prompt_and_completion_of_a_canvas_score_like_plain_rows() -> None:
    """The same row through `canvas` with a prompt, on either grid, has the same log-probs."""
    for name in (*MASKED, *BLOCK):
        family = family_of(name)
        row = list(range(3, 14))
        is_target_RS = torch.tensor([[False] * 5 + [True] * 6])
        noisy_RS = torch.tensor([row[:5] + [family.spec.mask_id] * 6])
        context_RS = torch.tensor([row])
        canvas: Canvas = family.canvas([row[:5]], [row[5:]])
        split = family.view_logp(views_of(noisy_RS, context_RS, context_RS, is_target_RS), canvas)
        assert torch.equal(split, scored(family, noisy_RS, context_RS, is_target_RS, [11]))
