"""Part 1: one Hessian-vector product in units of one gradient."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from curvature_models import Row, Task, alternating, attempted, nano, peer, random_vectors, tiny
from matplotlib.axes import Axes
from pandas import DataFrame
from torch.nn.attention import SDPBackend, sdpa_kernel

BATCHED: dict[str, tuple[int, ...]] = {"vit_nano": (4, 16), "ViT-T/4": ()}
REPEATS = {"vit_nano": 25, "ViT-T/4": 9}
TARGETS = {
    ("ViT-T/4", "cached"): 2.1,
    ("ViT-T/4", "fresh"): 3.1,
    ("vit_nano", "batched 16"): 2.1,
    ("vit_nano", "fresh"): 3.1,
}
FLOOR = 2.0  # gradients, in matrix products: the forward and the backward pass, each differentiated once more
BATCH = 64


def measure() -> Iterator[Row]:
    """Seconds of a gradient and of a product (per vector) by each way."""
    for make in (nano, tiny):
        task = make(BATCH)
        cached = task.operator
        with cached:
            for way, repeat, seconds in alternating(_ways(task, cached), REPEATS[task.name]):
                seconds /= int(way.split()[1]) if way.startswith("batched") else 1
                yield {"model": task.name, "way": way, "quantity": "seconds", "repeat": repeat, "value": seconds}


def _ways(task: Task, cached: Any) -> dict[str, Callable[[], Any]]:
    fresh, size = task.operator, cached.size
    vector = random_vectors(size)[0]
    ways: dict[str, Callable[[], Any]] = {
        "gradient": task.gradient,
        "cached": lambda: cached.product(vector),
        "fresh": lambda: fresh.product(vector),
    }
    for num in BATCHED[task.name]:
        vectors = random_vectors(size, num)
        ways[f"batched {num}"] = lambda vectors=vectors: cached.products(vectors)
    peers = {"PyHessian": ("pyhessian", _pyhessian), "curvlinops": ("curvlinops", _curvlinops)}
    for name, (module, make) in peers.items():
        if peer(module) and (way := attempted(name, lambda make=make: make(task))):
            ways[name] = way
    return ways


def _curvlinops(task: Task) -> Callable[[], Any]:
    """Its product, in the dtype of the model."""
    import curvlinops

    parameters, data = list(task.parameters.values()), [(task.images, task.labels)]
    loss = torch.nn.CrossEntropyLoss()
    theirs = curvlinops.HessianLinearOperator(task.model, loss, parameters, data, check_deterministic=False)
    single = random_vectors(sum(one.numel() for one in parameters))[0].to(parameters[0].dtype)

    def multiply() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return theirs @ single

    return multiply


def _pyhessian(task: Task) -> Callable[[], Any]:
    """Its product for one batch: second backward pass of a kept graph, in the dtype of the model."""
    from pyhessian.utils import hessian_vector_product

    parameters = list(task.parameters.values())
    with sdpa_kernel(SDPBackend.MATH):
        loss = task.loss()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    vectors = [torch.randn_like(one) for one in parameters]
    return lambda: hessian_vector_product(gradients, parameters, vectors)


def ratios(table: DataFrame) -> Iterator[tuple[str, str, str, list[float], str]]:
    """Product over gradient, repeat by repeat: part, what, model, values, target."""
    for model, rows in table.groupby("model", sort=False):
        wide = rows.pivot_table(index="repeat", columns="way", values="value", sort=False)
        for way in wide.columns.drop("gradient"):
            target = f"≤ {TARGETS[model, way]}" if (model, way) in TARGETS else ""
            values = (wide[way] / wide["gradient"]).tolist()
            yield "product", f"one product, {way}, in gradients", f"{model}, batch {BATCH}", values, target


def draw(ax: Axes, table: DataFrame) -> None:
    """A dot per repeat, the matrix products of a double backward beside."""
    found = [(what.split(", ")[1], model, values) for _, what, model, values, _ in ratios(table)]
    ways = list(dict.fromkeys(way for way, _, _ in found))
    for place, model in enumerate(dict.fromkeys(model for _, model, _ in found)):
        for way, which, values in found:
            if which == model:
                ys = [ways.index(way) + 0.25 * (place - 0.5)] * len(values)
                ax.plot(values, ys, "os"[place], color=f"C{place}", alpha=0.6, label=model)
    ax.axvline(FLOOR, color="black", linewidth=0.8, label="matrix products alone")
    ax.set_yticks(range(len(ways)), ways)
    ax.invert_yaxis()
    ax.set(xlabel="product / gradient", title="One product")
