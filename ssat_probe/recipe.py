"""Recipe: everything that determines a training run, and nothing else."""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ssat_probe.registry import known

Method = Literal["scratch", "ssl_ft", "ssat"]
Budget = Literal["matched", "equal_epochs"]
LearningRateRule = Literal["linear", "none"]
Schedule = Literal["cosine", "constant", "wsd"]
Augmentation = Literal["none", "crop", "standard", "strong"]
Precision = Literal["fp32", "bf16", "fp16"]
Task = Literal["reconstruction", "simmim", "contrastive", "dino"]
View = Literal["full", "masked"]
Distance = Literal["mse", "l1"]
Optimiser = Literal["adamw", "sgd"]
LambdaSchedule = Literal["constant", "linear", "cosine"]
Selection = Literal["last", "best"]
SelectionImages = Literal["val", "test"]
Target = Literal["augmented", "clean"]


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a training run; defaults from Das et al. (2024) unless said otherwise."""

    method: Method = "ssat"
    "scratch, ssl_ft (masked pre-training, then fine-tuning) or ssat (both at once)."

    model: str = "vit_nano"
    "Encoder; ssat-probe list names them, and timm:NAME is any plain Vision Transformer of timm's."

    data: str = "digits"
    "Data set; ssat-probe list names them, and hf:NAME is any image data of Hugging Face's."

    subset: float | int | None = None
    "Training images to use: a count (500) or a share (0.1), stratified; none means all."

    subset_seed: int = 0
    "Which stratified subset; the same for all seeds, so that runs differ in training alone."

    img_size: tuple[int, ...] = ()
    "Height and width in pixels, or one number for both; empty means the data set's own."

    patch_size: tuple[int, ...] = ()
    "Height and width of a patch in pixels, or one number; empty means the model's own for this image size."

    lambda_weight: float = 0.1
    "Weight of classification in ssat; 1 minus it weighs the reconstruction."

    mask_ratio: float = 0.75
    "Share of the patches hidden from the encoder in the masked pass."

    decoder: str = "shallow"
    "Decoder of the masked pass."

    decoder_depth: int | None = None
    "Blocks of the decoder; none means the model's own (2 in the paper)."

    decoder_width: int | None = None
    "Width of the decoder; none means the model's own (128 in the paper)."

    decoder_heads: int | None = None
    "Attention heads of the decoder; none means the model's own (16 in the paper)."

    norm_pix: bool = False
    "Reconstruct pixels normalised within each patch."

    epochs: int = 100
    "Epochs of scratch and ssat, and of the fine-tuning stage of ssl_ft."

    pretrain_epochs: int | None = None
    "Epochs of the pre-training stage of ssl_ft; none means what the budget says."

    budget: Budget = "matched"
    "matched: ssl_ft runs N + N epochs, the passes of N epochs of ssat; equal_epochs: N/2 + N/2."

    batch_size: int = 64
    "Images per optimiser step, over all processes and accumulation steps."

    accumulate: int = 1
    "Split each step's batch into this many backward passes."

    optimiser: Optimiser = "adamw"
    "adamw; or sgd, plain or with momentum."

    betas: tuple[float, float] = (0.9, 0.999)
    "AdamW's averaging constants; sgd has none."

    weight_decay: float = 0.05
    "Weight decay: AdamW's own, or of sgd an L2 term of the loss; vectors and biases have none."

    base_lr: float = 1e-3
    "Learning rate before the rule is applied."

    lr_rule: LearningRateRule = "linear"
    "linear: learning rate = base_lr * batch_size / 256; none: base_lr itself."

    min_lr: float = 1e-6
    "Learning rate at the end of the cosine."

    schedule: Schedule = "cosine"
    "After the warm-up: half a cosine down to min_lr; constant; or wsd, which is constant until the last fifth."

    warmup_epochs: float = 5.0
    "Epochs of linear warm-up from 0, in each stage."

    clip_grad: float | None = None
    "Largest gradient norm; none means no clipping."

    augmentation: Augmentation = "standard"
    "none; crop (shifts); standard (shifts, and flips where they keep the class); strong (the paper's RandAugment)."

    label_smoothing: float = 0.1
    "Label smoothing of the cross-entropy in training."

    eval_every: int = 1
    "Epochs between two looks at the validation images; the last epoch always looks."

    seed: int = 0
    "Seed of initialisation, order, augmentation and masks."

    precision: Precision = "fp32"
    "Arithmetic of the forward and backward passes."

    ema_decay: float | None = None
    "Keep a moving average of the weights with this decay, evaluate it as well and write it; none means none."

    layer_decay: float = 1.0
    "Learning rate of each block in units of the next one's; 1 means the same everywhere."

    drop_path: float = 0.0
    "Chance that the last block is skipped for an image in training; smaller in proportion for the earlier ones."

    mixup: float = 0.0
    "α of mixup in classification, on the full pass alone; 0 means none, 0.8 is usual."

    cutmix: float = 0.0
    "α of CutMix in classification, on the full pass alone; with mixup, either in half of the steps; 0 means none."

    task: Task = "reconstruction"
    "Self-supervised task of ssat and of the first stage of ssl_ft: reconstruction, simmim, contrastive or dino."

    reconstruction_loss: Distance = "mse"
    "Errors of task reconstruction, squared or absolute (l1); simmim has absolute ones."

    cls_view: View = "full"
    "What ssat classifies: the full image, or its visible patches alone, which the reconstruction then shares."

    momentum: float = 0.0
    "Momentum of sgd: a step is base_lr times the sum of the gradients, each older one times this once more."

    lambda_schedule: LambdaSchedule = "constant"
    "How λ goes from lambda_weight to lambda_end over the training of ssat: constant (not at all), linear or cosine."

    lambda_end: float | None = None
    "Weight of classification at the end of a schedule; none with a constant one."

    init_from: str = ""
    "Checkpoint, ours or foreign, whose encoder the training begins with; its head stays fresh. Empty means none."

    select: Selection = "last"
    "Weights to keep: of the last epoch, or of the one with the best accuracy on the validation images (best)."

    select_on: SelectionImages = "val"
    "test keeps the epoch that is best on test, as the paper did: no fair number; nothing is then carved off train."

    patience: int | None = None
    "Stop when so many looks at the validation images in a row brought no better accuracy; none means never."

    repeats: int = 1
    "Times that a step sees each of its images, each time augmented anew; an epoch then sees so many fewer of them."

    reconstruction_target: Target = "augmented"
    "Pixels to predict: as they go in, or clean: cut out and mirrored alike, but before RandAugment and erasing."

    masked_convolutions: bool = False
    "Of CvT: hidden patches are left out of its convolutions and its attention (ConvMAE), in place of a mask token."

    def __post_init__(self) -> None:
        """Check every value that can be checked without data; one that cannot be used is a ValueError."""
        for name in ("img_size", "patch_size"):
            object.__setattr__(self, name, _pair(name, getattr(self, name)))
        if isinstance(self.betas, list):
            object.__setattr__(self, "betas", tuple(self.betas))
        if isinstance(self.subset, float) and self.subset >= 1 and self.subset.is_integer():
            object.__setattr__(self, "subset", int(self.subset))  # the command line gives 500.0 for 500
        for field in dataclasses.fields(self):
            _check_type(field.name, getattr(self, field.name), _HINTS[field.name])
        _check_ranges(self)

    @property
    def name(self) -> str:
        """Name of the run: model, data, method and seed."""
        model, data = (re.sub(r"[:?/\\]", "_", name) for name in (self.model, self.data))
        return f"{model}-{data}-{self.method}-seed{self.seed}"

    @property
    def has_task(self) -> bool:
        """Whether a stage trains on the self-supervised task."""
        return self.method == "ssl_ft" or (self.method == "ssat" and min(self.lambda_ends) < 1)

    @property
    def selects(self) -> bool:
        """Whether the best epoch is kept instead of the last one."""
        return self.select == "best" or self.select_on == "test"

    @property
    def lambda_ends(self) -> tuple[float, float]:
        """λ at the beginning and at the end of the training."""
        return self.lambda_weight, self.lambda_weight if self.lambda_end is None else self.lambda_end

    @property
    def reconstructs(self) -> bool:
        """Whether the task predicts pixels, so that there is a decoder."""
        return self.task in ("reconstruction", "simmim")

    @property
    def masks(self) -> bool:
        """Whether a pass is made that hides patches."""
        return (self.has_task and self.reconstructs) or (self.method == "ssat" and self.cls_view == "masked")

    @property
    def stage_epochs(self) -> dict[str, int]:
        """Epochs of each stage, in order: ``pretrain`` and ``finetune`` for ssl_ft, else ``train``."""
        if self.method != "ssl_ft":
            return {"train": self.epochs}
        if self.pretrain_epochs is not None:
            return {"pretrain": self.pretrain_epochs, "finetune": self.epochs}
        if self.budget == "equal_epochs":
            return {"pretrain": self.epochs // 2, "finetune": self.epochs - self.epochs // 2}
        return {"pretrain": self.epochs, "finetune": self.epochs}

    @property
    def learning_rate(self) -> float:
        """Peak learning rate, after the rule (Goyal et al., 2017, for linear)."""
        return self.base_lr * self.batch_size / 256 if self.lr_rule == "linear" else self.base_lr

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain data: lists, numbers, strings, none."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}

    @property
    def identity(self) -> dict[str, Any]:
        """What two equal trainings have in common, whichever version made them: options of later versions only if set.

        Without this rule each new option would change the hash of every checkpoint that is already there.
        """
        fields = dataclasses.fields(self)
        first = [field.name for field in fields].index("precision") + 1  # the last field of format 1
        unset = {field.name for field in fields[first:] if getattr(self, field.name) == field.default}
        return {name: value for name, value in self.as_dict().items() if name not in unset}

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "recipe") -> "Recipe":
        """Recipe from plain data, as ``as_dict`` or a YAML file gives it.

        Args:
            values: Field names and values; missing ones take their defaults.
            source: Where the values come from; goes into messages.

        Returns:
            The checked recipe; an unknown name or a value out of its range is a ValueError.
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            known(key, fields, f"the keys of a recipe ({source})")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**options)


_HINTS = typing.get_type_hints(Recipe)


def _pair(name: str, value: Any) -> tuple[int, ...]:
    """One number or two as a pair; empty stays empty."""
    values = tuple(value or ()) if isinstance(value, list | tuple | None) else (value,)
    pair = values * 2 if len(values) == 1 else values
    if len(pair) not in (0, 2) or any(not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"{name} must be one or two positive whole numbers (height width), got {value!r}.")
    return pair


def _check_type(name: str, value: Any, hint: Any) -> None:
    """Refuse a value that is not of the field's type or not one of its choices."""
    if typing.get_origin(hint) is Literal:
        if not isinstance(value, str):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, got {value!r}.")
        known(value, get_args(hint), name)
        return
    if typing.get_origin(hint) is tuple:
        return
    allowed = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if float in allowed and int not in allowed:
        allowed = (*allowed, int)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        kinds = " or ".join("none" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ValueError(f"{name} must be {kinds}, got {value!r}.")


def _check_ranges(recipe: Recipe) -> None:
    """Refuse values that no run can use."""

    def check(name: str, holds: bool, must: str) -> None:
        if not holds:
            raise ValueError(f"{name} must be {must}, got {getattr(recipe, name)!r}.")

    check("lambda_weight", 0 <= recipe.lambda_weight <= 1, "between 0 and 1")
    if recipe.lambda_schedule == "constant":
        check("lambda_end", recipe.lambda_end is None, "left out with lambda_schedule constant")
    elif recipe.method == "ssat":  # of any other method, to ask for the end of what has no effect would be no help
        check("lambda_end", recipe.lambda_end is not None, f"given with lambda_schedule {recipe.lambda_schedule}")
        check("lambda_end", 0 <= (recipe.lambda_end or 0) <= 1, "between 0 and 1")
    check("mask_ratio", 0 < recipe.mask_ratio < 1, "between 0 and 1, both excluded")
    check("label_smoothing", 0 <= recipe.label_smoothing < 1, "at least 0 and below 1")
    if recipe.subset is not None:
        must = "a share between 0 and 1, or a count of at least 2 (all images: leave it out)"
        check("subset", recipe.subset >= 2 if isinstance(recipe.subset, int) else 0 < recipe.subset < 1, must)
    pair = recipe.betas if isinstance(recipe.betas, tuple) else ()
    valid = [isinstance(beta, int | float) and 0 <= beta < 1 for beta in pair]
    check("betas", valid == [True, True], "two numbers in [0, 1)")
    is_sgd = recipe.optimiser == "sgd"
    check(
        "betas", not is_sgd or recipe.betas == Recipe.betas, "left out with optimiser sgd, which has momentum instead"
    )
    check("momentum", 0 <= recipe.momentum < 1, "at least 0 and below 1")
    check("momentum", is_sgd or recipe.momentum == 0, "0 with optimiser adamw, whose averages are betas")
    for name in ("epochs", "batch_size", "accumulate", "eval_every", "repeats"):
        check(name, getattr(recipe, name) >= 1, "at least 1")
    for name in ("decoder_depth", "decoder_width", "decoder_heads", "pretrain_epochs", "patience"):
        check(name, getattr(recipe, name) is None or getattr(recipe, name) >= 1, "at least 1")
    check("img_size", max(recipe.img_size or (1,)) <= 2**14, "at most 16384 pixels high and wide")
    check("decoder_depth", (recipe.decoder_depth or 1) <= 256, "at most 256")
    for name in ("mixup", "cutmix", "weight_decay", "min_lr", "warmup_epochs", "seed", "subset_seed"):
        check(name, getattr(recipe, name) >= 0, "at least 0")
    for name in ("seed", "subset_seed"):
        check(name, getattr(recipe, name) < 2**63 - 1, "below 2^63 - 1")
    mixes = recipe.mixup > 0 or recipe.cutmix > 0
    check("cls_view", recipe.cls_view == "full" or not mixes, "full with mixup or cutmix, which mix full images")
    views = not (recipe.has_task and recipe.augmentation == "none" and recipe.task in ("contrastive", "dino"))
    check("augmentation", views, f"crop, standard or strong for task {recipe.task}, which compares two views")
    check("ema_decay", recipe.ema_decay is None or 0 <= recipe.ema_decay < 1, "at least 0 and below 1")
    check("layer_decay", 0 < recipe.layer_decay <= 1, "above 0 and at most 1")
    check("drop_path", 0 <= recipe.drop_path < 1, "at least 0 and below 1")
    check("base_lr", recipe.base_lr > 0, "above 0")
    falls = (
        recipe.schedule == "constant" or recipe.min_lr in (Recipe.min_lr, 0) or recipe.min_lr <= recipe.learning_rate
    )
    check("min_lr", falls, f"at most {recipe.learning_rate:g}, the peak, from which the learning rate falls")
    check("base_lr", math.isfinite(recipe.base_lr), "a finite number")
    check("clip_grad", recipe.clip_grad is None or recipe.clip_grad > 0, "above 0")
    check("accumulate", recipe.batch_size % recipe.accumulate == 0, f"a divisor of batch_size {recipe.batch_size}")
    check("repeats", recipe.batch_size % recipe.repeats == 0, f"a divisor of batch_size {recipe.batch_size}")
    alone = not (recipe.has_task and recipe.task == "contrastive")
    check("repeats", recipe.repeats == 1 or alone, "1 with task contrastive, whose negatives are other images")
    check("repeats", recipe.repeats == 1 or recipe.augmentation != "none", "1 with augmentation none")
    if recipe.budget == "equal_epochs" and recipe.method == "ssl_ft":
        check("epochs", recipe.epochs >= 2, "at least 2 to be halved")
