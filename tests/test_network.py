from collections.abc import Callable

import pytest
import torch

from ssat_probe.network import build_decoder, build_encoder, resolve
from ssat_probe.recipe import Recipe

Make = Callable[..., tuple]
METHODS = ("scratch", "ssl_ft", "ssat")


@pytest.mark.parametrize(
    ("img_size", "patch_size", "model", "decoder"),
    [
        ((8, 8), (2, 2), "vit_nano", (2, 16, 4)),
        ((28, 28), (4, 4), "vit_nano", (2, 16, 4)),
        ((64, 96), (8, 8), "vit_tiny", (2, 128, 16)),
        ((224, 224), (16, 16), "vit_small", (2, 128, 16)),
    ],
)
def test_what_is_left_open_is_filled_in_from_the_model_and_the_data(
    make_facts: Make, img_size: tuple[int, int], patch_size: tuple[int, int], model: str, decoder: tuple[int, int, int]
) -> None:
    recipe = resolve(Recipe(model=model), make_facts(img_size))
    assert (recipe.img_size, recipe.patch_size) == (img_size, patch_size)
    assert (recipe.decoder_depth, recipe.decoder_width, recipe.decoder_heads) == decoder
    assert resolve(recipe, make_facts((123, 321))) == recipe


def test_what_is_given_stays(make_facts: Make) -> None:
    recipe = Recipe(img_size=(12, 20), patch_size=(3, 5), decoder_depth=1, decoder_width=20, decoder_heads=5)
    assert resolve(recipe, make_facts((8, 8))) == recipe


def test_a_model_that_does_not_exist_is_named(make_facts: Make) -> None:
    with pytest.raises(ValueError, match=r"No 'vit_tny' in models: .*\. Did you mean 'vit_tiny'\?"):
        resolve(Recipe(model="vit_tny"), make_facts())


def test_a_patch_that_does_not_divide_the_image_is_named(make_facts: Make) -> None:
    with pytest.raises(ValueError, match="image of 8x8 pixels, got 3x3; choose another patch_size or img_size"):
        resolve(Recipe(patch_size=(3, 3)), make_facts())


@pytest.mark.parametrize(("ratio", "state"), [(0.99, "visible"), (0.01, "masked")])
def test_a_mask_ratio_that_leaves_no_token_is_named(make_facts: Make, ratio: float, state: str) -> None:
    with pytest.raises(ValueError, match=f"token of 16, got {ratio}, which leaves no {state} one"):
        resolve(Recipe(mask_ratio=ratio), make_facts())


def test_patches_of_one_value_cannot_be_normalised(make_facts: Make) -> None:
    with pytest.raises(ValueError, match="norm_pix needs patches of at least two values, got patches of one grey pix"):
        resolve(Recipe(model="vit_pico", patch_size=1, norm_pix=True), make_facts((4, 4), 1))
    resolve(Recipe(model="vit_pico", patch_size=1, norm_pix=True), make_facts((4, 4), 3))


def test_what_hides_nothing_may_be_of_one_token(make_facts: Make) -> None:
    for fields in ({"method": "scratch"}, {"task": "contrastive"}, {"lambda_weight": 1.0}):
        assert resolve(Recipe(patch_size=8, **fields), make_facts()).patch_size == (8, 8)  # type: ignore[arg-type]
    for fields in ({"method": "ssl_ft"}, {"method": "ssat"}, {"task": "contrastive", "cls_view": "masked"}):
        with pytest.raises(ValueError, match=r"token of 1, got 0\.75"):
            resolve(Recipe(patch_size=8, **fields), make_facts())  # type: ignore[arg-type]


def test_initial_weights_depend_on_the_seed_alone_and_are_those_of_every_method(make_recipe: Make) -> None:
    def weights(seed: int, method: str, global_seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(global_seed)
        recipe, facts = make_recipe(method=method, seed=seed, lambda_weight=0.3, mask_ratio=0.5, epochs=7)
        return build_encoder(recipe, facts).state_dict() | {
            f"decoder.{name}": value for name, value in build_decoder(recipe, facts).state_dict().items()
        }

    first = weights(5, "ssat", 0)
    for other in (weights(5, method, i) for i, method in enumerate(METHODS)):
        assert first.keys() == other.keys()
        assert all(torch.equal(first[name], other[name]) for name in first)
    other = weights(6, "ssat", 0)
    assert not torch.equal(first["blocks.0.attn.qkv.weight"], other["blocks.0.attn.qkv.weight"])
    assert not torch.equal(first["decoder.pred.weight"], other["decoder.pred.weight"])


def test_building_leaves_the_global_generator_alone(make_recipe: Make) -> None:
    recipe, facts = make_recipe()
    before = torch.get_rng_state()
    build_encoder(recipe, facts)
    build_decoder(recipe, facts)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("img_size", "patch_size", "channels", "num_classes"),
    [((8, 8), (2, 2), 1, 10), ((28, 28), (7, 7), 1, 3), ((12, 20), (3, 5), 3, 7), ((10, 6), (2, 3), 2, 5)],
)
def test_any_image_size_patch_and_number_of_channels(
    make_recipe: Make, img_size: tuple[int, int], patch_size: tuple[int, int], channels: int, num_classes: int
) -> None:
    recipe, facts = make_recipe(img_size, channels, num_classes, patch_size=patch_size, mask_ratio=0.5)
    encoder, decoder = build_encoder(recipe, facts), build_decoder(recipe, facts)
    num_tokens = img_size[0] * img_size[1] // patch_size[0] // patch_size[1]
    images = torch.zeros(2, channels, *img_size)
    mask = torch.zeros(2, num_tokens, dtype=torch.bool)
    mask[0, ::2] = mask[1, 1::2] = True
    if num_tokens % 2:
        mask[1, 0] = True
    assert encoder(images).shape == (2, num_classes)
    predicted = decoder(encoder.encode(images, mask))
    assert predicted.shape == (2, num_tokens, patch_size[0] * patch_size[1] * channels)
