"""The reference of the configuration: every key with its type, default and meaning, from the models themselves."""

from __future__ import annotations

from typing import Any

from scan_fast.runs.config import Config
from scan_fast.runs.keys import default_text, definition, kind_of, model_classes, references, type_text
from scan_fast.schema import field_texts

from .docstrings import one_line, prose

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
holds all values of that run. A preset may set any key, the network included: `preset=paper`, `preset=fast` and, for
processors, `preset=cpu` ([recipes.md](recipes.md)); `scan-fast config --list` names the presets of each file.
"""


def page() -> str:
    """Return the page."""
    schema = Config.model_json_schema()
    parts = [INTRODUCTION]
    for name, where in _places(schema).items():
        parts.append(_section(name, definition(schema, name), where, schema["$defs"]))
    return "\n".join(parts)


def undescribed() -> list[str]:
    """Return the fields that no docstring describes."""
    schema = Config.model_json_schema()
    return [
        f"{name}.{key}"
        for name in _places(schema)
        for key, value in definition(schema, name)["properties"].items()
        if key not in field_texts(model_classes()[name]) and key != "kind" and len(references(value)) != 1
    ]


def _places(schema: dict[str, Any]) -> dict[str, list[str]]:
    """Return the dotted keys at which each model is used, in the order of the page."""
    places: dict[str, list[str]] = {"Config": [""]}

    def visit(name: str, place: str) -> None:
        for key, value in definition(schema, name)["properties"].items():
            inner = f"{place}.{key}" if place else key
            for reference in references(value):
                places.setdefault(reference, []).append(inner)
                visit(reference, inner)

    visit("Config", "")
    return places


def _anchor(name: str) -> str:
    return name.lower()


def _section(name: str, shown: dict[str, Any], where: list[str], models: dict[str, Any]) -> str:
    classes = model_classes()
    model = classes[name]
    keys = ", ".join(f"`{place}`" for place in dict.fromkeys(where))
    kind = kind_of(shown)
    title = "Top level" if where == [""] else f"{keys} of kind `{kind}`" if kind else keys
    described = field_texts(model)
    rows = []
    for key, value in shown["properties"].items():
        text = described.get(key, "")
        if key == "kind":
            text = "Chooses this section."
        elif not text and len(references(value)) == 1:
            text = prose(classes[references(value)[0]]).partition("\n\n")[0]
        default = _default(value, models) if key not in shown.get("required", ()) else "required"
        type_words = type_text(value, models, _link, "`{}`".format)
        rows.append(f"| `{key}` | {type_words} | {default} | {one_line(text)} |")
    table = ["| key | type | default | meaning |", "|---|---|---|---|", *rows]
    level = "##" if all("." not in place for place in where) else "###"
    return "\n".join([f'{level} {title}<a id="{_anchor(model.__name__)}"></a>', "", prose(model), "", *table, ""])


def _link(text: str, name: str) -> str:
    return f"[{text}](#{_anchor(name)})"


def _default(value: dict[str, Any], models: dict[str, Any]) -> str:
    text = default_text(value, models)
    return f"`{text}`" if text else "its defaults"
