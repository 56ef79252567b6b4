"""Document: an analysis file as YAML, where every key is known, of its kind, and said once."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from ssat_probe.registry import known


def _is_list(kind: type) -> Callable[[Any], bool]:
    """Of one kind, and of each value once."""
    return lambda value: (
        isinstance(value, list) and all(type(one) is kind for one in value) and len(set(value)) == len(value)
    )


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_mappings(value: Any) -> bool:
    return _is_mapping(value) and all(one is None or _is_mapping(one) for one in value.values())


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "title": ("text, such as Three mechanisms", lambda value: isinstance(value, str | int | float)),
    "recipe": ("fields of a recipe, such as {model: vit_nano, epochs: 100}", _is_mapping),
    "models": ("a list of names, each once, such as [vit_nano]", _is_list(str)),
    "methods": ("a list of names, each once, such as [scratch, ssat]", _is_list(str)),
    "seeds": ("a list of whole numbers, each once, such as [0, 1, 2]", _is_list(int)),
    "vary": ("axes by name, such as {lambda_weight: [0.1, 0.5]}", _is_mapping),
    "probes": ("options by the name of a probe, such as {accuracy: {num_images: 100}}", _is_mappings),
    "measures": ("measures by name, such as {time: {probe: cost, column: seconds}}", _is_mappings),
    "tradeoffs": ("a list of pairs, such as [[accuracy, time]]", lambda value: isinstance(value, list)),
    "claims": (
        "a list of claims, such as [{claim: SSAT is better, measure: accuracy, sign: 1}]",
        lambda value: isinstance(value, list) and all(map(_is_mapping, value)),
    ),
    "jobs": ("a whole number, 0 for what the cores allow", lambda value: type(value) is int and value >= 0),
    "threads": ("a whole number, 0 for what the cores allow", lambda value: type(value) is int and value >= 0),
}
"Keys of an analysis file, what they must hold, and whether a value does."

REQUIRED = ("recipe", "methods", "seeds", "probes")


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has already, of which YAML's own keeps the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name = self.construct_object(key)
            if name in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(problem=f"the key {name!r} a second time in line {line}")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read(path: Path) -> tuple[str, dict[str, Any]]:
    """An analysis file.

    Args:
        path: YAML.

    Returns:
        Its text, and what it says, without keys that say nothing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, or a key is unknown, missing or not of its kind.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} must be an analysis file (YAML), got no such file; see analyses/.")
    try:
        source = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be YAML in UTF-8, got other bytes; give an analysis file, see analyses/."
        ) from error
    try:
        content = parsed(source)
    except (yaml.YAMLError, ValueError) as error:  # the latter of dates that are none
        raise ValueError(f"{path} must be YAML, got {str(error).splitlines()[0]}; mend that line.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(content).__name__}; see analyses/.")
    content = {key: value for key, value in content.items() if value is not None}
    for key in content:
        known(str(key), KINDS, f"the keys of an analysis ({path})")
    if missing := [key for key in REQUIRED if not content.get(key)]:
        raise ValueError(f"{path} must say {', '.join(missing)}, got nothing there; see analyses/mechanisms.yaml.")
    for key, value in content.items():
        must_be, is_such = KINDS[key]
        if not is_such(value):
            raise ValueError(f"{key} of {path} must be {must_be}, got {value!r}; choose another.")
    return source, content


def parsed(source: str) -> Any:
    """What the text of an analysis file says.

    Args:
        source: YAML; text that is none, or says a key twice, is a YAMLError.

    Returns:
        Plain data.
    """
    return yaml.load(source, _Loader)  # a safe loader
