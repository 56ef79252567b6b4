"""Architecture of foreign weights: timm's by name, or a Vision Transformer told by names and shapes."""

import difflib
import math
import re
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ssat_probe.formats import Converted
from ssat_probe.hub import fetching
from ssat_probe.models import vit
from ssat_probe.patches import grid_of, patchify
from ssat_probe.source import Source

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16}
"Heads by width: Touvron et al. (2021), Dosovitskiy et al. (2021), Zhai et al. (2022). Else the width divided by 64."

MOST_BLOCKS = 256


class NormedPatches(nn.Module):
    """Patch embedding of vit-pytorch: norm of a patch's pixels, linear map, norm."""

    def __init__(self, plain: Any, eps: float) -> None:
        """Make it in place of timm's.

        Args:
            plain: timm's patch embedding, whose projection and sizes it takes over.
            eps: Of the norms.
        """
        super().__init__()
        self.proj, self.grid_size, self.num_patches = plain.proj, plain.grid_size, plain.num_patches
        self.patch_size, self.img_size = plain.patch_size, plain.img_size
        self.norm_pixels = nn.LayerNorm(math.prod(self.proj.weight.shape[1:]), eps=eps)
        self.norm = nn.LayerNorm(len(self.proj.weight), eps=eps)

    def forward(self, images: Float[Tensor, "batch channel height width"]) -> Float[Tensor, "batch token dim"]:
        """Tokens in raster order.

        Args:
            images: Normalised.

        Returns:
            One per patch.
        """
        weight = self.proj.weight.permute(0, 2, 3, 1).flatten(1)  # pixels outer, channels inner, as patchify
        pixels = self.norm_pixels(patchify(images, self.patch_size))
        return self.norm(nn.functional.linear(pixels, weight, self.proj.bias))


def timm_model(name: str, source: Source, num_classes: int | None, **more: Any) -> nn.Module:
    """A model of timm's by name, with fresh weights unless ``more`` says otherwise.

    Args:
        name: As timm knows it, without ``timm:``.
        source: Image and patch size, where they are given.
        num_classes: Of the head; 0 for none, None for the model's own.
        more: For ``timm.create_model``.

    Returns:
        The model, in training mode.

    Raises:
        ValueError: If timm has no such model, or it cannot be made in this size.
    """
    if not timm.is_model(name):
        nearest = _nearest(name)
        hint = f" Did you mean {nearest!r}?" if nearest else ""
        raise ValueError(f"model must be one that timm {timm.__version__} knows, got {name!r}.{hint}")
    options: dict[str, Any] = dict(more)
    options |= {"img_size": tuple(source.img_size)} if source.img_size else {}
    options |= {"patch_size": source.patch_size[0]} if source.patch_size else {}
    options |= {"num_heads": source.heads} if source.heads else {}
    options |= {"num_classes": num_classes} if num_classes is not None else {}
    try:
        with fetching(name) if options.get("pretrained") else nullcontext():
            return timm.create_model(name, **options)
    except (TypeError, AssertionError, RuntimeError, OSError) as error:
        said = str(error).strip().split("\n")[0]
        if "img_size" in options and "unexpected keyword argument 'img_size'" in said:
            return _of_any_size(name, options)
        raise ValueError(f"timm:{name} must be made with {options or 'no options'}, but timm says: {said}") from error


def _of_any_size(name: str, options: dict[str, Any]) -> nn.Module:
    """A model that takes images of any size, such as PVT and ConvNets, which is told the size that it will be shown."""
    try:
        model = timm.create_model(name, **{key: value for key, value in options.items() if key != "img_size"})
    except TypeError as error:
        raise ValueError(f"timm:{name} must be made with {options}, but timm says: {error}") from error
    model.img_size = options["img_size"]
    return model


def _nearest(name: str) -> str:
    """The name of timm's that is most like another; for a part of a name the shortest that goes on from there."""
    known = timm.list_models()
    whole = difflib.get_close_matches(name, known, n=1, cutoff=0.9)
    begins = difflib.get_close_matches(name, sorted({one[: len(name)] for one in known}), n=1, cutoff=0.7)
    longer = sorted((one for one in known if begins and one.startswith(begins[0])), key=len)
    return (whole or longer or difflib.get_close_matches(name, known, n=1, cutoff=0.5) or [""])[0]


def num_classes_of(state: Mapping[str, Tensor]) -> int:
    """Classes of the head among foreign weights.

    Args:
        state: Tensors by timm's names.

    Returns:
        0 where there is no head.
    """
    for name in ("head.weight", "head.fc.weight", "fc.weight", "classifier.weight"):
        if name in state and state[name].ndim >= 2:
            return state[name].shape[0]
    return 0


def shape_of(state: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Shape of a tensor that tells the architecture.

    Args:
        state: Tensors by timm's names.
        name: Which one.
        axes: How many axes it must have.

    Returns:
        The shape.

    Raises:
        ValueError: If there is none, or it has other axes or none of some length.
    """
    shape = tuple(state[name].shape) if name in state else None
    if shape is None or len(shape) != axes or not all(shape):
        raise ValueError(
            f"{name!r} must have {axes} axes to tell the model, got {'none' if shape is None else f'shape {shape}'}; "
            "name the model with --model timm:NAME."
        )
    return shape


def inferred_model(converted: Converted, source: Source) -> nn.Module:
    """Vision Transformer that foreign weights belong to, from their names and shapes.

    Args:
        converted: The weights.
        source: Image size, patch size and heads, where they are given.

    Returns:
        The model with random weights: ours where there is a decoder to feed, else timm's. Shapes that do not tell are
        a ValueError.
    """
    state = converted.encoder
    options = _architecture(converted, source)
    if converted.decoder:
        model: nn.Module = vit.Model(
            img_size=options["img_size"], patch_size=options["patch_size"], channels=options["in_chans"],
            num_classes=max(options["num_classes"], 1), dim=options["embed_dim"], depth=options["depth"],
            heads=options["num_heads"], mlp_ratio=options["mlp_ratio"],
        )  # fmt: skip
        if not options["num_classes"]:
            model.head = nn.Identity()
    elif "dist_token" in state:
        model = VisionTransformerDistilled(**options)
    else:
        model = _plain(options, state["blocks.0.attn.qkv.weight"].shape[0] // 3)
    if converted.patches_normed:
        model.patch_embed = NormedPatches(model.patch_embed, converted.norm_eps)
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.eps = converted.norm_eps
    return model


def _plain(options: dict[str, Any], inner: int) -> nn.Module:
    """Vision Transformer of timm's, also where its heads together are wider or narrower than its tokens."""
    dim, heads = options["embed_dim"], options["num_heads"]
    if inner == dim:
        return VisionTransformer(**options)
    model = VisionTransformer(**options | {"num_heads": 1, "qk_norm": False})
    for block in model.blocks:
        block.attn = Attention(
            dim, heads, attn_head_dim=inner // heads, qkv_bias=options["qkv_bias"], qk_norm=options["qk_norm"],
            norm_layer=nn.LayerNorm,
        )  # fmt: skip
    return model


def _architecture(converted: Converted, source: Source) -> dict[str, Any]:
    """Arguments of timm's Vision Transformer."""
    state = converted.encoder
    dim, channels, *stored_patch = shape_of(state, "patch_embed.proj.weight", 4)
    patch = tuple(source.patch_size or stored_patch)
    inner = shape_of(state, "blocks.0.attn.qkv.weight", 2)[0] // 3
    blocks = {int(found[1]) for name in state if (found := re.match(r"blocks\.(\d+)\.", name))}
    if max(blocks) + 1 > MOST_BLOCKS:
        raise ValueError(f"The weights must have at most {MOST_BLOCKS} blocks, got block {max(blocks)}; no model has.")
    head_dim = converted.head_dim
    if "blocks.0.attn.q_norm.weight" in state:
        head_dim = shape_of(state, "blocks.0.attn.q_norm.weight", 1)[0]
    heads = source.heads or (inner // head_dim if head_dim else HEADS.get(dim) or dim // 64)
    if not heads or inner % heads:
        raise ValueError(
            f"The weights must tell their attention heads, got a width of {dim} that has no usual number of them; "
            "give it with --heads, or name the model with --model timm:NAME."
        )
    has_class, num_registers = "cls_token" in state, _num_registers(state)
    num_prefix = has_class + num_registers + ("dist_token" in state)
    img_size, embeds_all = _img_size(state, source, (stored_patch[0], stored_patch[-1]), num_prefix)
    pools = "fc_norm.weight" in state or not has_class
    return {
        "img_size": img_size, "patch_size": patch, "in_chans": channels, "num_classes": num_classes_of(state),
        "embed_dim": dim, "depth": max(blocks) + 1, "num_heads": heads,
        "mlp_ratio": shape_of(state, "blocks.0.mlp.fc1.weight", 2)[0] / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state, "qk_norm": "blocks.0.attn.q_norm.weight" in state,
        "init_values": 1.0 if "blocks.0.ls1.gamma" in state else None, "class_token": has_class,
        "pos_embed": "learn" if "pos_embed" in state else "none", "no_embed_class": not embeds_all,
        "reg_tokens": num_registers, "pre_norm": "norm_pre.weight" in state,
        "global_pool": "avg" if pools else "token", "fc_norm": "fc_norm.weight" in state,
    }  # fmt: skip


def _num_registers(state: Mapping[str, Tensor]) -> int:
    return shape_of(state, "reg_token", 3)[1] if "reg_token" in state else 0


def _img_size(
    state: Mapping[str, Tensor], source: Source, stored_patch: tuple[int, int], num_prefix: int
) -> tuple[tuple[int, int], bool]:
    """Height and width of the images, and whether the tokens before the patches have positions too."""
    if "pos_embed" not in state:
        if not source.img_size:
            raise ValueError("The weights hold no positions that tell the image size; give it with --img-size.")
        return (source.img_size[0], source.img_size[1]), True
    length = shape_of(state, "pos_embed", 3)[1]
    given = source.img_size
    patch = source.patch_size or stored_patch
    if given:  # no resampling where the positions fit as they are
        num_patches = math.prod(grid_of(given, patch))
        if length in (num_patches, num_patches + num_prefix):
            return (given[0], given[1]), length == num_patches + num_prefix
    sides = {prefix: math.isqrt(length - prefix) for prefix in (num_prefix, 0) if length > prefix}
    found = [(prefix, side) for prefix, side in sides.items() if side * side == length - prefix]
    if not found:
        raise ValueError(
            f"'pos_embed' must be {num_prefix} positions and a square of patches, got {length} positions; "
            "give the height and width with --img-size."
        )
    prefix, side = found[0]
    size = given or (side * stored_patch[0], side * stored_patch[1])
    return (size[0], size[1]), prefix == num_prefix


def seeded(seed: int, make: Callable[[], nn.Module]) -> nn.Module:
    """What a function makes with torch's generator at a seed, which is as before afterwards.

    Args:
        seed: Of the generator.
        make: Called without arguments.

    Returns:
        Its result.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()
