"""The reference of the Python interface, from signatures and docstrings."""

from __future__ import annotations

import inspect
import json
import re
from importlib import import_module
from typing import Any, Protocol

import griffe

from .docstrings import entries, markdown, one_line, sections

INTRODUCTION = """\
# Python interface

What other code may import. This page is generated from the docstrings: `python -m tools.docs.reference`.
[configuration.md](configuration.md) lists every key of a configuration.
"""

CONTENT: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Losses", "scan_fast", ("nt_xent", "NTXentLoss", "scan_loss", "SCANLoss", "self_label_loss", "SelfLabelLoss")),
    ("Losses without a kernel", "scan_fast.losses", ("sigreg_loss", "visreg_loss")),
    ("Neighbour search", "scan_fast", ("topk_neighbors",)),
    ("Clustering", "scan_fast", ("ImageClusterer",)),
    ("A finished run", "scan_fast.predictor", ("Predictor", "ImageNetwork")),
    ("Files of the SCAN project", "scan_fast.reference", ("open_reference", "ReferenceFile", "Embedder")),
    ("Interface of pretext methods", "scan_fast.methods", ("PretextMethod", "MethodSettings")),
    ("Interface of clustering objectives", "scan_fast.objectives", ("Objective", "ObjectiveSettings")),
    ("Interface of image sources", "scan_fast.data", ("Source",)),
)
"""Title, module and names of each section."""

_TITLES = {
    griffe.DocstringSectionKind.parameters: "Arguments",
    griffe.DocstringSectionKind.attributes: "Attributes",
    griffe.DocstringSectionKind.returns: "Returns",
    griffe.DocstringSectionKind.yields: "Yields",
    griffe.DocstringSectionKind.raises: "Raises",
}

_SKIP = re.compile(r" *# doctest: \+SKIP")


def page() -> str:
    """Return the page."""
    parts = [INTRODUCTION]
    for title, module, names in CONTENT:
        parts.append(f"## {title}\n")
        for name in names:
            parts += _entry(getattr(import_module(module), name), f"{module}.{name}")
    return "\n".join(parts)


def _entry(documented: Any, name: str) -> list[str]:
    short = name.rpartition(".")[2]
    parts = [f"### `{name}`\n"]
    if not inspect.isclass(documented) or _is_called(documented):
        parts.append(f"```py\n{_signature(documented, short)}\n```\n")
    parts.append(_docstring(documented))
    if inspect.isclass(documented):
        for method in _methods(documented):
            function = inspect.unwrap(getattr(documented, method))
            parts.append(f"#### `{short}.{method}`\n")
            parts.append(f"```py\n{_signature(function, method, bound=True)}\n```\n")
            parts.append(_docstring(function))
    return parts


def _is_called(documented: type) -> bool:
    """Return whether users create objects of a class; interfaces are implemented instead."""
    return (
        not inspect.isabstract(documented) and "__init__" in vars(documented) and Protocol not in documented.__bases__
    )


def _methods(documented: type) -> list[str]:
    """Return the public methods that a class defines itself, in the order of the source."""
    return [
        name
        for name, member in vars(documented).items()
        if not name.startswith("_") and (inspect.isfunction(member) or isinstance(member, classmethod))
        if name not in ("extra_repr", "model_post_init")
    ]


def _signature(documented: Any, name: str, *, bound: bool = False) -> str:
    """Return a call as it is written in the source, one argument a line if it is long."""
    signature = inspect.signature(documented)
    arguments: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        if not (bound and parameter.name in ("self", "cls")):
            arguments.append(_argument(parameter))
    returned = signature.return_annotation
    result = "" if inspect.isclass(documented) or returned is signature.empty else f" -> {returned}"
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= 120 else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def _argument(parameter: inspect.Parameter) -> str:
    """Return ``name: type = default``; annotations are strings, as all modules have ``from __future__ import``."""
    typed = parameter.name if parameter.annotation is parameter.empty else f"{parameter.name}: {parameter.annotation}"
    if parameter.default is parameter.empty:
        return typed
    default = json.dumps(parameter.default) if isinstance(parameter.default, str) else repr(parameter.default)
    return f"{typed} = {default}"


def _docstring(documented: Any) -> str:
    lines: list[str] = []
    for section in sections(documented):
        if section.kind is griffe.DocstringSectionKind.text:
            lines += [markdown(section.value), ""]
        elif section.kind is griffe.DocstringSectionKind.admonition and section.value.kind == "example":
            lines += ["```pycon", _SKIP.sub("", section.value.contents), "```", ""]
        elif section.kind in _TITLES:
            lines += [f"{_TITLES[section.kind]}:", ""]
            for name, text in entries(section):
                lines.append(f"- `{name}`: {one_line(text)}" if name else one_line(text))
            lines.append("")
    return "\n".join(lines)
