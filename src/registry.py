"""Named functions that configs may ask for."""

import difflib
import importlib
import math
import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le

from unlora.errors import InputError

# of settings, where their types are declared: beta: Positive = 0.1
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]
UpToOne = Annotated[float, Ge(0), Le(1)]
Share = Annotated[float, Gt(0), Le(1)]
Index = Annotated[int, Ge(0)]
AtLeastOne = Annotated[int, Ge(1)]

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """A read-only mapping from the name in a config to the object it stands for.

    Args:
        kind: what the entries are, in the words of an error message ("objective").
        package: every module of this package is imported on first use, so adding an
            entry means adding a file and nothing else.
    """

    def __init__(self, kind: str, package: str):
        self.kind, self.package = kind, package
        self._entries: dict[str, Entry] = {}
        self._is_complete = False

    def add(self, name: str, entry: Entry) -> None:
        if name in self._entries:
            raise ValueError(
                f"{self.kind} {name!r} is already defined; give the new one another name"
            )
        self._entries[name] = entry

    def __getitem__(self, name: str) -> Entry:
        if name not in self:
            raise InputError(unknown(self.kind, name, self._entries))
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        if name not in self._entries:
            self._import_all()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(sorted(self._entries))

    def _import_all(self) -> None:
        if self._is_complete:
            return
        for module in pkgutil.iter_modules(importlib.import_module(self.package).__path__):
            try:
                importlib.import_module(f"{self.package}.{module.name}")
            except ModuleNotFoundError as error:
                if not (error.name or "").startswith("unlora."):
                    raise
                raise InputError(
                    f"{self.package}.{module.name} imports {error.name}, which does not exist (any "
                    "more). docs/architecture.md says where things are; the types of an objective "
                    "are in unlora.forward.outputs."
                ) from error
        self._is_complete = True


def unknown(kind: str, name: object, known: Iterable[str]) -> str:
    """The message for a name nobody defined: what was asked, the nearest, and all there are."""
    known = sorted(map(str, known))
    folded = {entry.lower(): entry for entry in known}
    near = difflib.get_close_matches(str(name).lower(), folded, n=1)
    hint = f" Did you mean {folded[near[0]]!r}?" if near else ""
    return f"Unknown {kind} {name!r}.{hint} Known: {', '.join(known) or 'none'}."


def check_settings(
    owner: str,
    defaults: Mapping[str, object],
    settings: Mapping[str, object],
    declared: Any = None,
) -> dict[str, object]:
    """The settings that a config gives to something with these defaults.

    Args:
        declared: the function or class whose annotations say in which range a setting may be, or
            which few words.

    Raises:
        InputError: ``owner`` has no setting of that name, or it wants another value.
    """
    hints = get_type_hints(declared, include_extras=True) if declared and settings else {}
    for name, value in settings.items():
        if name not in defaults:
            raise InputError(unknown(f"parameter of {owner}", name, defaults))
        default, number = defaults[name], isinstance(value, (int, float))
        if get_origin(hints.get(name)) is Literal and value not in (words := get_args(hints[name])):
            raise InputError(unknown(f"{name} of {owner}", value, words))
        if isinstance(default, bool):
            if not isinstance(value, bool):
                raise InputError(f"{name} of {owner} is {value!r}; it must be true or false.")
        elif isinstance(default, float) and (not number or isinstance(value, bool)):
            raise InputError(f"{name} of {owner} is {value!r}; it must be a number.")
        elif isinstance(default, int) and type(value) is not int:
            raise InputError(f"{name} of {owner} is {value!r}; it must be a whole number.")
        elif isinstance(default, tuple) and not _is_list_like(value, default):
            raise InputError(
                f"{name} of {owner} is {value!r}; it must be a list such as {[*default]}."
            )
        allowed = getattr(hints.get(name), "__metadata__", ())
        if number and (wanted := out_of_range(value, allowed)):
            raise InputError(f"{name} of {owner} is {value!r}; it must be {wanted}.")
    return dict(settings)


def _is_list_like(value: object, default: tuple[Any, ...]) -> bool:
    """Whether it is a list of what the default holds; whole numbers are numbers."""
    kinds = {float: (int, float)}.get(type(default[0]), (type(default[0]),))
    return isinstance(value, (list, tuple)) and all(type(item) in kinds for item in value)


def out_of_range(value: Any, allowed: Iterable[Any] = ()) -> str | None:
    """What a number must be, in words, if it is not finite or breaks one of these bounds."""
    bounds = [bound for bound in allowed if isinstance(bound, (Gt, Ge, Le))]
    words = {Gt: "above {}", Ge: "{} or more", Le: "{} or less"}
    holds = {
        Gt: lambda bound: value > bound.gt,
        Ge: lambda bound: value >= bound.ge,
        Le: lambda bound: value <= bound.le,
    }
    if math.isfinite(value) and all(holds[type(bound)](bound) for bound in bounds):
        return None
    limit = [words[type(b)].format(getattr(b, type(b).__name__.lower())) for b in bounds]
    return " and ".join(limit) or "a finite number"
