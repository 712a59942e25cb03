"""The reference of the configuration: every key with its type, default and meaning, from the models themselves."""

from __future__ import annotations

import json
from typing import Any

from scan_fast.runs.config import Config
from scan_fast.schema import Settings

from .docstrings import fields, one_line, prose

INTRODUCTION = """\
# Configuration

Every key of a run's configuration. This page is generated: `python -m tools.docs.reference`.

A key is set in a YAML file, on the command line or in Python; unknown keys are errors:

```yaml
# mine.yaml
base: folder.yaml            # a file in the same folder, whose values and presets this file changes
name: mine
pretext: {epochs: 50}
presets:                     # one of them is applied to the values above
  fast: {clustering: {heads: 5}}
```

```sh
scan-fast run digits preset=fast pretext.epochs=50 pretext.optimizer.lr=0.002
```

```python
from scan_fast import ImageClusterer

ImageClusterer(n_clusters=12, settings={"pretext.epochs": 50, "pretext.optimizer.lr": 0.002})
```

A section that has kinds is given with its `kind`, or as the kind's bare name for the defaults:
`pretext.method=none` is `pretext.method={kind: none}`. Another kind replaces the whole section.

The defaults below are those of the models. The files in `configs/` set most keys, and `config.yaml` in a run folder
holds all values of that run.
"""


def page() -> str:
    """Return the page."""
    schema = Config.model_json_schema()
    parts = [INTRODUCTION]
    for name, where in _places(schema).items():
        parts.append(_section(name, _definition(schema, name), where, schema["$defs"]))
    return "\n".join(parts)


def undescribed() -> list[str]:
    """Return the fields that no docstring describes."""
    schema = Config.model_json_schema()
    return [
        f"{name}.{key}"
        for name in _places(schema)
        for key, value in _definition(schema, name)["properties"].items()
        if key not in fields(_classes()[name]) and key != "kind" and len(_references(value)) != 1
    ]


def _definition(schema: dict[str, Any], name: str) -> dict[str, Any]:
    definition: dict[str, Any] = schema if name == "Config" else schema["$defs"][name]
    return definition


def _classes(base: type[Settings] = Settings) -> dict[str, type[Settings]]:
    """Return the package's models by name."""
    found = {base.__name__: base}
    for model in base.__subclasses__():
        if model.__module__.startswith("scan_fast."):
            found |= _classes(model)
    return found


def _references(value: Any) -> list[str]:
    """Return the names of the models that a key may hold."""
    found: list[str] = []
    if isinstance(value, dict):
        if "$ref" in value:
            found.append(value["$ref"].rpartition("/")[2])
        for key in ("anyOf", "oneOf", "allOf"):
            found += [name for part in value.get(key, ()) for name in _references(part)]
    return found


def _places(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Return the dotted keys at which each model is used, in the order of the page."""
    places: dict[str, list[str]] = {"Config": [""]}

    def visit(name: str, place: str) -> None:
        for key, value in _definition(schema, name)["properties"].items():
            inner = f"{place}.{key}" if place else key
            for reference in _references(value):
                places.setdefault(reference, []).append(inner)
                visit(reference, inner)

    visit("Config", "")
    return places


def _kind(definition: dict[str, Any]) -> str | None:
    return definition["properties"].get("kind", {}).get("const")


def _anchor(name: str) -> str:
    return name.lower()


def _section(name: str, definition: dict[str, Any], where: list[str], models: dict[str, Any]) -> str:
    classes = _classes()
    model = classes[name]
    keys = ", ".join(f"`{place}`" for place in where)
    kind = _kind(definition)
    title = "Top level" if where == [""] else f"{keys} of kind `{kind}`" if kind else keys
    described = fields(model)
    rows = []
    for key, value in definition["properties"].items():
        text = described.get(key, "")
        if key == "kind":
            text = "Chooses this section."
        elif not text and len(_references(value)) == 1:
            text = prose(classes[_references(value)[0]]).partition("\n\n")[0]
        default = _default(value, models) if key not in definition.get("required", ()) else "required"
        rows.append(f"| `{key}` | {_type(value, models)} | {default} | {one_line(text)} |")
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    level = "##" if all("." not in place for place in where) else "###"
    return "\n".join([f'{level} {title}<a id="{_anchor(model.__name__)}"></a>', "", prose(model), "", *table, ""])


def _type(value: dict[str, Any], models: dict[str, Any]) -> str:
    """Return a key's type in words."""
    options = value.get("anyOf") or value.get("oneOf")
    if options:
        if "discriminator" in value:
            return " or ".join(_link(_kind(models[name]) or name, name) for name in _references(value))
        return " or ".join(_type(option, models) for option in options)
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return _link(_kind(models[name]) or "section", name)
    if "enum" in value:
        return " or ".join(f"`{_yaml(option)}`" for option in value["enum"])
    if "const" in value:
        return f"`{_yaml(value['const'])}`"
    if value.get("type") == "array":
        if "prefixItems" in value:
            inner = [_type(item, models) for item in value["prefixItems"]]
            return f"[{', '.join(inner)}]"
        return f"list of {_type(value['items'], models)}"
    names = {"integer": "int", "number": "float", "boolean": "bool", "string": "str", "null": "`null`"}
    name = "path" if value.get("format") == "path" else names[value["type"]]
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {value[key]:g}" for key, sign in signs.items() if key in value]
    return f"{name} {', '.join(limits)}" if limits else name


def _link(text: str, name: str) -> str:
    return f"[{text}](#{_anchor(name)})"


def _default(value: dict[str, Any], models: dict[str, Any]) -> str:
    """Return a key's default as YAML; of a section, the values in which it differs from the section's own defaults."""
    default = value["default"]
    names = _references(value)
    if not isinstance(default, dict) or not names:
        return f"`{_yaml(default)}`"
    name = next((name for name in names if _kind(models[name]) == default.get("kind")), names[0])
    own = {key: field.get("default") for key, field in models[name]["properties"].items()}
    changed = {key: entry for key, entry in default.items() if entry != own[key] or key == "kind"}
    return f"`{_yaml(changed)}`" if changed else "its defaults"


def _yaml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    if isinstance(value, str):
        return value
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
