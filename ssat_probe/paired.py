"""Paired: a probe that observes one checkpoint after another and says what sets each apart from the first."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

    from ssat_probe.observation import Observation
    from ssat_probe.subject import Subject


class Paired(ABC):
    """What is alike in probes of means over images: each says what it observes and how that becomes a table."""

    @abstractmethod
    def observe(self, subject: "Subject") -> "Observation":
        """What the images of one checkpoint give, from one pass over them.

        Args:
            subject: Its model is in eval mode, and says what its tokens are.

        Returns:
            Means over the images; options that do not exist or do not fit the model are a ValueError.
        """

    @abstractmethod
    def tabulate(self, seen: "Observation", first: "Observation | None") -> "DataFrame":
        """The columns of the probe.

        Args:
            seen: What `observe` gave.
            first: The same of the first checkpoint; None if differences to it are not paired.

        Returns:
            One row per place.
        """

    def measure(self, subject: "Subject") -> "DataFrame":
        """Table of one checkpoint.

        Args:
            subject: As for `observe`.

        Returns:
            The columns of the probe, without differences.
        """
        return self.tabulate(self.observe(subject), None)

    def between(self, subjects: "Iterator[tuple[str, Subject]]") -> "list[DataFrame]":
        """As `measure` for each subject, with differences to the first.

        Args:
            subjects: Labels and subjects.

        Returns:
            Their tables.
        """
        seen = [self.observe(subject) for _, subject in subjects]
        return [self.tabulate(one, one.comparable(seen[0])) for one in seen]
