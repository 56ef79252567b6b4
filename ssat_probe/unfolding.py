"""What a pickle unfolds into, counted from its opcodes: nothing is built, nothing is run."""

import pickletools
from dataclasses import dataclass
from typing import Any, BinaryIO

MOST_SHARING = 100
"Values that a pickle may unfold into, times its own bytes. Tuned: nothing honest shares most of itself a hundredfold."

MOST_NESTED = 1000
"Containers within containers; Python's own hash of a tuple goes down without looking how deep."


@dataclass(slots=True)
class _Value:
    """What stands on the stack: as many values as a walk over it meets, and how deep they are nested."""

    size: int = 1
    depth: int = 0
    is_inside: bool = False
    "Part of another one, which has counted it as it was then."

    def take(self, inner: "list[_Value]") -> None:
        """Put others inside; into what lies within others already nobody but a circle or a trick puts more."""
        self.size += sum(value.size for value in inner)
        self.depth = max([self.depth, *(value.depth + 1 for value in inner)])
        if self.is_inside:
            self.depth = MOST_NESTED + 1
        for value in inner:
            value.is_inside = True


class Unfolding:
    """Runs the opcodes of one pickle on sizes instead of values.

    A pickle names a value once and may use it many times: forty tuples that each hold the one before twice are a
    hundred bytes, and a trillion values to whoever walks over them, as a dictionary does with its keys.
    """

    def __init__(self) -> None:
        """Before the first opcode."""
        self.size = 0
        "Values of all that was used so far, each counted as often as it was used."
        self.depth = 0
        "Of the deepest value so far."
        self._stack: list[_Value] = []
        self._below: list[list[_Value]] = []
        self._memo: dict[int, _Value] = {}

    def see(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        """Take note of an opcode.

        Args:
            opcode: What comes next.
            argument: Of it.

        An impossible opcode is a LookupError, as it is to whoever would open the pickle.
        """
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self._memo[len(self._memo) if name == "MEMOIZE" else int(argument)] = self._stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self._push(self._memo[int(argument)])
        elif name == "DUP":
            self._push(self._stack[-1])
        elif name == "MARK":
            self._below.append(self._stack)
            self._stack = []
        elif name == "POP" and not self._stack:
            self._stack = self._below.pop()
        elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
            inner = self._popped(opcode.stack_before[1:])
            self._stack[-1].take(inner)
            self.depth = max(self.depth, self._stack[-1].depth)
        else:
            made = _Value()
            made.take(self._popped(opcode.stack_before))
            for _ in opcode.stack_after:
                self._push(made)

    def _push(self, value: _Value) -> None:
        self.size += value.size
        self.depth = max(self.depth, value.depth)
        self._stack.append(value)

    def _popped(self, kinds: list[pickletools.StackObject]) -> list[_Value]:
        """What an opcode takes off the stack: all above the latest mark, and as many below it as it says."""
        found: list[_Value] = []
        if pickletools.markobject in kinds:
            found, self._stack = self._stack, self._below.pop()
            kinds = kinds[: kinds.index(pickletools.markobject)]
        return found + [self._stack.pop() for _ in kinds]


def unfold(file: BinaryIO, most: int) -> Unfolding:
    """Go through a pickle up to its end, or until it is too much.

    Args:
        file: At the beginning of a pickle.
        most: Values after which to stop.

    Returns:
        How far it came; larger than ``most`` or deeper than `MOST_NESTED` if it was too much. What is no pickle is a
        ValueError or a LookupError.
    """
    found = Unfolding()
    for opcode, argument, _ in pickletools.genops(file):
        found.see(opcode, argument)
        if found.size > most or found.depth > MOST_NESTED:
            break
    return found
