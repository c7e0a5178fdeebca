"""Settings in words: what a key allows, which key was meant, and what is wrong with a value.

docs/config-reference.md and the errors of `load_config` take their words from here.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from gdrt_ds.config.base import PartName
from gdrt_ds.config.sections import RunConfig
from gdrt_ds.errors import UserError, similarity

COMMAND_LINE = "command line"
REFERENCE = "docs/config-reference.md lists every key with its meaning, its allowed values and its default"
BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", type(None): "empty"}
# What pydantic says of the other members of a union, e.g. that a list of numbers is no text.
OTHER_KINDS = {
    "string_type",
    "list_type",
    "bool_type",
    "literal_error",
    "int_type",
    "float_type",
    "none_required",
}

NAMES_ELSEWHERE = {
    "attn_implementation": "model.attention",
    "batch_size": "train.global_batch",
    "bf16": "model.dtype",
    "cutoff_len": "prompt.max_length",
    "dataset": "data.path",
    "eval_steps": "train.eval_every",
    "fp16": "model.dtype",
    "gradient_accumulation_steps": "train.micro_batch",
    "learning_rate": "train.lr",
    "load_in_4bit": "model.quantization",
    "logging_steps": "train.log_every",
    "lora_alpha": "model.lora.alpha",
    "lora_dropout": "model.lora.dropout",
    "lora_r": "model.lora.r",
    "max_grad_norm": "train.grad_clip",
    "max_seq_length": "prompt.max_length",
    "model_name_or_path": "model.path",
    "num_epochs": "train.epochs",
    "num_groups": "groups.num",
    "num_train_epochs": "train.epochs",
    "output_dir": "run.dir",
    "per_device_train_batch_size": "train.micro_batch",
    "report_to": "log.wandb",
    "save_steps": "train.save_every",
    "save_total_limit": "train.keep_checkpoints",
    "target_modules": "model.lora.targets",
    "temperature": "dro.tau",
    "train_batch_size": "train.global_batch",
    "warmup_ratio": "train.warmup_steps",
}
"""Names in transformers, PEFT and other trainers -> the key that means it here."""


# -- keys
def fields_of(model: type[BaseModel] = RunConfig, prefix: str = "") -> dict[str, FieldInfo]:
    """Every dotted key of the tree, sections too, e.g. `dro` and `dro.tau`."""
    found = {}
    for name, field in model.model_fields.items():
        found[prefix + name] = field
        if is_section(field):
            found.update(fields_of(typing.cast("type[BaseModel]", field.annotation), f"{prefix}{name}."))
    return found


def is_section(field: FieldInfo) -> bool:
    """Whether the field holds settings of its own."""
    return isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)


def nearest_key(key: str) -> str | None:
    """The known key that was probably meant.

    A name of another trainer means the key that stands for it here. A key that ends as a known one does
    (`seed`, `train.tau`) means that one. Otherwise the whole name and its last part are compared, and the
    more similar one wins.
    """
    known = list(fields_of())
    leaf_of = {name: name.rpartition(".")[2] for name in known}
    leaf = key.rpartition(".")[2]
    if leaf in NAMES_ELSEWHERE:
        return NAMES_ELSEWHERE[leaf]
    same_leaf = [name for name in known if leaf_of[name] == leaf]
    if same_leaf:
        return max(same_leaf, key=lambda name: similarity(key, name))
    candidates = [(similarity(key, name), name) for name in known]
    candidates += [(similarity(leaf, leaf_of[name]), name) for name in known]
    best, name = max(candidates, key=lambda pair: pair[0])
    return name if best >= 0.6 else None


# -- what a key allows
def kind_of(annotation: Any) -> str:
    """A type annotation in words, e.g. `whole number, or empty`."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin is typing.Annotated:
        bounds = [bound for item in arguments[1:] for bound in _bounds(getattr(item, "metadata", [item]))]
        return " ".join([kind_of(arguments[0]), *_joined(bounds)])
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is list:
        return f"list of {kind_of(arguments[0]).replace('number', 'numbers', 1)}"
    if origin is tuple:
        kinds = {kind_of(part).replace("number", "numbers", 1) for part in arguments}
        return f"list of {len(arguments)} {' or '.join(sorted(kinds))}"
    if origin is dict:
        return "mapping"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(kind_of(part) for part in arguments)
    return WORDS.get(annotation, getattr(annotation, "__name__", str(annotation)))


def allowed_values(field: FieldInfo) -> str:
    """The field's type and range in words."""
    for constraint in field.metadata:
        if isinstance(constraint, PartName):
            return ", ".join(f"`{name}`" for name in constraint.known())
    return "; ".join([kind_of(field.annotation), *_bounds(field.metadata)])


def _bounds(metadata: Iterable[Any]) -> list[str]:
    found = []
    for constraint in metadata:
        for name, word in BOUNDS.items():
            limit = getattr(constraint, name, None)
            if limit is not None:
                found.append(f"{word} {limit:,}")
    return found


def _joined(bounds: list[str]) -> list[str]:
    return [" and ".join(bounds)] if bounds else []


def example_of(key: str, field: FieldInfo) -> str | None:
    """`key=value` as it is given on the command line, or None where nothing is worth showing."""
    value = field.get_default(call_default_factory=True)
    if field.examples:
        value = field.examples[0]
    if value in (None, PydanticUndefined, {}):
        return None
    return f"{key}={written(value)}"


def changed_settings(config: RunConfig) -> list[str]:
    """`key=value` of every key that differs from its default, in the order of the sections."""
    found = []
    for key, field in fields_of().items():
        if is_section(field):
            continue
        value: Any = config
        for part in key.split("."):
            value = getattr(value, part)
        if value != field.get_default(call_default_factory=True):
            found.append(f"{key}={written(value)}")
    return found


def written(value: Any) -> str:
    """A value as it is written in YAML."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(written(item) for item in value)}]"
    return str(value)


# -- what is wrong
def refuse(errors: list[Any], tree: Mapping[str, Any], file: str, overridden: Collection[str]) -> UserError:
    """The error that tells every mistake at once.

    Args:
        errors: of pydantic's ValidationError.
        tree: the settings as they were given.
        file: where the settings that no override gave come from.
        overridden: keys that the command line gave.
    """
    by_key: dict[str, list[Any]] = {}
    for error in errors:
        by_key.setdefault(_key_of(error), []).append(error)
    problems, fixes = [], []
    for key, found in by_key.items():
        message = _message(found)
        origin = _origin(key, message, file, overridden)
        if found[0]["type"] == "extra_forbidden":
            key = _whole_name(tree, key)
            problems.append(f"{origin}: unknown key `{key}`{_meant(key)}")
            fixes.append(_keys_beside(key))
        elif key:
            problems.append(f"{origin}: {key} = {_given(tree, key)!r}: {message}")
            fixes.append(_fix(key))
        else:
            problems.append(f"{origin}: {message}")
            fixes.append(REFERENCE)
    return UserError("; ".join(problems), "; ".join(dict.fromkeys(fixes)))


def _meant(key: str) -> str:
    """What an unknown key was probably meant to be, behind its name in a message."""
    if key in fields_of():  # a file has sections; only overrides have dots
        section, _, name = key.rpartition(".")
        return f" with a dot; in a file write `{name}` beneath `{section}:`"
    hint = nearest_key(key)
    return f"; did you mean `{hint}`?" if hint else ""


def _keys_beside(key: str) -> str:
    """What the section of an unknown key holds; the sections, where there is no such section."""
    parent = key.rpartition(".")[0]
    known = list(fields_of())
    while parent and parent not in known:
        parent = parent.rpartition(".")[0]
    beside = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    return f"{parent or 'the first level'} has {', '.join(beside)}; {REFERENCE}"


def _key_of(error: Mapping[str, Any]) -> str:
    """The dotted key of an error: pydantic adds places in lists and members of unions behind it."""
    parts = [str(part) for part in error["loc"]]
    if error["type"] == "extra_forbidden":
        return ".".join(parts)
    known = fields_of()
    while parts and ".".join(parts) not in known:
        parts.pop()
    return ".".join(parts)


def _message(errors: list[Any]) -> str:
    """The messages of one key, without those about other members of a union where one member came closer."""
    close = [error for error in errors if error["type"] not in OTHER_KINDS] or errors
    texts = [_in_our_words(error["msg"]) for error in close]
    return " or ".join(dict.fromkeys(texts))


def _in_our_words(text: str) -> str:
    return text.removeprefix("Value error, ").replace("Input should be", "it must be")


def _origin(key: str, message: str, file: str, overridden: Collection[str]) -> str:
    """Who gave the value: the command line, or the file.

    A combination has no key; it is the command line's where its message names a key that was overridden.
    """
    for given in overridden:
        if key and (key == given or key.startswith(f"{given}.") or given.startswith(f"{key}.")):
            return COMMAND_LINE
        if not key and given in message:
            return COMMAND_LINE
    return file


def _given(tree: Mapping[str, Any], key: str) -> Any:
    value: Any = tree
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _whole_name(tree: Mapping[str, Any], key: str) -> str:
    """`optimizer.lr` where `optimizer` alone is unknown: what was written says more than its first part."""
    value = _given(tree, key)
    while isinstance(value, Mapping) and len(value) == 1:
        name, value = next(iter(value.items()))
        key = f"{key}.{name}"
    return key


def _fix(key: str) -> str:
    field = fields_of()[key]
    if is_section(field):
        return f"{key} is a section of settings; {REFERENCE}"
    example = example_of(key, field)
    return f"{key} takes: {allowed_values(field)}" + (f" (e.g. {example})" if example else "")
