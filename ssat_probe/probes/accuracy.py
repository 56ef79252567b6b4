"""Accuracy, AUC, cross-entropy, and reconstruction error under fixed masks."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ssat_probe.table import Column

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure
    from pandas import DataFrame

    from ssat_probe.subject import Subject


@dataclass(frozen=True)
class Probe:
    """Accuracy, AUC, cross-entropy, and reconstruction error under fixed masks."""

    split: ClassVar[str] = "test"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("accuracy", "", "share of images whose largest logit is their class, in [0, 1]"),
        Column("accuracy_low", "", "lower end of the 95 % Wilson interval over images"),
        Column("accuracy_high", "", "upper end of the 95 % Wilson interval over images"),
        Column("cross_entropy", "nat", "mean over images, without label smoothing"),
        Column("reconstruction", "normalised pixel²", "mean square over hidden patches; empty without a decoder"),
        Column("num_images", "", "images looked at"),
        Column(
            "balanced_accuracy",
            "",
            "mean over classes of the share of their images that is right; empty if one has none",
        ),
        Column(
            "auc",
            "",
            "area under the ROC curve of a class against the others, mean over classes; empty if one has no image",
        ),
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
        loss, error = 0.0, 0.0 if subject.decoder is not None else float("nan")
        labels, probabilities = [], []
        with torch.no_grad():
            for batch in subject.batches():
                logits = subject.model(batch.images).double()
                loss += float(F.cross_entropy(logits, batch.labels, reduction="sum"))
                labels.append(batch.labels.cpu())
                probabilities.append(logits.softmax(dim=1).cpu())
                if subject.decoder is not None:
                    error += float(subject.reconstruction_errors(batch).double().sum())
        truth, given = torch.cat(labels).numpy(), torch.cat(probabilities).numpy()
        num, correct = len(truth), int((given.argmax(axis=1) == truth).sum())
        interval = binomtest(correct, num).proportion_ci(method="wilson")
        values = (
            *(correct / num, float(interval.low), float(interval.high), loss / num, error / num, num),
            *by_class(truth, given),
        )
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
                drawing.dots_by_series(ax, table, name)
                ax.set_ylabel(labels[name])
            if not any(label.get_text() for label in axes[0].get_xticklabels()):
                drawing.legend_below(figure)
        return figure

    def summary(self, table: "DataFrame") -> "DataFrame":
        """All of it.

        Args:
            table: Of one or more checkpoints.

        Returns:
            One row per checkpoint.
        """
        return table[["checkpoint", *(column.name for column in self.columns)]]


def by_class(labels: "np.ndarray", probabilities: "np.ndarray") -> tuple[float, float]:
    """Balanced accuracy, and area under the ROC curve of each class against the others, both means over the classes.

    Unlike accuracy, neither rewards a model for preferring the common classes.

    Args:
        labels: Class of each image.
        probabilities: Image by class.

    Returns:
        Both in [0, 1]; chance is 1 over the number of classes, and 0.5. NaN if a class has no image, or all of them.
    """
    import numpy as np
    from sklearn.metrics import balanced_accuracy_score, roc_auc_score

    is_class = labels[:, None] == np.arange(probabilities.shape[1])
    counts = is_class.sum(axis=0)
    if counts.min() == 0 or counts.max() == len(labels):
        return float("nan"), float("nan")
    balanced = balanced_accuracy_score(labels, probabilities.argmax(axis=1))
    return float(balanced), float(roc_auc_score(is_class, probabilities, average="macro"))
