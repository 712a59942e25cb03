"""Every key of the configuration with its type, default and meaning, from the models themselves."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from ..errors import UsageError
from ..schema import Settings, field_texts
from .config import Config

_ROLE = re.compile(r":[a-z]+:`[~.]*([^`]+)`")


@dataclass(frozen=True)
class Key:
    """A key of the configuration.

    Attributes:
        name: the dotted key.
        type: the values that it takes, in words.
        default: its default as YAML, or "required".
        meaning: what it sets, in one line.
        kind: the kind of the section that it belongs to; None if the section has one form only.
    """

    name: str
    type: str
    default: str
    meaning: str
    kind: str | None = None


def all_keys() -> list[Key]:
    """Return every key in the order of the models; a section itself is left out, unless it can be ``null``."""
    schema = Config.model_json_schema()
    models = schema["$defs"]

    def keys(name: str, place: str) -> Iterator[Key]:
        described = field_texts(model_classes()[name])
        kind = kind_of(definition(schema, name))
        for key, value in definition(schema, name)["properties"].items():
            dotted = f"{place}.{key}" if place else key
            inner = references(value)
            if key == "kind":
                continue
            if inner and any(kind_of(models[reference]) for reference in inner):
                kinds = [kind_of(models[reference]) or reference for reference in inner]
                text = described.get(key, "")
                yield Key(f"{dotted}.kind", " or ".join(kinds), default_kind(value), _plain(text), kind)
            elif not inner or described.get(key) or {"type": "null"} in value.get("anyOf", ()):
                required = key in definition(schema, name).get("required", ())
                default = "required" if required else default_text(value, models)
                text = described.get(key) or (model_classes()[inner[0]].__doc__ or "").partition("\n")[0]
                yield Key(dotted, type_text(value, models), default or "its defaults", _plain(text), kind)
            for reference in inner:
                yield from keys(reference, dotted)

    return list(keys("Config", ""))


def find_keys(pattern: str) -> list[Key]:
    """Return the keys that a pattern selects: those that contain it or, if it has ``*`` or ``?``, that match it.

    Raises:
        UsageError: if there is none; the message names the nearest key.
    """
    known = all_keys()
    if any(mark in pattern for mark in "*?["):
        found = [key for key in known if fnmatch.fnmatchcase(key.name, pattern)]
    else:
        found = [key for key in known if pattern in key.name]
    if not found:
        names = sorted({key.name for key in known})
        # The last part of a key is what one remembers.
        near = difflib.get_close_matches(pattern, names, n=1) or [
            name
            for last in difflib.get_close_matches(pattern, {name.rpartition(".")[2] for name in names}, n=1)
            for name in names
            if name.endswith(f".{last}") or name == last
        ]
        raise UsageError(f"--keys: no key matches {pattern!r}" + (f"; did you mean {near[0]}?" if near else ""))
    return found


# -- the models, as pydantic's JSON schema shows them ------------------------------------------------------------------


def definition(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of a model by its name."""
    found: dict[str, Any] = schema if name == "Config" else schema["$defs"][name]
    return found


@cache
def model_classes() -> dict[str, type[Settings]]:
    """Return the package's models by name."""

    def below(base: type[Settings]) -> dict[str, type[Settings]]:
        found = {base.__name__: base}
        for model in base.__subclasses__():
            if model.__module__.startswith("scan_fast."):
                found |= below(model)
        return found

    return below(Settings)


def references(value: Any) -> list[str]:
    """Return the names of the models that a key may hold."""
    found: list[str] = []
    if isinstance(value, dict):
        if "$ref" in value:
            found.append(value["$ref"].rpartition("/")[2])
        for key in ("anyOf", "oneOf", "allOf"):
            found += [name for part in value.get(key, ()) for name in references(part)]
    return found


def kind_of(schema: dict[str, Any]) -> str | None:
    """Return the ``kind`` of a model's schema, None if it has none."""
    return schema["properties"].get("kind", {}).get("const")


def default_kind(value: dict[str, Any]) -> str:
    """Return the default ``kind`` of a section that has kinds."""
    default = value.get("default")
    return str(default["kind"]) if isinstance(default, dict) else "null"


def type_text(
    value: dict[str, Any],
    models: dict[str, Any],
    section: Callable[[str, str], str] = lambda text, _: text,
    code: Callable[[str], str] = str,
) -> str:
    """Return a key's type in words.

    Args:
        value: the key's schema.
        models: the schemas of all models, by name.
        section: marks the name of a section (a text, and the name of its model), such as with a link.
        code: marks a value.
    """

    def words(value: dict[str, Any]) -> str:
        options = value.get("anyOf") or value.get("oneOf")
        if options:
            if "discriminator" in value:
                return " or ".join(section(kind_of(models[name]) or name, name) for name in references(value))
            return " or ".join(map(words, options))
        if "$ref" in value:
            name = value["$ref"].rpartition("/")[2]
            return section(kind_of(models[name]) or "section", name)
        if "enum" in value:
            return " or ".join(code(yaml_text(option)) for option in value["enum"])
        if "const" in value:
            return code(yaml_text(value["const"]))
        if value.get("type") == "array":
            if "prefixItems" in value:
                return f"[{', '.join(map(words, value['prefixItems']))}]"
            return f"list of {words(value['items'])}"
        names = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": code("null")}
        name = "path" if value.get("format") == "path" else names[value["type"]]
        signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
        limits = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
        return f"{name} {', '.join(limits)}" if limits else name

    return words(value)


def default_text(value: dict[str, Any], models: dict[str, Any]) -> str:
    """Return a key's default as YAML; of a section, the values in which it differs from the section's own defaults.

    It is "" if a section has the section's own defaults.
    """
    default = value["default"]
    names = references(value)
    if not isinstance(default, dict) or not names:
        return yaml_text(default)
    name = next((name for name in names if kind_of(models[name]) == default.get("kind")), names[0])
    own = {key: field.get("default") for key, field in models[name]["properties"].items()}
    changed = {key: entry for key, entry in default.items() if entry != own[key] or key == "kind"}
    return yaml_text(changed) if changed else ""


def yaml_text(value: Any) -> str:
    """Return a plain value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def _plain(text: str) -> str:
    plain = " ".join(_ROLE.sub(r"\1", inspect.cleandoc(text)).replace("`", "").split())
    return plain if text.startswith("`") else plain[:1].upper() + plain[1:]
