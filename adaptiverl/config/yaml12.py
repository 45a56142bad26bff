"""YAML as version 1.2 reads it: 1e-5 is a number, `no` is a word, and no key is given twice.

PyYAML reads version 1.1, where `1e-5` is text, `no` is false, 010 is 8 and 1:30 is 90. The grammar,
anchors and merge keys (`<<`) are PyYAML's. There are no other values than in JSON.
"""

import re
from typing import Any, ClassVar

import yaml


class Loader(yaml.SafeLoader):
    """Gives null, booleans, numbers, texts, lists and mappings; any other tag is refused."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}

    def compose_mapping_node(self, anchor: Any) -> Any:
        """Refuses a key that is given twice, before merge keys bring theirs."""
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(
                        None, None, f"{key.value} is given twice", key.start_mark
                    )
                seen.add(key.value)
        return node


def _int(loader: Loader, node: Any) -> int:
    return int(node.value, 0) if node.value[:2] in ("0x", "0o") else int(node.value)


def _float(loader: Loader, node: Any) -> float:
    return float(re.sub(r"\.(inf|nan)", r"\1", node.value.lower()))


KINDS = {  # plain text that matches is of this kind: the core schema of YAML 1.2
    "null": (r"~|null|Null|NULL|", lambda loader, node: None),
    "bool": (
        r"true|True|TRUE|false|False|FALSE",
        lambda loader, node: node.value.lower() == "true",
    ),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _int),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        _float,
    ),
    "merge": (r"<<", None),
}
for kind, (pattern, construct) in KINDS.items():
    tag = f"tag:yaml.org,2002:{kind}"
    Loader.add_implicit_resolver(tag, re.compile(rf"(?:{pattern})\Z"), None)
    if construct:
        Loader.add_constructor(tag, construct)
for kind in ("str", "seq", "map"):
    tag = f"tag:yaml.org,2002:{kind}"
    Loader.add_constructor(tag, yaml.SafeLoader.yaml_constructors[tag])
Loader.add_constructor(None, yaml.SafeLoader.yaml_constructors[None])


def loads(text: str) -> Any:
    """What the only document of `text` holds; None for an empty one.

    Raises ValueError, which says the line, for what is no such YAML.
    """
    try:
        return yaml.load(text, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from error
    except yaml.YAMLError as error:  # a character that YAML does not have
        raise ValueError(str(error)) from error
