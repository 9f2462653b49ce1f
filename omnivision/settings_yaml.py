"""How YAML files are read: whole numbers in plain decimal only."""

import re

import yaml


def read_numbers_as_written() -> None:
    """Make YAML read `010` and `1:30` as texts, not as 8 and 90, so that the check of settings can point at them.

    For the process that composes a configuration: the loaders of Hydra and OmegaConf derive from SafeLoader.
    """
    decimal = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$")
    for key, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items():
        yaml.SafeLoader.yaml_implicit_resolvers[key] = [
            (tag, decimal if tag == "tag:yaml.org,2002:int" else pattern) for tag, pattern in resolvers
        ]
