"""Things found by their file name: the probes, models, data sets, objectives of this package."""

import ast
import difflib
import importlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import ModuleType

PACKAGE = Path(__file__).parent


@cache
def names(kind: str) -> tuple[str, ...]:
    """Names of everything of one kind, from the files in its folder; imports nothing.

    Args:
        kind: A folder of the package: ``probes``, ``relations``, ``models``, ``decoders``, ``data``, ``objectives``.

    Returns:
        The file names without ending, sorted.
    """
    return tuple(sorted(path.stem for path in (PACKAGE / kind).glob("*.py") if path.stem != "__init__"))


def summary(kind: str, name: str) -> str:
    """First line of the module's docstring, read without importing it.

    Args:
        kind: A folder of the package.
        name: A file of that folder, without ending.

    Returns:
        One line.
    """
    source = (PACKAGE / kind / f"{known(name, names(kind), kind)}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def load(kind: str, name: str) -> ModuleType:
    """Module ``ssat_probe.<kind>.<name>``.

    Args:
        kind: A folder of the package.
        name: A file of that folder, without ending.

    Returns:
        The imported module.
    """
    return importlib.import_module(f"ssat_probe.{kind}.{known(name, names(kind), kind)}")


def known(name: str, valid: Iterable[str], kind: str) -> str:
    """The name itself, if it is one of the valid ones.

    Args:
        name: What the user wrote.
        valid: What exists.
        kind: What the names stand for, in the plural; goes into the message.

    Returns:
        ``name``, unchanged.

    Raises:
        ValueError: If ``name`` is not valid; the sentence lists the valid names and the nearest one.
    """
    valid = tuple(valid)
    if name in valid:
        return name
    nearest = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"No {name!r} in {kind}: {', '.join(valid)}.{hint}")


@cache
def variants(kind: str) -> dict[str, str]:
    """Names in the ``VARIANTS`` tables of a folder, read without importing anything.

    Args:
        kind: A folder whose files export a literal ``VARIANTS`` dictionary: ``models``.

    Returns:
        File name of each variant.
    """
    found = {}
    for name in names(kind):
        tree = ast.parse((PACKAGE / kind / f"{name}.py").read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "VARIANTS":
                found.update(dict.fromkeys(ast.literal_eval(node.value), name))
    return found
