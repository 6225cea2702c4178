"""Heads, classifiers and shortlists of exits that are not the model's own: named by paths, found once for a model.

A head takes the state as it leaves the layer, ``[B, S, W]`` of a decoder or ``[B, W]`` (the first position) of an
encoder, to logits over the model's vocabulary or classes. A classifier takes the state of the one position that
decides, ``[B, W]``, to a logit ``[B]`` or ``[B, 1]``, whose sigmoid is the confidence (CALM, arXiv 2207.07061).
"""

from __future__ import annotations

import json
import pathlib
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxopt.passes import confidence as measures
from fxopt.passes import own_modules
from fxopt.passes.technique import SettingError, nearest

if TYPE_CHECKING:
    from fxopt.passes.early_exit import EarlyExit

CHILD = "fxopt_exit"
"""Child of the model that holds what files gave, in ``state_dict`` as ``fxopt_exit.head.8.weight`` and the like."""
LISTS = (".json", ".txt", ".safetensors")


@dataclass(frozen=True)
class OwnModules:
    """What the paths of a setting name in one model: modules by the count of their exit, token ids ``[N]`` int64."""

    heads: Mapping[int, nn.Module] = field(default_factory=weakref.WeakValueDictionary)
    classifiers: Mapping[int, nn.Module] = field(default_factory=weakref.WeakValueDictionary)
    tokens: Tensor | None = None


# -- the setting ----------------------------------------------------------------------------------------------------


def head_paths(value: Any, layers: Sequence[int]) -> Any:
    """``head=`` in its one form: a path, or ``((n, path), ...)`` with rising counts. Raises SettingError."""
    if isinstance(value, str) and value:
        return value
    pairs = value.items() if isinstance(value, Mapping) else value
    try:
        found = {int(n): path for n, path in pairs}
    except (TypeError, ValueError):
        found = {}
    if not found or not all(isinstance(path, str) and path for path in found.values()):
        raise SettingError(
            f"EarlyExit(head={value!r}): 'model', the path of a module or of a .safetensors file, or one for each "
            "exit, {8: 'heads.first', 16: 'heads.second'}."
        )
    unknown = sorted(set(found) - set(layers))
    if unknown:
        raise SettingError(f"EarlyExit(head={value!r}): no exit after {unknown} layers; exits are after {layers}.")
    return tuple(sorted(found.items()))


def check_shortlist(setting: EarlyExit) -> None:
    """Raise SettingError for a shortlist that cannot be meant."""
    value = setting.shortlist
    if value is None:
        return
    count = isinstance(value, int) and not isinstance(value, bool) and value >= 2
    if not count and not (isinstance(value, str) and value.endswith(LISTS)):
        raise SettingError(
            f"EarlyExit(shortlist={value!r}): a number of tokens of at least 2, such as 4096, or a file of token ids "
            f"({', '.join(LISTS)}); None scores the whole vocabulary."
        )
    if not setting.reads_logits:
        raise SettingError(f"EarlyExit(confidence={setting.confidence!r}) reads no head; leave shortlist out.")
    if setting.head != "model":
        raise SettingError(
            f"EarlyExit(head={setting.head!r}, shortlist={value!r}): a shortlist shortens the model's head; a head of "
            "its own is as small as it was made. Give one of the two."
        )


def check_confidence(setting: EarlyExit) -> None:
    """Raise SettingError for a confidence that is no name, no path and no function."""
    value = setting.confidence
    if callable(value) or value in measures.NAMES or is_path(value):
        return
    raise SettingError(
        f"EarlyExit(confidence={value!r}): allowed are {', '.join(map(repr, measures.NAMES))}, the dotted path of a "
        f"classifier, a .safetensors file, or a function of the logits.{nearest(str(value), measures.NAMES)}"
    )


def is_path(confidence: Any) -> bool:
    """Whether a confidence names a classifier."""
    return isinstance(confidence, str) and ("." in confidence or "/" in confidence)


# -- in a model -----------------------------------------------------------------------------------------------------


def find(setting: EarlyExit, model: nn.Module, *, whole: bool) -> OwnModules:
    """The modules and the list that a setting names, their widths checked; `whole`: an encoder.

    Raises SettingError for a path that names none, and for a head or classifier of the wrong width.
    """
    config = getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    heads = {}
    if setting.head != "model":
        paths = dict.fromkeys(setting.layers, setting.head) if isinstance(setting.head, str) else dict(setting.head)
        heads = _modules(model, paths, "head")
        results = getattr(config, "num_labels", None) if whole else _vocabulary(model)
        for n, module in heads.items():
            _check_width(module, width, results, f"EarlyExit(head={paths[n]!r})", f"exit after {n} layers")
    classifiers = {}
    if is_path(setting.confidence):
        classifiers = _modules(model, dict.fromkeys(setting.layers, setting.confidence), "confidence")
        for n, module in classifiers.items():
            _check_width(module, width, 1, f"EarlyExit(confidence={setting.confidence!r})", f"exit after {n} layers")
    tokens = None
    if isinstance(setting.shortlist, str):
        tokens = read_tokens(setting.shortlist, _vocabulary(model))
    return OwnModules(weakref.WeakValueDictionary(heads), weakref.WeakValueDictionary(classifiers), tokens)


def _modules(model: nn.Module, paths: Mapping[int, Any], part: str) -> dict[int, nn.Module]:
    found: dict[int, nn.Module] = {}
    for n, path in paths.items():
        setting = f"EarlyExit({part}={path!r})"
        holder = own_modules.holder(model, path, f"{CHILD}.{part}", setting)
        several = own_modules.numbered(holder)
        if several is not None and n not in several:
            raise SettingError(f"{setting} holds modules for exits {sorted(several)}, and none for {n}.")
        found[n] = holder if several is None else several[n]
    return found


def _vocabulary(model: nn.Module) -> int | None:
    get = getattr(model, "get_output_embeddings", None)
    embedding = get() if get is not None else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])


def _check_width(module: nn.Module, width: int | None, results: int | None, setting: str, where: str) -> None:
    if width is None:
        return  # the graph will tell
    try:
        shape = own_modules.output_shape(module, width)
    except Exception as error:
        raise SettingError(
            f"{setting}, {where}: {type(module).__name__} does not take a state of the model's width {width}: "
            f"{str(error).splitlines()[0]}."
        ) from error
    if results is not None and tuple(shape[:2]) + (results,) != tuple(shape):
        raise SettingError(
            f"{setting}, {where}: {type(module).__name__} gives {list(shape)} for a state [1, 1, {width}]; wanted are "
            f"{results} result{'s' * (results != 1)}, [1, 1, {results}]."
        )


def read_tokens(path: str, vocabulary: int | None) -> Tensor:
    """Token ids ``[N]`` (int64, ascending, each once) from a .json list, a .txt file with one a line, or the one
    tensor of a .safetensors file. Raises SettingError for anything else."""
    try:
        ids = _read(path)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SettingError(
            f"EarlyExit(shortlist={path!r}) cannot be read: {type(error).__name__}: {error}. It is a JSON list of "
            "token ids, a text file with one id a line, or a .safetensors file with one tensor of them."
        ) from error
    tokens = torch.tensor(sorted(set(ids)), dtype=torch.int64)
    if len(tokens) < 2 or int(tokens[0]) < 0 or (vocabulary is not None and int(tokens[-1]) >= vocabulary):
        raise SettingError(
            f"EarlyExit(shortlist={path!r}) holds {len(tokens)} token ids"
            f"{f', {int(tokens[0])} to {int(tokens[-1])}' if len(tokens) else ''}; wanted are at least two of 0 to "
            f"{'the vocabulary' if vocabulary is None else vocabulary - 1}."
        )
    return tokens


def _read(path: str) -> list[int]:
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        (tensor,) = load_file(path).values()
        return [int(i) for i in tensor.flatten().tolist()]
    text = pathlib.Path(path).read_text(encoding="utf-8")
    values = json.loads(text) if path.endswith(".json") else text.split()
    if not isinstance(values, list) or any(isinstance(v, (bool, float)) for v in values):
        raise ValueError("no list of whole numbers")
    return [int(v) for v in values]
