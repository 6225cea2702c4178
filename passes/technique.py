"""The base of every technique, and the mechanism by which a technique decorates a class or an instance.

A decoration has to survive whatever happens to a model between decoration and compilation: Hugging Face's
``generate``, ``copy.deepcopy``, pickle, ``state_dict``, ``save_pretrained``. So the module itself carries the
setting, in a plain dict beside its parameters, and ``forward`` reads that dict inside
``torch.fx.traceback.annotate``. Dynamo then writes the entry on every node traced inside the module *and* guards
the dict, so that a changed setting recompiles the graphs it touches, and only those. In eager the wrapper does
nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import inspect
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

import torch
from torch import nn

from fxopt.codegen import compat

if TYPE_CHECKING:
    from fxopt.passes.context import PassContext

Target = TypeVar("Target")

INSTANCE_SETTINGS = "_fxopt_settings"
"""Attribute of a decorated instance: ``{"fxopt.instance.<name>": digest}``, guarded by Dynamo."""
CLASS_SETTINGS = "_fxopt_class_settings"
"""Attribute of a decorated class: ``{"fxopt.class.<name>": digest}``."""
INSTANCE_KEY = "fxopt.instance."
CLASS_KEY = "fxopt.class."


class SettingError(ValueError):
    """A setting that cannot be meant: misspelt, of the wrong type, or impossible. Always raised, never swallowed."""


class PassError(RuntimeError):
    """A pass could not do its work, or left a graph that does not hold together."""


def nearest(name: str, allowed: Any) -> str:
    """`` Did you mean 'x'?`` for a misspelt ``name``, or an empty string when nothing is close."""
    close = difflib.get_close_matches(str(name), [str(a) for a in allowed], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


@dataclasses.dataclass(frozen=True)
class Technique:
    """Something that can be done to a model, and what it means.

    A subclass sets ``name`` (its key in options and reports), ``exact`` (same function up to rounding) and ``level``
    (``"torch"``: Dynamo's graph, before ``compile_fx``; ``"aten"``: the post-grad graph, inside it), and defines

    - ``reference(model) -> model``: the meaning, in plain PyTorch, with no FX and no Triton in it;
    - ``rewrite(graph, context)``: the same on a ``torch.fx.Graph``, in place. Only nodes for which
      ``context.covers(node)`` holds belong to the modules this setting was given for. Tell every place you looked
      at: ``context.applied``, ``context.missed``, ``context.blocked``.

    Fields of a subclass (make it a frozen dataclass) are its setting; validate them in ``__post_init__`` and raise
    :class:`SettingError`. Calling an instance decorates a module class or one module::

        @LayerSkip(skip=(3,))
        class Decoder(nn.Module): ...

        LayerSkip(skip=(3,))(model)          # decorates this instance and returns it
    """

    name: ClassVar[str] = ""
    exact: ClassVar[bool] = False
    level: ClassVar[str] = "torch"
    on_by_default: ClassVar[bool] = False
    """Runs without being asked for. Only exact techniques may."""
    enters_branches: ClassVar[bool] = False
    """Each branch of a conditional (``torch.cond``) that the graph holds is rewritten too, as a graph of its own. For
    what replaces a place by another form and needs nothing of the graph around it: weights and caches are inputs of a
    branch like any other, its results are not the model's, and it may not run."""

    @property
    def late(self) -> bool:
        """Whether this setting runs at the pass's later place in the order, where it has one."""
        return False

    registry: ClassVar[dict[str, type[Technique]]] = {}
    _known: ClassVar[weakref.WeakValueDictionary[str, Technique]] = weakref.WeakValueDictionary()

    def __new__(cls, *_: Any, **given: Any) -> Self:
        if "__dataclass_fields__" in vars(cls):  # else its own __init__ says what it takes
            cls.check_fields(given)
        return super().__new__(cls)

    @classmethod
    def check_fields(cls, given: Iterable[str], place: str = "") -> None:
        """Raise :class:`SettingError` for a name that is no field; `place` says where it stood."""
        fields = [field.name for field in dataclasses.fields(cls) if field.init]
        for name in given:
            if name not in fields:
                raise SettingError(
                    f"{place}{cls.__name__} has no field {name!r}; it has {', '.join(fields) or 'none'}."
                    f"{nearest(name, fields)}"
                )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not cls.name:
            return
        if cls.level not in ("torch", "aten"):
            raise SettingError(f"{cls.__name__}.level is {cls.level!r}; allowed are 'torch' and 'aten'.")
        earlier = Technique.registry.get(cls.name)
        if earlier is not None and earlier.__module__ != cls.__module__ and earlier.__module__.startswith("fxopt."):
            raise SettingError(
                f"A technique named {cls.name!r} already exists ({earlier.__module__}.{earlier.__qualname__}); "
                f"give {cls.__qualname__} another name."
            )
        Technique.registry[cls.name] = cls

    # -- meaning ------------------------------------------------------------------------------------------------

    def reference(self, model: nn.Module) -> nn.Module:
        """The model that defines what the rewrite computes, in eager PyTorch. Exact techniques: the model itself."""
        if type(self).exact:
            return model
        raise TypeError(
            f"{type(self).__name__} is approximate and defines no reference(model); an approximate technique has to "
            "say in plain PyTorch what it computes."
        )

    def rewrite(self, graph: torch.fx.Graph, context: PassContext) -> None:
        """Apply the technique to ``graph`` in place."""
        raise TypeError(f"{type(self).__name__} defines no rewrite(graph, context).")

    def check(self, model: nn.Module) -> Technique:
        """Validate against a model before anything is compiled; returns self, or a copy with resolved values."""
        return self

    # -- identity -----------------------------------------------------------------------------------------------

    @property
    def digest(self) -> str:
        """Stable name of this setting across processes: hash of the class and its field values."""
        fields = [(f.name, _stable(getattr(self, f.name))) for f in dataclasses.fields(self)]
        text = f"{type(self).__module__}.{type(self).__qualname__}{fields}"
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        Technique._known[digest] = self
        return digest

    @staticmethod
    def from_digest(digest: str) -> Technique | None:
        """The technique of this process with that digest, if some module still carries it."""
        return Technique._known.get(digest)

    def to_dict(self) -> dict[str, Any]:
        """The setting as plain data: ``{"technique": name, field: value, ...}``."""
        return {"technique": self.name, **{f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}}

    def __str__(self) -> str:
        given = [
            f"{f.name}={_plain(getattr(self, f.name))!r}"
            for f in dataclasses.fields(self)
            if f.default is dataclasses.MISSING or getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(given)})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Technique:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return _rebuild, (type(self), values)

    # -- decoration ---------------------------------------------------------------------------------------------

    def __call__(self, target: Target) -> Target:
        """Decorate a module class or a module; returns the same object. Decorating again replaces the setting."""
        if inspect.isclass(target) and issubclass(target, nn.Module):
            self.prepare_class(target)
            _decorate_class(target, self)
        elif isinstance(target, nn.Module):
            self.prepare(target)
            _decorate_instance(target, self)
        else:
            raise TypeError(
                f"{type(self).__name__}(...) decorates an nn.Module class or one nn.Module, and was given "
                f"{type(target).__name__}. To hand it to a function, write fxopt.compile(model, {self})."
            )
        return target

    def prepare(self, module: nn.Module) -> None:
        """Hook before an instance is decorated, or compiled with this technique for the whole of it.

        Techniques that add parameters add them here; called again with the same setting it changes nothing.
        """

    def called(self, model: nn.Module, compiled: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Called on the host in place of a model that ``fxopt.compile`` compiled: ``compiled`` enters the graphs.

        For what has to be done to the arguments of a call and would break a graph, such as making room in a cache.
        """
        return compiled(*args, **kwargs)

    def prepare_class(self, cls: type[nn.Module]) -> None:
        """Hook before a class is decorated."""


def _rebuild(cls: type[Technique], values: dict[str, Any]) -> Technique:
    technique = cls(**values)
    _ = technique.digest  # makes it known in the process that unpickled it
    return technique


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return sorted((str(k), _stable(v)) for k, v in value.items())
    if isinstance(value, (tuple, list)):
        return [_stable(v) for v in value]
    if inspect.isfunction(value):
        body = hashlib.sha256(value.__code__.co_code + repr(value.__code__.co_names).encode()).hexdigest()[:12]
        return f"{value.__module__}.{value.__qualname__}:{body}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [
            type(value).__qualname__,
            [(f.name, _stable(getattr(value, f.name))) for f in dataclasses.fields(value)],
        ]
    return repr(value)


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value] if isinstance(value, list) else tuple(_plain(v) for v in value)
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return getattr(value, "__qualname__", None) or repr(value)


# -- the wrapper ----------------------------------------------------------------------------------------------------


class Decorated:
    """What decorations a module carries: kept strongly on the module, found weakly by the backend."""

    _instances: ClassVar[weakref.WeakValueDictionary[int, nn.Module]] = weakref.WeakValueDictionary()

    @staticmethod
    def techniques(module: nn.Module) -> dict[str, tuple[Technique, str]]:
        """``{name: (technique, "instance" | "class")}`` for a module, the instance's own setting winning."""
        found: dict[str, tuple[Technique, str]] = {}
        for technique in getattr(type(module), CLASS_SETTINGS + "_kept", {}).values():
            found[technique.name] = (technique, "class")
        for technique in module.__dict__.get(INSTANCE_SETTINGS + "_kept", {}).values():
            found[technique.name] = (technique, "instance")
        return found

    @staticmethod
    def holders(name: str) -> dict[str, Technique]:
        """``{str(id(module)): technique}`` for every module inside a living instance decorated with technique `name`.

        For graphs that a graph break cut off from their annotation, and from the decorated module itself.
        """
        found: dict[str, Technique] = {}
        for decorated in sorted(Decorated._instances.values(), key=lambda m: -sum(1 for _ in m.modules())):
            technique, kind = Decorated.techniques(decorated).get(name, (None, ""))
            if technique is not None and kind == "instance":
                found.update((str(id(module)), technique) for module in decorated.modules())
        return found

    @staticmethod
    def refresh(model: nn.Module) -> None:
        """Make the decorations below ``model`` known in this process again (after deepcopy or unpickling)."""
        for module in model.modules():
            if INSTANCE_SETTINGS in module.__dict__:
                Decorated._instances[id(module)] = module
                for technique, _ in Decorated.techniques(module).values():
                    _ = technique.digest


def _decorate_instance(module: nn.Module, technique: Technique) -> None:
    kept = dict(module.__dict__.get(INSTANCE_SETTINGS + "_kept", {}))
    kept[technique.name] = technique
    settings = {INSTANCE_KEY + t.name: t.digest for t in kept.values()}
    # object.__setattr__: nn.Module's own would look for parameters in the values.
    object.__setattr__(module, INSTANCE_SETTINGS + "_kept", kept)
    object.__setattr__(module, INSTANCE_SETTINGS, settings)
    Decorated._instances[id(module)] = module
    own = module.__dict__.get("forward")
    if isinstance(own, functools.partial) and own.func is _instance_forward:
        return
    # A partial of a module-level function: unlike a bound method of a local function it survives pickle, and
    # deepcopy binds it to the copy.
    wrapped = functools.partial(_instance_forward, module, own)
    wrapped.__signature__ = _bare_signature(own or module.forward)  # type: ignore[attr-defined]
    object.__setattr__(module, "forward", wrapped)


def _instance_forward(module: nn.Module, own: Any, /, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        with compat.annotate(module.__dict__[INSTANCE_SETTINGS]):
            return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)
    return type(module).forward(module, *args, **kwargs) if own is None else own(*args, **kwargs)


def _bare_signature(function: Any) -> inspect.Signature:
    # Hugging Face reads parameter names from forward's signature; annotations are dropped because they may not pickle.
    signature = inspect.signature(function)
    plain = (bool, int, float, str, type(None))
    parameters = [
        p.replace(
            annotation=inspect.Parameter.empty,
            default=p.default if p.default is inspect.Parameter.empty or isinstance(p.default, plain) else None,
        )
        for p in signature.parameters.values()
    ]
    return inspect.Signature(parameters)


def _decorate_class(cls: type[nn.Module], technique: Technique) -> None:
    kept = dict(cls.__dict__.get(CLASS_SETTINGS + "_kept", {}))
    kept[technique.name] = technique
    setattr(cls, CLASS_SETTINGS + "_kept", kept)
    setattr(cls, CLASS_SETTINGS, {CLASS_KEY + t.name: t.digest for t in kept.values()})
    original = cls.forward
    if getattr(cls.__dict__.get("forward"), "_fxopt_wraps", None) is not None:
        return

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            with compat.annotate(getattr(cls, CLASS_SETTINGS)):
                return original(self, *args, **kwargs)
        return original(self, *args, **kwargs)

    forward._fxopt_wraps = original  # type: ignore[attr-defined]
    cls.forward = forward  # type: ignore[method-assign]
