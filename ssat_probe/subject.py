"""Subject: a model, images and a loss, ready to be measured."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ssat_probe.augmentation import augment
from ssat_probe.checkpoint import Checkpoint
from ssat_probe.data import open_dataset, refuse_idle_options
from ssat_probe.foreign import Foreign, open_weights
from ssat_probe.geometry import grid
from ssat_probe.images import Images, Selection, normalise, split
from ssat_probe.loading import batches
from ssat_probe.losses import reconstruction_error
from ssat_probe.network import Encoder, build_encoder
from ssat_probe.patches import random_mask
from ssat_probe.preparation import Prepared
from ssat_probe.registry import known
from ssat_probe.sample import Sample
from ssat_probe.sampling import stratified_subset
from ssat_probe.source import Source

TERMS = ("cross_entropy", "reconstruction", "joint")


@dataclass(frozen=True)
class Batch:
    """Images on the device, normalised, with their classes and their positions in the sample."""

    images: Float[Tensor, "batch channel height width"]
    labels: Int[Tensor, " batch"]
    ids: Int[Tensor, " batch"]


@dataclass(frozen=True)
class Subject:
    """What lies under the microscope: a model in eval mode, images that stream past it, and a loss."""

    checkpoint: Checkpoint | Foreign
    model: Encoder
    "Encoder with its head; a call gives logits."
    decoder: nn.Module | None
    images: Images
    classes: tuple[str, ...]
    "Of the images; another data set's may be others than the model's."
    sample: Sample
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, path: Path | str, sample: Sample, default_split: str = "test", source: Source = Source()) -> "Subject":
        """Put a checkpoint under the microscope.

        Args:
            path: Of the checkpoint, of a file of foreign weights, or ``timm:NAME``.
            sample: Which images, on which device, in which arithmetic.
            default_split: Part of the data where the sample leaves that open.
            source: What is said about foreign weights.

        Returns:
            The subject.

        Raises:
            ValueError: If the images have other channels than the model takes, or nobody said which images to show.
        """
        checkpoint = open_weights(path, source, sample.data, sample.data_dir)
        recipe, facts = checkpoint.recipe, checkpoint.facts
        is_foreign = isinstance(checkpoint, Foreign)
        if not (sample.data or recipe.data):
            raise ValueError(
                f"{path} does not say on which images it was trained; name the ones to look at with --data."
            )
        size = () if is_foreign else recipe.img_size
        dataset = open_dataset(sample.data or recipe.data, sample.data_dir, img_size=size)
        if dataset.facts.channels != facts.channels and not (is_foreign and dataset.facts.channels == 1):
            raise ValueError(
                f"The images of data {sample.data!r} must have {facts.channels} channels as {checkpoint.path} needs, "
                f"got {dataset.facts.channels}; choose other images with --data."
            )
        is_own = sample.data in ("", recipe.data)
        part = sample.split or default_split
        images = split(dataset, part, recipe.subset if is_own else None, recipe.subset_seed)
        count = min(sample.num_images, len(images)) if sample.num_images else None
        images = Selection(images, stratified_subset(images.labels, count, sample.sample_seed))
        if isinstance(checkpoint, Foreign):
            images = Prepared(images, checkpoint.preparation)
        device, dtype = device_of(sample.device), getattr(torch, sample.dtype)
        model = checkpoint.encoder().to(device, dtype).eval()
        decoder = checkpoint.decoder()
        decoder = decoder.to(device, dtype).eval() if decoder is not None else None
        return cls(checkpoint, model, decoder, images, dataset.facts.classes, sample, device, dtype)

    def untrained(self) -> "Subject":
        """The same network before training, from its recipe's seed, in front of the same images.

        Returns:
            A subject of epoch 0 without a decoder.
        """
        checkpoint: Checkpoint | Foreign
        if isinstance(self.checkpoint, Foreign):
            checkpoint = self.checkpoint.untrained()
            model = checkpoint.encoder()
        else:
            model = build_encoder(self.checkpoint.recipe, self.checkpoint.facts)
            checkpoint = replace(self.checkpoint, epoch=0, state=model.state_dict())
        return replace(self, checkpoint=checkpoint, model=model.to(self.device, self.dtype).eval(), decoder=None)

    @property
    def num_images(self) -> int:
        """Number of images in the sample."""
        return len(self.images)

    @property
    def fingerprint(self) -> str:
        """sha256 of the images looked at."""
        return hashlib.sha256(self.images.fingerprint().encode()).hexdigest()

    @property
    def setting(self) -> str:
        """Size, grid and preparation of the images as the model sees them: under another, numbers do not compare."""
        facts = self.checkpoint.facts
        prepared = (facts.mean, facts.std, facts.channels, getattr(self.checkpoint, "preparation", None))
        size = self.images.read([0]).shape[-2:]
        try:
            patches = "{}x{} patches".format(*grid(self.model))
        except ValueError:  # a model that does not say
            patches = "no grid"
        digest = hashlib.sha256(repr(prepared).encode()).hexdigest()[:6]
        return f"{size[0]}x{size[1]} px, {patches}, {digest}"

    def batches(self, is_augmented: bool = False) -> Iterator[Batch]:
        """The images, a batch at a time, always in the same order.

        Args:
            is_augmented: Change each image as in training, at random but always in the same way: by its id alone.

        Yields:
            Normalised as the checkpoint's training did.
        """
        size = self.sample.batch_size
        lists = [range(i, min(i + size, len(self.images))) for i in range(0, len(self.images), size)]
        for pixels, labels, ids in batches(self.images, lists):
            if is_augmented:
                pixels = torch.cat([self._augmented(one[None], int(i)) for one, i in zip(pixels, ids, strict=True)])
            images = normalise(pixels.to(self.device), self.checkpoint.facts, self.dtype)
            yield Batch(images, labels.to(self.device), ids)

    def loss(self, batch: Batch, term: str = "cross_entropy") -> Float[Tensor, ""]:
        """Loss of a batch, mean over its images, differentiable; the same function for every checkpoint.

        Args:
            batch: From ``batches``.
            term: ``cross_entropy`` (without label smoothing), ``reconstruction`` (masks frozen per image), or
                ``joint``: λ of the recipe (at the end of its schedule) times the first plus 1-λ times the second.

        Returns:
            In nats, normalised pixels squared, or their weighted sum; reconstruction without a decoder is a ValueError.
        """
        known(term, TERMS, "losses")
        if term == "cross_entropy":
            self.require_classes()
            return F.cross_entropy(self.model(batch.images), batch.labels)
        if term == "reconstruction":
            return self.reconstruction_errors(batch).mean()
        weight = self.checkpoint.recipe.lambda_ends[1]
        return weight * self.loss(batch) + (1 - weight) * self.loss(batch, "reconstruction")

    def require_classes(self) -> None:
        """Refuse to compare the model's classes with images of other ones.

        Raises:
            ValueError: If the images' classes are not those that the model was trained on, in the same order, or
                nobody knows which those are.
        """
        needed = self.checkpoint.facts.classes
        if not needed:
            raise ValueError(
                f"The classes of {self.checkpoint.path} must be known for its loss and accuracy, got none; name the "
                "data set whose classes its head has with --trained-on, or choose a probe that needs no classes "
                "(attention, variance)."
            )
        if self.classes != needed:
            raise ValueError(
                f"The images must have the {len(needed)} classes of {self.checkpoint.path} ({_few(needed)}), "
                f"got {len(self.classes)} ({_few(self.classes)}); choose other images with --data, or a probe that "
                "needs no classes (attention, variance)."
            )

    def masks(self, batch: Batch) -> Bool[Tensor, "batch token"]:
        """Masks of the masked pass, each depending on its image alone.

        Args:
            batch: From ``batches``.

        Returns:
            True at hidden patches; on the CPU.

        Raises:
            ValueError: If the model has no masked pass.
        """
        model = self.model
        if not hasattr(model, "encode") or (model.keeps_hidden and model.mask_token is None):
            raise ValueError(
                f"{self.checkpoint.path} must hold a model with a masked pass for this, got a {type(model).__name__} "
                "without; take a checkpoint of ours, or a file of SSAT's or MAE's that holds its decoder."
            )
        seeds = ([self.sample.sample_seed, int(i)] for i in batch.ids)
        noise = np.stack([np.random.default_rng(seed).random(self.model.num_tokens) for seed in seeds])
        return random_mask(torch.from_numpy(noise), self.checkpoint.recipe.mask_ratio)

    def reconstruction_errors(
        self, batch: Batch, mask: Bool[Tensor, "batch token"] | None = None
    ) -> Float[Tensor, " batch"]:
        """Reconstruction error of each image, under a mask that depends on the image alone.

        Args:
            batch: From ``batches``.
            mask: What ``masks`` gives, where it is kept for many passes.

        Returns:
            Mean square over the hidden patches, in normalised pixels squared; no decoder is a ValueError.
        """
        decoder = self.require_decoder()
        mask = self.masks(batch) if mask is None else mask
        return reconstruction_error(self.model, decoder, batch.images, mask, self.checkpoint.recipe.norm_pix)

    def require_decoder(self) -> nn.Module:
        """The decoder.

        Returns:
            In eval mode.

        Raises:
            ValueError: If the checkpoint has none.
        """
        if self.decoder is None:
            raise ValueError(
                f"{self.checkpoint.path} must hold a decoder for the reconstruction error, got none; "
                "use --loss cross_entropy, or a checkpoint of ssat or ssl_ft."
            )
        return self.decoder

    def parameters(self, term: str = "cross_entropy") -> dict[str, nn.Parameter]:
        """Trainable parameters that a loss may depend on, by name.

        Args:
            term: As for ``loss``.

        Returns:
            Those of the encoder and head, and of the decoder behind ``decoder.`` unless the loss is the cross-entropy.
        """
        modules = {"": self.model} if term == "cross_entropy" else {"": self.model, "decoder.": self.decoder}
        return {
            prefix + name: parameter
            for prefix, module in modules.items()
            if module is not None
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def _augmented(self, pixels: Tensor, number: int) -> Tensor:
        """One image as in training, by its id."""
        seed = np.random.SeedSequence([self.sample.sample_seed, number]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(seed >> 1))
        return augment(pixels, self.checkpoint.recipe.augmentation, self.checkpoint.facts, generator)


def device_of(name: str) -> torch.device:
    """Device by name; an empty name is the fastest one with float64, in which probes accumulate.

    Args:
        name: ``cpu``, ``cuda``, ``cuda:1`` or empty.

    Returns:
        The device.

    Raises:
        ValueError: If there is no such device here, or it has no float64.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name, dtype=torch.float64).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device must be one that is here and has float64, got {name!r}; use cpu, or leave it out."
        ) from error


def _few(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def refuse_idle_data_dir(paths: Sequence[Path | str], sample: Sample, source: Source = Source()) -> None:
    """Refuse, by a ValueError, a folder of images where every data set that is used is embedded.

    Args:
        paths: Checkpoints that are to be looked at.
        sample: Which images, and the folder.
        source: What is said about foreign weights.
    """
    if sample.data_dir is None:
        return
    names = {source.trained_on, sample.data}
    if not sample.data:
        names |= {open_weights(path, source, data_dir=sample.data_dir).recipe.data for path in paths}
    if names := names - {""}:
        refuse_idle_options(sorted(names), sample.data_dir, download=False)
