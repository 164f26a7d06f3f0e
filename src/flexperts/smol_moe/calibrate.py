"""Computing a partition asset: observe a dense model on generic texts, cluster neurons, fit routers."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flexperts.errors import ModelError
from flexperts.smol_moe.neuron_partition import NeuronPartition

if TYPE_CHECKING:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from flexperts.smol_moe.dense import DenseModel

    _Tape = tuple[list[torch.Tensor], list[torch.Tensor]]

Floats = NDArray[np.float32]
ROUNDS = 100
TEXTS = Path(__file__).parent / "texts"


@dataclass(frozen=True)
class SplitShape:
    """The sizes of a split.

    Attributes:
        layers: Layers to split.
        shared: Number of neurons of the shared part.
        experts: Number of routed experts of a layer.
        top_k: Number of active routed experts.
        router_scale: Standard deviation of the router's logits over tokens and experts.
        ridge: Ridge penalty, as a fraction of the mean squared FFN input.
        restarts: Number of k-means starts, of which the one with the least squared distance is kept.
    """

    layers: tuple[int, ...] = (4, 9, 14, 19, 24, 29)
    shared: int = 768
    experts: int = 8
    top_k: int = 2
    router_scale: float = 0.01
    ridge: float = 0.01
    restarts: int = 8


SMOL_MOE = SplitShape()


@dataclass(frozen=True)
class Observed:
    """Activations of one FFN layer on the calibration texts.

    Attributes:
        inputs: FFN inputs [tokens, hidden].
        hidden: Activations before down_proj [tokens, ffn].
        groups: The text group of each token [tokens].
        down: down_proj's weight [hidden, ffn].
    """

    inputs: torch.Tensor
    hidden: torch.Tensor
    groups: torch.Tensor
    down: torch.Tensor


def observe(model: LlamaForCausalLM, rows: list[list[int]], layers: tuple[int, ...]) -> dict[int, Observed]:
    """Run the dense model on texts and record its FFN layers' inputs and activations.

    The first token of each row is left out: it is an attention sink, with extreme activations that do not depend on
    the text.

    Args:
        model: The dense model.
        rows: Token ids of each text group.
        layers: The layers to record.
    """
    import torch

    seen: dict[int, _Tape] = {layer: ([], []) for layer in layers}
    hooks = [hook for layer, tape in seen.items() for hook in _record(model.model.layers[layer].mlp, tape)]
    with torch.inference_mode():
        for row in rows:
            model(input_ids=torch.tensor([row]), use_cache=False)
    for hook in hooks:
        hook.remove()
    groups = torch.cat([torch.full((len(row) - 1,), index) for index, row in enumerate(rows)])
    downs = {layer: model.model.layers[layer].mlp.down_proj.weight.detach() for layer in layers}
    return {
        layer: Observed(torch.cat(inputs), torch.cat(hidden), groups, downs[layer])
        for layer, (inputs, hidden) in seen.items()
    }


def _record(mlp: Any, tape: _Tape) -> list[Any]:
    inputs, hidden = tape
    return [
        mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0, 1:])),
        mlp.down_proj.register_forward_pre_hook(lambda _, args: hidden.append(args[0][0, 1:])),
    ]


def contribution(layer: Observed) -> torch.Tensor:
    """Return how much each neuron adds to the layer's output at each token: |h| * ||down||, [tokens, ffn]."""
    added: torch.Tensor = layer.hidden.abs() * layer.down.norm(dim=0)
    return added


def profiles(layer: Observed, neurons: torch.Tensor) -> Floats:
    """Return each neuron's mean contribution per text group, relative to its mean over groups.

    Args:
        layer: The layer's activations.
        neurons: Neuron ids [n].

    Returns:
        Rows of unit length and zero mean [n, groups].
    """
    import torch

    each = contribution(layer)[:, neurons]
    count = int(layer.groups.max()) + 1
    means = torch.stack([each[layer.groups == group].mean(dim=0) for group in range(count)], dim=1)
    logs = means.clamp_min(1e-8).log()
    logs = logs - logs.mean(dim=1, keepdim=True)
    rows: Floats = (logs / logs.norm(dim=1, keepdim=True).clamp_min(1e-8)).numpy().astype(np.float32)
    return rows


def assign_balanced(distances: Floats, size: int) -> NDArray[np.int64]:
    """Assign each point to the nearest cluster with room; points with the largest gap to their second choice first.

    Args:
        distances: Squared distances [points, clusters], points = size * clusters.
        size: Number of points of each cluster.

    Returns:
        The cluster of each point [points]; every cluster has `size` points.
    """
    points, clusters = distances.shape
    best = np.sort(distances, axis=1)
    labels = np.full(points, -1, dtype=np.int64)
    room = np.full(clusters, size)
    choices = np.argsort(distances, axis=1, kind="stable")
    for point in np.argsort(best[:, 0] - best[:, min(1, clusters - 1)], kind="stable"):
        labels[point] = next(cluster for cluster in choices[point] if room[cluster] > 0)
        room[labels[point]] -= 1
    return labels


def balanced_kmeans(points: Floats, clusters: int, seed: int, restarts: int = 1) -> NDArray[np.int64]:
    """Run k-means with clusters of equal size.

    Args:
        points: Rows to cluster [n, features]; n must be a multiple of clusters.
        clusters: Number of clusters.
        seed: Seed of the choice of starting rows.
        restarts: Number of starts, of which the one with the least squared distance is kept.

    Returns:
        The cluster of each row [n].
    """
    draw = np.random.default_rng(seed)
    runs = [_one_kmeans(points, clusters, draw) for _ in range(restarts)]
    return min(runs, key=lambda run: run[0])[1]


def _one_kmeans(points: Floats, clusters: int, draw: np.random.Generator) -> tuple[float, NDArray[np.int64]]:
    centres = points[draw.choice(len(points), clusters, replace=False)]
    labels = np.full(len(points), -1, dtype=np.int64)
    for _ in range(ROUNDS):
        distances = ((points[:, None, :] - centres[None]) ** 2).sum(axis=2)
        new = assign_balanced(distances, len(points) // clusters)
        if np.array_equal(new, labels):
            break
        labels = new
        centres = np.stack([points[labels == cluster].mean(axis=0) for cluster in range(clusters)])
    return float(distances[np.arange(len(points)), labels].sum()), labels


def split_layer(layer: Observed, shape: SplitShape, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose a layer's shared neurons and cluster the others.

    Returns:
        Neuron ids of the shared part, int16 [S], and of the experts, int16 [E, W]; each ascending.
    """
    import torch

    order = contribution(layer).mean(dim=0).argsort(descending=True, stable=True)
    shared, rest = order[: shape.shared].sort().values, order[shape.shared :].sort().values
    labels = torch.from_numpy(balanced_kmeans(profiles(layer, rest), shape.experts, seed, shape.restarts))
    routed = torch.stack([rest[labels == expert] for expert in range(shape.experts)])
    return shared.to(torch.int16), routed.to(torch.int16)


def fit_router(layer: Observed, routed: torch.Tensor, ridge: float) -> torch.Tensor:
    """Fit a router by ridge regression of each expert's standardised output norm on the FFN input.

    The norms are standardised per expert, so that an expert with large outputs everywhere is not preferred.

    Args:
        layer: The layer's activations.
        routed: Neuron ids of the experts [E, W].
        ridge: Penalty, as a fraction of the mean squared input.

    Returns:
        Router weights [E, hidden] whose logits have standard deviation 1 over the texts.
    """
    import torch

    strengths = torch.stack([_strength(layer, ids.long()) for ids in routed], dim=1)
    strengths = (strengths - strengths.mean(dim=0)) / strengths.std(dim=0)
    gram = layer.inputs.T @ layer.inputs
    penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram))
    weights: torch.Tensor = torch.linalg.solve(gram + penalty, layer.inputs.T @ strengths).T
    return weights / (layer.inputs @ weights.T).std()


def _strength(layer: Observed, ids: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = (layer.hidden[:, ids] @ layer.down[:, ids].T).norm(dim=1)
    return norms


def read_texts(folder: Path = TEXTS) -> dict[str, str]:
    """Return the shipped calibration texts: group name -> text."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))}


def texts_sha256(texts: Mapping[str, str]) -> str:
    """Return the hex SHA-256 of names and texts, in name order."""
    parts = [f"{name}\0{texts[name]}\0" for name in sorted(texts)]
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def compute_partition(
    dense: DenseModel, texts: Mapping[str, str], seed: int = 0, shape: SplitShape = SMOL_MOE
) -> NeuronPartition:
    """Compute the partition of a dense model from texts.

    The same seed gives the same result on one machine; on another, floating-point order may differ.

    Args:
        dense: The dense model and its tokenizer.
        texts: Group name -> text.
        seed: Seed of the clustering.
        shape: The sizes.

    Returns:
        The partition, with the seed, the sizes and the sha256 of texts and weights in its metadata.
    """
    import torch

    _check_shape(shape, dense.config)
    rows = [list(dense.tokenizer(texts[name])["input_ids"]) for name in sorted(texts)]
    seen = observe(dense.model(), rows, shape.layers)
    splits = [split_layer(seen[layer], shape, seed) for layer in shape.layers]
    shared, routed = (torch.stack(parts) for parts in zip(*splits, strict=True))
    routers = [fit_router(seen[layer], routed[row], shape.ridge) for row, layer in enumerate(shape.layers)]
    about = {
        "seed": seed,
        "shape": asdict(shape),
        "groups": len(rows),
        "tokens": sum(map(len, rows)),
        "texts_sha256": texts_sha256(texts),
        "weights_sha256": dense.source.sha256,
        "weights_origin": dense.source.origin,
    }
    stacked = torch.stack(routers).to(torch.float16)
    return NeuronPartition(shape.layers, shape.top_k, shared, routed, stacked, shape.router_scale, about)


def _check_shape(shape: SplitShape, config: LlamaConfig) -> None:
    layers, neurons = config.num_hidden_layers, config.intermediate_size
    routed = neurons - shape.shared
    fits = min(shape.shared, shape.experts) > 0 and routed > 0 and routed % shape.experts == 0
    if fits and 0 < shape.top_k <= shape.experts and set(shape.layers) <= set(range(layers)):
        return
    raise ModelError(
        f"split of layers {list(shape.layers)} into {shape.shared} shared neurons and {shape.experts} experts, "
        f"top-{shape.top_k}",
        f"the model has {layers} layers of {neurons} neurons, and experts must be of equal size",
        "choose other sizes",
    )
