"""A recipe: what to apply where, with calibrated data, in one file a user can keep and share.

The file is a safetensors container; its header carries the JSON part, its tensors the calibrated data. Nothing is
read with pickle. A recipe knows the model it was made for by a fingerprint of its structure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fxopt.codegen.files import whole_file
from fxopt.passes.technique import SettingError, Technique, nearest

SCHEMA_VERSION = 1


@dataclass
class Recipe:
    """Techniques (whole model, or by module path), calibrated tensors, and the model's fingerprint."""

    techniques: tuple[Technique, ...] = ()
    paths: dict[str, Technique] = field(default_factory=dict)
    data: dict[str, torch.Tensor] = field(default_factory=dict)
    fingerprint: str = ""
    notes: dict[str, Any] = field(default_factory=dict)

    def settings(self) -> list[Technique | Mapping[str, Technique]]:
        """What ``fxopt.compile`` is given."""
        found: list[Technique | Mapping[str, Technique]] = list(self.techniques)
        if self.paths:
            found.append(dict(self.paths))
        return found

    def check(self, model: nn.Module) -> None:
        """Raise SettingError when the recipe was made for a model of another structure."""
        found = fingerprint(model)
        if self.fingerprint and found != self.fingerprint:
            raise SettingError(
                f"the recipe was made for another model: its fingerprint is {self.fingerprint}, this "
                f"{type(model).__name__} has {found}. Make one with fxopt.tune(model, data)."
            )

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write the recipe to one file; whole or not at all."""
        save_file = _safetensors().save_file
        header = {
            "schema_version": SCHEMA_VERSION,
            "fingerprint": self.fingerprint,
            "techniques": [t.to_dict() for t in self.techniques],
            "paths": {p: t.to_dict() for p, t in self.paths.items()},
            "notes": self.notes,
        }
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.data.items()}
        with whole_file(path) as part:
            save_file(tensors, part, metadata={"fxopt_recipe": json.dumps(header, sort_keys=True)})
        return pathlib.Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe; raises SettingError for a foreign, damaged or newer file."""
        if not pathlib.Path(path).is_file():
            raise SettingError(f"there is no recipe {os.fspath(path)!r}.")
        try:
            with _safetensors().safe_open(os.fspath(path), "pt") as stream:
                header = json.loads((stream.metadata() or {})["fxopt_recipe"])
                data = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        except Exception as error:
            raise SettingError(f"{os.fspath(path)!r} is no fxopt recipe: {type(error).__name__}: {error}") from error
        if header.get("schema_version") != SCHEMA_VERSION:
            raise SettingError(
                f"the recipe has schema {header.get('schema_version')}; this fxopt reads {SCHEMA_VERSION}."
            )
        return cls(
            tuple(_technique(t) for t in header["techniques"]),
            {p: _technique(t) for p, t in header["paths"].items()},
            data, header["fingerprint"], header["notes"],
        )  # fmt: skip


def fingerprint(model: nn.Module) -> str:
    """Hash of the names, shapes and dtypes of a model's parameters: its structure, not its weights."""
    rows = [f"{name}:{tuple(p.shape)}" for name, p in model.named_parameters() if not name.startswith("fxopt_")]
    return hashlib.sha256("\n".join([type(model).__name__, *rows]).encode()).hexdigest()[:16]


def _technique(data: Mapping[str, Any]) -> Technique:
    values = dict(data)
    name = values.pop("technique", None)
    if name not in Technique.registry:
        raise SettingError(
            f"the recipe names a technique {name!r} that is not here.{nearest(name, Technique.registry)}"
        )
    cls = Technique.registry[name]
    known = {f.name for f in dataclasses.fields(cls)}
    unknown = set(values) - known
    if unknown:
        raise SettingError(f"the recipe gives {cls.__name__} unknown fields: {', '.join(sorted(unknown))}.")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError("recipes are safetensors files: pip install 'fxopt[hf]'") from error

    class _Both:
        save_file = staticmethod(safetensors.torch.save_file)
        safe_open = staticmethod(safetensors.safe_open)

    return _Both
