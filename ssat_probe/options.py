"""Options written as text: in a YAML file, or as field=value."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cyclopts

EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
"A number as people write it, of which YAML makes one only with a point and a sign: it reads 1e-3 and 1.0e3 as text."


def config(words: list[str]) -> tuple[Any, ...]:
    """Options from the YAML file after ``--config``.

    Args:
        words: Of a command line; ``--config`` and what follows are taken out.

    Returns:
        What cyclopts takes as ``App.config``; empty without such a file.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    words[:] = [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]
    if "--config" not in words:
        return ()
    place = words.index("--config")
    path = Path(words[place + 1]) if place + 1 < len(words) else Path()
    if not path.is_file():
        raise FileNotFoundError(f"--config must be followed by a YAML file, got {str(path)!r}; check the path.")
    content = _yaml(path)
    del words[place : place + 2]
    # Below the command's name, because cyclopts passes over a key that is also a command, as `data` is.
    return (cyclopts.config.Dict({words[0]: content}, source=str(path)),) if words else ()


def changes(words: Sequence[str], option: str = "--set") -> dict[str, Any]:
    """Fields and values of ``data=cifar10``; a value is read as in a YAML file, but that 1e-3 is a number there too.

    Args:
        words: What followed the option.
        option: Goes into messages.

    Returns:
        Values by the names of their fields.

    Raises:
        ValueError: If a word is no field with a value.
    """
    import yaml

    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign:
            raise ValueError(f"{option} must be followed by field=value, got {word!r}; write {word}=3.")
        try:
            found[name.replace("-", "_")] = float(value) if EXPONENT.fullmatch(value) else yaml.safe_load(value)
        except (ValueError, yaml.YAMLError) as error:
            raise ValueError(f"{option} {name} must be followed by a value, got {value!r}; write {name}=3.") from error
    return found


def _yaml(path: Path) -> Any:
    """Content of a file; the sentence names the file and the line where cyclopts would name neither."""
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes()) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" in line {mark.line + 1}" if mark else ""
        raise ValueError(f"{path} must be YAML (key: value), got something else{line}; correct it there.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options (key: value), got a {type(content).__name__}; write one a line.")
    return content
