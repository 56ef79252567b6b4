"""Top-1 accuracy, cross-entropy, and reconstruction error under fixed masks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject


@dataclass(frozen=True)
class Probe:
    """Top-1 accuracy, cross-entropy, and reconstruction error under fixed masks."""

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "", "share of images whose largest logit is their class, in [0, 1]"),
        Column("accuracy_low", "", "lower end of the 95 % Wilson interval over images"),
        Column("accuracy_high", "", "upper end of the 95 % Wilson interval over images"),
        Column("cross_entropy", "nat", "mean over images, without label smoothing"),
        Column("reconstruction", "normalised pixel²", "mean square over hidden patches; empty without a decoder"),
        Column("num_images", "", "images looked at"),
    )

    def measure(self, subject: "Subject") -> "DataFrame":
        """One row.

        Args:
            subject: With or without a decoder.

        Returns:
            Sums over images, so no batch size enters.
        """
        import torch
        import torch.nn.functional as F
        from pandas import DataFrame
        from scipy.stats import binomtest

        subject.require_classes()
        correct, loss, error = 0, 0.0, 0.0 if subject.decoder is not None else float("nan")
        with torch.no_grad():
            for batch in subject.batches():
                logits = subject.model(batch.images)
                correct += int((logits.argmax(dim=1) == batch.labels).sum())
                loss += float(F.cross_entropy(logits.double(), batch.labels, reduction="sum"))
                if subject.decoder is not None:
                    error += float(subject.reconstruction_errors(batch).double().sum())
        num = subject.num_images
        interval = binomtest(correct, num).proportion_ci(method="wilson")
        values = (correct / num, float(interval.low), float(interval.high), loss / num, error / num, num)
        return DataFrame([dict(zip((column.name for column in self.columns), values, strict=True))])

    def draw(self, table: "DataFrame") -> "Figure":
        """Accuracy and reconstruction error of each method: a dot per seed, the mean and its 95 % interval.

        Args:
            table: Of one or more checkpoints.

        Returns:
            Two panels, or one where no checkpoint has a decoder.
        """
        from ssat_probe import drawing

        shown = ["accuracy"] + (["reconstruction"] if table["reconstruction"].notna().any() else [])
        labels = {column.name: column.label for column in self.columns}
        with drawing.style():
            figure, axes = drawing.panels(1, len(shown))
            for ax, name in zip(axes, shown, strict=True):
                drawing.dots_by_series(ax, table.dropna(subset=[name]), name)
                ax.set_ylabel({"accuracy": "test accuracy"}.get(name, f"{labels[name]}"))
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """All of it.

        Args:
            table: Of one or more checkpoints.

        Returns:
            One row per checkpoint.
        """
        return table[["checkpoint", *(column.name for column in self.columns)]]
