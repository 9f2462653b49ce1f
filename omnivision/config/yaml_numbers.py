"""How YAML files are read: whole numbers in plain decimal only, and no anchors that stand for more than anybody writes."""

import re
from typing import Any

import yaml

MOST_VALUES = 100_000  # of a file, anchors followed


def read_numbers_as_written() -> None:
    """Make YAML read `010` and `1:30` as texts, not as 8 and 90, so that the check of settings can point at them.

    For the process that composes a configuration: the loaders of Hydra and OmegaConf derive from SafeLoader.
    """
    decimal = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        yaml.SafeLoader.yaml_implicit_resolvers[key] = [
            (tag, decimal if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers
        ]
    construct = yaml.SafeLoader.construct_document

    def bounded(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        if values_in(node, {}) > MOST_VALUES:
            raise yaml.YAMLError(
                f"{node.start_mark.name} holds an anchor (&name) that refers to itself, or anchors within anchors that stand "
                f"for more than {MOST_VALUES} values. Write them out, or use interpolations, ${{name}}."
            )
        return construct(loader, node)

    if construct.__name__ != bounded.__name__:
        yaml.SafeLoader.construct_document = bounded


def values_in(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; too many for one that is within itself. `known` are counted already, by identity."""
    if id(node) not in known:
        known[id(node)] = MOST_VALUES + 1  # until it is counted
        inside = node.value if isinstance(node, (yaml.SequenceNode, yaml.MappingNode)) else []
        parts = [part for each in inside for part in (each if isinstance(each, tuple) else (each,))]
        known[id(node)] = 1 + sum(values_in(part, known) for part in parts)
    return known[id(node)]
