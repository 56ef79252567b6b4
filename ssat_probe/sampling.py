"""Which images: subsets and hold-outs with the classes in proportion."""

import numpy as np


def stratified_subset(labels: np.ndarray, subset: int | float | None, seed: int) -> np.ndarray:
    """Positions of some images, with the classes in proportion.

    Each class gets its share to within one image (largest remainder), except that every class keeps one image where
    the subset has room for that. Within a class the order of drawing depends on the seed alone, so a larger subset of
    the same seed repeats the smaller one.

    Args:
        labels: Class of each image.
        subset: Count, at least 1; share in (0, 1); or None for all.
        seed: Which images are drawn.

    Returns:
        Sorted positions, int64.

    Raises:
        ValueError: If the count is outside 1 to the number of images, or the share outside (0, 1).
    """
    size = len(labels)
    if subset is None:
        return np.arange(size)
    is_count = isinstance(subset, int | np.integer) and not isinstance(subset, bool)
    if not (1 <= subset <= size if is_count else isinstance(subset, float) and 0 < subset < 1):
        raise ValueError(
            f"A subset must be a count from 1 to the {size} images there are, or a share between 0 and 1, "
            f"got {subset!r}; choose one of these or leave it out to use all."
        )
    classes, counts = np.unique(labels, return_counts=True)
    total = int(subset) if is_count else max(1, round(subset * size))
    least = np.full(len(classes), int(total >= len(classes)))
    return _drawn(labels, classes, _allocation(counts, total, least, counts), seed)


def holdout(labels: np.ndarray, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions divided into those to keep and those to hold out, both with the classes in proportion.

    Every class keeps at least one image; classes of two or more give at least one away where there is room.

    Args:
        labels: Class of each image.
        fraction: Share to hold out, in (0, 1).
        seed: Which images are held out.

    Returns:
        Sorted positions to keep; sorted positions held out.

    Raises:
        ValueError: If the fraction is outside (0, 1), or no class has a second image to give away.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"The share to hold out must be between 0 and 1, got {fraction!r}; 0.1 is the usual one.")
    classes, counts = np.unique(labels, return_counts=True)
    most = counts - 1
    if not most.sum():
        raise ValueError(
            f"Some class needs a second image to hold out, got {len(labels)} images in {len(classes)} classes; "
            "add images or bring a validation split."
        )
    total = min(max(1, round(fraction * len(labels))), int(most.sum()))
    least = np.minimum(most, int(total >= (most > 0).sum()))
    held_out = _drawn(labels, classes, _allocation(counts, total, least, most), seed)
    return np.setdiff1d(np.arange(len(labels)), held_out), held_out


def _allocation(counts: np.ndarray, total: int, least: np.ndarray, most: np.ndarray) -> np.ndarray:
    """How many of each class make up the total: largest remainder within bounds; ties go to the earlier class."""
    quota = total * counts / counts.sum()
    given = np.clip(np.floor(quota).astype(np.int64), least, most)
    while (missing := total - int(given.sum())) != 0:
        step = int(np.sign(missing))
        can_move = given < most if step > 0 else given > least
        given[np.argmax(np.where(can_move, step * (quota - given), -np.inf))] += step
    return given


def _drawn(labels: np.ndarray, classes: np.ndarray, counts: np.ndarray, seed: int) -> np.ndarray:
    """Sorted positions of so many images of each class."""
    chosen = [
        np.random.default_rng([seed, int(name)]).permutation(np.flatnonzero(labels == name))[:count]
        for name, count in zip(classes, counts, strict=True)
    ]
    return np.sort(np.concatenate(chosen))
