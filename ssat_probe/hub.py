"""Weights that timm fetches from its hub: whatever fails on the way is one sentence."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def fetching(name: str) -> Iterator[None]:
    """Fetch within, in silence: the hub's client tries ten times, with a line for each.

    Args:
        name: Of the model, as timm knows it.

    Yields:
        Nothing.

    Raises:
        ValueError: If the weights do not come or are not whole. What torch says of unfit weights passes.
        TypeError: As timm says it of options that the model does not take.
        AssertionError: Likewise.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    except (TypeError, AssertionError):
        raise
    except Exception as error:  # of a dozen kinds, most of them of other packages
        if "Error(s) in loading state_dict" in str(error):
            raise
        said = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") or type(error).__name__
        raise ValueError(
            f"timm:{name}?pretrained must be in the cache of timm's hub or be fetched from there, got: {said}; try "
            "again with a network, or fetch its weights elsewhere and name the file."
        ) from error
    finally:
        logger.setLevel(level)
