"""Reading of YAML that anyone may have written: plain values only, none of them without end."""

from __future__ import annotations

from typing import Any

import yaml

DEEPEST = 40
"""Levels of values within values."""
MOST_VALUES = 100_000
"""Values in a text, those counted again that an alias repeats."""
LONGEST = 4 << 20
"""Characters of a text."""


def parse_yaml(text: str) -> Any:
    """Return the values of a text.

    Tags of Python are refused, as PyYAML's safe loader does. So are keys that are given twice, of which one would be
    lost, whole numbers of more than 64 bits, and values nested or repeated without end.

    Raises:
        ValueError: if it is no YAML, or holds any of these; the message says what, and in which line.
    """
    if len(text) > LONGEST:
        raise ValueError(f"it has {len(text)} characters, more than {LONGEST}")
    try:
        values = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    # Of a date that does not exist, or a number with thousands of digits; or of a text that a tag calls a date.
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"a number or a date in it is not valid ({error})") from error
    rest = [values]
    while rest:
        value = rest.pop()
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 63:
            raise ValueError("a whole number in it has more than 64 bits")
        if isinstance(value, dict):
            rest += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            rest += value
    return values


class _Loader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = self._values = 0
        self._sizes: dict[str, int] = {}
        self._seen: set[int] = set()

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose a value after counting it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            assert event.anchor is not None
            if event.anchor in self.anchors and event.anchor not in self._sizes:
                raise _problem(f"the alias {event.anchor!r} is inside of what it stands for", event.start_mark)
            self._count(self._sizes.get(event.anchor, 1), event.start_mark)
            return super().compose_node(parent, index)
        before = self._values
        self._depth += 1
        self._count(1, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if event.anchor is not None:
            self._sizes[event.anchor] = self._values - before
        return node

    def _count(self, values: int, mark: Any) -> None:
        self._values += values
        if self._depth > DEEPEST:
            raise _problem(f"values are nested deeper than {DEEPEST} levels", mark)
        if self._values > MOST_VALUES:
            raise _problem(f"there are more than {MOST_VALUES} values, with those that aliases repeat", mark)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        """Construct a mapping whose keys are given once each."""
        # Merged mappings (<<) are part of the node once it was constructed.
        if isinstance(node, yaml.MappingNode) and id(node) not in self._seen:
            self._seen.add(id(node))
            keys = [(key.tag, key.value, key.start_mark) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for number, (tag, value, mark) in enumerate(keys):
                if tag != "tag:yaml.org,2002:merge" and any(key[:2] == (tag, value) for key in keys[:number]):
                    raise _problem(f"the key {value[:60]!r} is given twice", mark)
        return super().construct_mapping(node, deep)


def _problem(text: str, mark: Any) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, text, mark)
