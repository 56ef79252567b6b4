"""Pictures along a training: what the decoder makes of hidden patches, always of the same images and masks."""

import io
from pathlib import Path

import torch
from jaxtyping import Bool
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

from ssat_probe.images import denormalise, normalise
from ssat_probe.losses import reconstructed
from ssat_probe.patches import grid_of, random_mask, unpatchify
from ssat_probe.recipe import Recipe
from ssat_probe.run import Run
from ssat_probe.table import write_atomically

NUM_IMAGES = 8
GREY = 0.5
"Of hidden patches in the picture of what is visible."
SIDE, GAP = 64, 4
"Pixels on the screen: smaller images are drawn larger, and between images there is white."


def check_pictures(recipe: Recipe, every: int) -> None:
    """Refuse pictures of a training that reconstructs nothing.

    Args:
        recipe: Of the training.
        every: Epochs between two pictures; 0 for none.

    Raises:
        ValueError: If there is nothing to draw, or the number is negative.
    """
    if every < 0 or (every and not (recipe.has_task and recipe.reconstructs)):
        raise ValueError(
            f"pictures_every must be 0 where nothing is reconstructed, and never negative, got {every} for method "
            f"{recipe.method} with task {recipe.task}; leave it out."
        )


def write_pictures(run: Run, stage: str, epoch: int) -> Path | None:
    """Write ``pictures/<stage>-<epoch>.png``, from the main process.

    A row per image, the first eight for validation: the image, what is visible of it, and that with the hidden patches
    as the decoder predicts them. The network is left as it was found.

    Args:
        run: Whose network.
        stage: That is going on.
        epoch: Epochs of it that are finished.

    Returns:
        The file; none from another process, or in a stage that trains no decoder.
    """
    if not run.accelerator.is_main_process or stage == "finetune" or run.decoder is None:
        return None
    device = run.accelerator.device
    images = normalise(run.val.read(range(min(NUM_IMAGES, len(run.val)))).to(device), run.facts)
    noise = torch.rand(len(images), run.encoder.num_tokens, generator=torch.Generator().manual_seed(run.recipe.seed))
    mask = random_mask(noise, run.recipe.mask_ratio)
    modules = run.encoder, run.decoder
    modes = [module.training for module in modules]
    for module in modules:
        module.eval()
    with torch.no_grad():
        predicted = reconstructed(run.encoder, run.decoder, images, mask, run.recipe.norm_pix)
    for module, was_training in zip(modules, modes, strict=True):
        module.train(was_training)
    colours = [denormalise(one, run.facts).float().clamp(0, 1).cpu() for one in (images, predicted)]
    is_hidden = _pixels_of(mask, run.encoder.grid, tuple(images.shape[2:])).expand_as(colours[0])
    visible = torch.where(is_hidden, GREY, colours[0])
    side_by_side = torch.stack([colours[0], visible, colours[1]], dim=1).flatten(0, 1)
    times = max(1, SIDE // min(images.shape[2:]))  # whole pixels, for images too small to be seen
    side_by_side = side_by_side.repeat_interleave(times, 2).repeat_interleave(times, 3)
    picture = make_grid(side_by_side, nrow=3, padding=GAP, pad_value=1.0)
    buffer = io.BytesIO()
    to_pil_image(picture.mul(255).round().byte()).save(buffer, "PNG")
    path = run.folder / "pictures" / f"{stage}-{epoch:05d}.png"
    write_atomically(path, buffer.getvalue())
    return path


def _pixels_of(mask: Tensor, grid: tuple[int, int], size: tuple[int, ...]) -> Bool[Tensor, "batch 1 height width"]:
    """Whether each pixel lies in a hidden patch."""
    patch = size[0] // grid[0], size[1] // grid[1]
    assert grid_of(size, patch) == grid
    return unpatchify(mask[:, :, None].expand(-1, -1, patch[0] * patch[1]).float(), patch, grid) > 0
