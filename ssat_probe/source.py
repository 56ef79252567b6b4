"""Source: what the user says about weights that were not trained here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """What the user says about weights that were not trained here; our own checkpoints need none of it."""

    model: str = ""
    "What foreign weights are, as timm:NAME; empty means what the file itself shows."

    img_size: tuple[int, ...] = ()
    "Height and width in pixels for foreign weights, or one number; empty means their own."

    patch_size: tuple[int, ...] = ()
    "Height and width of a patch for foreign weights, or one number; empty means their own."

    heads: int = 0
    "Attention heads of a block of foreign weights (CvT: of stage 0); 0 means what they say, or a width of 64."

    entry: str = ""
    "Entry of a foreign file to read, such as model, state_dict_ema or student; empty means the best there is."

    trained_on: str = ""
    "Data set whose classes the head of foreign weights has, in its order; empty means unknown."

    mean: tuple[float, ...] = ()
    "Mean of each channel (or one for all), pixels in [0, 1], for foreign weights; empty means what the config says."

    std: tuple[float, ...] = ()
    "Standard deviation of each channel (or one for all) for foreign weights; empty means what the config says."

    norm_pix: bool = False
    "The decoder of foreign weights predicts patches normalised one by one, as in MAE's files that end in _full."

    resize: bool = False
    "Resample positions and patch embeddings of foreign weights that have another size than asked for."

    allow_partial: bool = False
    "Go on where foreign weights do not fill the encoder, or hold more than it takes; the rest stays random."

    trust: bool = False
    "Open files that run code when opened. Only for files whose author you trust as you trust your own programs."

    def __post_init__(self) -> None:
        """Check the numbers.

        Raises:
            ValueError: If one is out of its range.
        """
        for name in ("img_size", "patch_size"):
            value = getattr(self, name)
            values = tuple(value) if isinstance(value, tuple | list) else (value,)
            if len(values) > 2 or any(not isinstance(v, int) or v < 1 for v in values):
                raise ValueError(f"{name} must be one or two positive whole numbers (height width), got {value!r}.")
            object.__setattr__(self, name, values * 2 if len(values) == 1 else values)
        if self.heads < 0:
            raise ValueError(f"heads must be at least 0, got {self.heads}.")
        if self.model and not self.model.startswith("timm:"):
            raise ValueError(f"model must be timm:NAME for weights not trained here, got {self.model!r}.")
        if any(value <= 0 for value in self.std):
            raise ValueError(f"std must be above 0, got {self.std!r}.")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std must go together, got {self.mean!r} and {self.std!r}.")
