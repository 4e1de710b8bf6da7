"""Checkpoints in the Hugging Face layout to native families and back: strict, streaming, without foreign code.

`auto_map`, the code files that it names and everything else that a native network does not need are kept and saved
again, so that the official code and servers can load the result. They are never executed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from dare.core.errors import DareError
from dare.core.files import read_json, write_json
from dare.core.registry import FAMILIES, resolve
from dare.core.rng import Key
from dare.core.spec import FamilySpec
from dare.families.adapter_files import load_adapter, write_adapter
from dare.families.base import Family, FamilyType
from dare.families.config import Config, ModelSizes
from dare.families.hub import resolve_checkpoint as resolve_checkpoint
from dare.families.lora import Adapter
from dare.families.network import Network
from dare.families.shards import WEIGHTS_NAME, Shards

_CONFIG_NAME = "config.json"
_GENERATION_NAME = "generation_config.json"
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def load_family(path: str | Path, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> Family:
    """The family of a checkpoint folder, its weights in `dtype` (None: the stored one) on `device`.

    Beyond the finished network one tensor at a time is in memory. Raises DareError for a folder that is no whole
    checkpoint of a known family: the config, the files and every tensor's name and shape are checked first.
    """
    folder = Path(path)
    family_type, spec, config, generation_config = _describe(folder)
    try:
        network = _build(family_type, config)
    except DareError as error:
        raise error.inside(str(folder)) from None
    shards = Shards(folder)
    _check_names(network, shards)
    network.to(dtype=dtype or _stored_dtype(network, shards)).to_empty(device=device)
    _fill(network, shards)
    buffer_dtypes = {name: shards.dtypes[name] for name, _ in network.named_buffers()}
    return Family(spec, network, config, generation_config, buffer_dtypes, read_code_files(folder, config))


def read_code_files(folder: Path, config: Config) -> dict[str, bytes]:
    """The code that a checkpoint brings along, unread, by file name; {} if its config names none (`auto_map`).

    All Python files of the folder belong to it, because those that are named import the others.
    """
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.py"))} if config.get("auto_map") else {}


def read_spec(path: str | Path) -> FamilySpec:
    """The spec of a checkpoint folder, without its weights. Raises DareError like `load_family`."""
    return _describe(Path(path))[1]


def outline_family(path: str | Path) -> Family:
    """The family of a checkpoint with its network on the meta device: it lays canvases out, but cannot forward.

    Raises DareError as `load_family` does for the configs.
    """
    family_type, spec, config, generation_config = _describe(Path(path))
    return Family(spec, _build(family_type, config), config, generation_config)


def load_weights(family: Family, folder: Path) -> None:
    """Overwrite the weights of `family`, or of its adapter, in place; its dtype and device stay.

    Raises DareError like `load_family`.
    """
    if family.adapter is not None:
        load_adapter(family.adapter, folder)
        return
    shards = Shards(folder)
    _check_names(family.network, shards)
    _fill(family.network, shards)


def filled_family(family: Family, tensors: Mapping[str, Tensor]) -> Family:
    """A copy of `family` that holds `tensors`: whole parameters and buffers by name, taken as they are.

    What `save_family` writes has to be among them: of a family with an adapter that is the adapter alone.
    """
    copied = _hollow(family)
    for name, tensor in tensors.items():
        prefix, _, leaf = name.rpartition(".")
        owner = copied.network.get_submodule(prefix)
        is_parameter = leaf in owner._parameters
        setattr(owner, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
    return copied


def read_weights(family: Family, folder: Path) -> dict[str, Tensor]:
    """What `load_weights` writes, whole, in float32 and on the CPU: parameters and buffers by name.

    Of a family with an adapter that is the adapter alone. Raises DareError like `load_family`.
    """
    copied = _hollow(family)
    network, adapter = copied.network, copied.adapter
    for module in [network] if adapter is None else [side for _, x in adapter.layers for side in (x.lora_A, x.lora_B)]:
        module.to_empty(device="cpu")
    load_weights(copied, folder)
    found = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    return {name: tensor.detach() for name, tensor in found.items() if not tensor.is_meta}


def _hollow(family: Family) -> Family:
    """The family without weights, with its adapter if it has one; on the meta device."""
    network = _build(find_family_type(family.config, where="the config of a family in memory"), family.config)
    code = family.code_files
    copied = Family(family.spec, network, family.config, family.generation_config, family.buffer_dtypes, code)
    if family.adapter is not None:
        copied.adapter = Adapter(network, family.adapter.recipe, family.adapter.names, family.adapter.base)
    return copied


def save_family(family: Family, directory: Path, dtype: torch.dtype | None = None) -> None:
    """Write config.json, model.safetensors and, if there are any, generation_config.json and code into `directory`.

    A family with an adapter is saved as its adapter alone, in the format of `peft`.
    Names are the official ones, a tied head is not stored, fields of the config that were not touched are kept.
    Buffers are stored as the checkpoint had them, or in float32. The bytes depend on nothing but the weights, the
    config and `dtype` (None: the family's). Raises DareError if the weights cannot be written.
    """
    if family.adapter is not None:
        write_adapter(family.adapter, directory, dtype)
        return
    stored = dtype or family.dtype
    buffers = dict(family.network.named_buffers())
    tensors = {
        name: tensor.detach().to(device="cpu", dtype=stored).contiguous()
        for name, tensor in family.network.state_dict().items()
        if name not in buffers
    }
    for name, buffer in buffers.items():
        tensors[name] = _stored_buffer(buffer.cpu(), family.buffer_dtypes.get(name, buffer.dtype))
    config = copy.deepcopy(family.config)
    # transformers 5 renamed the field; whichever a checkpoint has is kept.
    config["dtype" if "dtype" in config else "torch_dtype"] = _DTYPE_NAMES[stored]
    path = directory / WEIGHTS_NAME
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        raise DareError("the weights cannot be written", where=str(path), got=str(error)) from None
    write_json(directory / _CONFIG_NAME, config)
    if family.generation_config is not None:
        write_json(directory / _GENERATION_NAME, family.generation_config)
    for name, content in family.code_files.items():
        (directory / name).write_bytes(content)


def create_family(
    name: str,
    *,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    mlp_size: int,
    max_length: int,
    mask_id: int,
    eos_id: int,
    pad_id: int,
    seed: int,
    num_kv_heads: int | None = None,
    block_length: int | None = None,
    tie_embeddings: bool = False,
) -> Family:
    """A new float32 model of family `name` on the CPU, with initial weights that depend on nothing but `seed`.

    Raises DareError for an unknown family or sizes that do not fit together.
    """
    family_type: FamilyType = resolve("families", name, where="family")
    config = family_type.tiny_config(
        ModelSizes(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            mlp_size=mlp_size,
            max_length=max_length,
            mask_id=mask_id,
            eos_id=eos_id,
            pad_id=pad_id,
            block_length=block_length,
            tie_embeddings=tie_embeddings,
        )
    )
    spec = family_type.spec(config, None)
    network = _build(family_type, config).to_empty(device="cpu")
    _initialise(network, Key(seed))
    return Family(spec, network, config)


def find_family_type(config: Config, *, where: str) -> FamilyType:
    """The row of the families table whose checkpoints have this config. Raises DareError if there is none."""
    family_types: list[FamilyType] = [resolve("families", name) for name in FAMILIES]
    for family_type in family_types:
        if family_type.matches(config):
            return family_type
    raise DareError(
        "this checkpoint is of no known family",
        where=where,
        got=f"model_type {config.get('model_type')}, architectures {config.get('architectures')}",
        expected=", ".join(f"{family_type.architecture} ({family_type.name})" for family_type in family_types),
    )


def _describe(folder: Path) -> tuple[FamilyType, FamilySpec, Config, Config | None]:
    """What a checkpoint folder says of itself: family, spec, config.json, generation_config.json (None without)."""
    config = _read_config(folder / _CONFIG_NAME)
    generation_path = folder / _GENERATION_NAME
    generation_config = _read_config(generation_path) if generation_path.is_file() else None
    where = str(folder / _CONFIG_NAME)
    family_type = find_family_type(config, where=where)
    if config.get("quantization_config") is not None:
        raise DareError(
            "the checkpoint is quantised, and quantised weights cannot be trained or run here",
            where=f"{where}, quantization_config",
            got=str(config["quantization_config"])[:200],
            fix="use the checkpoint in bfloat16 or float32 that it was made from",
        )
    try:
        return family_type, family_type.spec(config, generation_config), config, generation_config
    except DareError as error:
        raise error.inside(str(folder)) from None


def _build(family_type: FamilyType, config: Config) -> Network:
    """The network on the meta device: shapes only, so no time, memory or random numbers are spent on it."""
    try:
        with torch.device("meta"):
            return family_type.build(config)
    except (RuntimeError, OverflowError) as error:  # sizes whose product is no size
        raise DareError("no network has the sizes of this config", where="config.json", got=str(error)) from None


def _read_config(path: Path) -> Config:
    config = read_json(path, "model config" if path.name == _CONFIG_NAME else "generation config")
    if not isinstance(config, dict):
        raise DareError("a config is a JSON object", where=str(path), got=type(config).__name__)
    return config


def _check_names(network: Network, shards: Shards) -> None:
    """Every tensor of the network is stored with its shape, and nothing else is stored; or one DareError."""
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    found = shards.shapes
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    misshapen = [
        f"{name} (got {list(found[name])}, expected {list(shape)})"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    problems = [
        f"{len(names)} {kind}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise DareError(
            "the stored tensors are not those that the config describes",
            where=str(shards.folder),
            got="; ".join(problems),
            expected=f"{len(expected)} tensors",
        )


def _stored_dtype(network: Network, shards: Shards) -> torch.dtype:
    """The one dtype of all stored parameters; buffers have their own."""
    buffers = dict(network.named_buffers())
    dtypes = {dtype for name, dtype in shards.dtypes.items() if name not in buffers}
    if len(dtypes) != 1:
        names = ", ".join(sorted(_DTYPE_NAMES[dtype] for dtype in dtypes))
        raise DareError(
            "the weights are stored in several dtypes", where=str(shards.folder), got=names, fix="choose one with dtype"
        )
    (dtype,) = dtypes
    return dtype


def _stored_buffer(buffer: Tensor, dtype: torch.dtype) -> Tensor:
    """In the checkpoint's dtype, unless that would round values which have changed since."""
    converted = buffer.to(dtype)
    return converted if torch.equal(converted.to(buffer.dtype), buffer) else buffer


def _fill(network: Network, shards: Shards) -> None:
    target = network.state_dict()  # shares memory with the parameters
    for name, tensor in shards.tensors():
        target[name].copy_(tensor)


def _initialise(network: Network, key: Key) -> None:
    """Normal weights of standard deviation fan_in ** -0.5; norms at 1, biases and buffers at 0.

    The matrices that write into the residual stream are divided by sqrt(their number), so that its variance does
    not grow with depth (GPT-2). Each parameter has its own stream, named after it.
    """
    num_residual = sum(network.is_residual_output(name) for name, _ in network.named_parameters())
    with torch.no_grad():
        for buffer in network.buffers():
            buffer.zero_()
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1:
                nn.init.constant_(parameter, 0.0 if name.endswith(".bias") else 1.0)
                continue
            std = parameter.shape[-1] ** -0.5
            if network.is_residual_output(name):
                std *= num_residual**-0.5
            generator = torch.Generator().manual_seed(key.fold("parameter", name).python_seed())
            parameter.normal_(0.0, std, generator=generator)
