"""Stream what passes through target layers into `linalg` accumulators: features going in, gradients coming out.

Hooks live only inside the functions here; they are removed and the model's mode restored when anything raises. No
parameter ever requires a gradient, so quantised and partitioned weights work and no `.grad` of a base weight exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mllm_keeplora import distributed
from mllm_keeplora.linalg import GradientAccumulator, MomentAccumulator

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100


def collect_moments(model: Any, layers: dict[str, Any], batches: Iterable[dict]) -> dict[str, MomentAccumulator]:
    """Second moments of every target layer's input features over all real tokens; padding never counts.

    Args:
        model: what runs, with whatever branches are active.
        layers: name of each target layer -> its module within `model`.
        batches: model inputs; `labels` are not needed and dropped.

    Returns:
        Target layer -> moments. Layers that are fed the very same tensor (q, k, v; gate, up) share one object.

    Raises:
        ValueError: a feature is not finite; the message names the layer.
    """
    import torch

    moments: dict[str, MomentAccumulator] = {}
    for batch in batches:
        inputs_only = {key: value for key, value in batch.items() if key != "labels"}
        with _input_hooks(layers, moments, batch["attention_mask"]), torch.no_grad(), _evaluating(model):
            model(**inputs_only)
    groups = distributed.from_main(_sharing(moments))  # a process without records learns here who shares an input
    _refuse_missing(layers, [name for group in groups for name in group], "saw no input")
    for group in groups:
        shared = moments.get(group[0]) or MomentAccumulator(layers[group[0]].in_features)
        distributed.all_reduce(shared.tensors())
        moments.update(dict.fromkeys(group, shared))
    return {name: moments[name] for name in layers}


def collect_mean_gradients(
    model: Any, layers: dict[str, Any], batches: Iterable[dict]
) -> dict[str, GradientAccumulator]:
    """Mean gradient of the loss with respect to every target weight, from inputs and output gradients.

    The loss of a sample is the mean over its answer tokens, and the gradient is the mean over samples, whatever the
    batches: the same as passes of batch size 1.

    Args:
        model, layers: as in `collect_moments`.
        batches: model inputs with `labels`.

    Raises:
        RuntimeError: a target layer received no gradient.
        ValueError: a gradient is not finite; the message names the layer.

    Source: KeepLoRA, Eq. (2); input side and output side as in torch's (d_out, d_in).
    """
    gradients: dict[str, GradientAccumulator] = {}
    for batch in batches:
        labels = batch["labels"]
        inputs_only = {key: value for key, value in batch.items() if key != "labels"}
        with _gradient_hooks(layers, gradients), _graph_from_inputs(model), _evaluating(model):
            loss = per_sample_loss(model(**inputs_only).logits, labels).sum()
            loss.backward()
        for accumulator in gradients.values():
            accumulator.count_samples(labels.shape[0])
    _refuse_missing(layers, distributed.from_main(list(gradients)), "received no gradient")
    for name, layer in layers.items():
        gradients.setdefault(name, GradientAccumulator(layer.out_features, layer.in_features))
        distributed.all_reduce(gradients[name].tensors())
    return {name: gradients[name] for name in layers}


def per_sample_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross entropy over each sample's supervised tokens.

    Args:
        logits: (b, t, vocabulary).
        labels: (b, t) token ids, -100 where there is no loss.

    Returns:
        (b,) float32.
    """
    import torch.nn.functional as F

    shifted = labels[:, 1:]
    rows, positions = (shifted != IGNORED).nonzero(as_tuple=True)
    token_loss = F.cross_entropy(logits[rows, positions].float(), shifted[rows, positions], reduction="none")
    counts = (shifted != IGNORED).sum(dim=1)
    return token_loss.new_zeros(labels.shape[0]).index_add(0, rows, token_loss) / counts


@contextmanager
def _input_hooks(layers: dict[str, Any], into: dict[str, MomentAccumulator], attention_mask: Tensor) -> Iterator[None]:
    """Add every layer's input rows to its accumulator; the same tensor object is added once for all who receive it."""
    latest: list[tuple[Any, MomentAccumulator]] = []  # holds the tensor itself, so that identity cannot be reused

    def keep(name: str):
        def hook(module: Any, args: tuple) -> None:
            shared = next((accumulator for tensor, accumulator in latest if tensor is args[0]), None)
            if shared is not None:
                assert into.setdefault(name, shared) is shared, f"{name} no longer shares its input"
                return
            accumulator = into.setdefault(name, MomentAccumulator(args[0].shape[-1]))
            _named(name, accumulator.update, _real_rows(args[0].detach(), attention_mask))
            latest[:] = [*latest[-1:], (args[0], accumulator)]

        return hook

    with _removed_afterwards([module.register_forward_pre_hook(keep(name)) for name, module in layers.items()]):
        yield


@contextmanager
def _gradient_hooks(layers: dict[str, Any], into: dict[str, GradientAccumulator]) -> Iterator[None]:
    """Add output gradient times input to every layer's accumulator while the backward pass runs."""

    def keep(name: str):
        def hook(module: Any, args: tuple, output: Tensor) -> None:
            features = args[0].detach()

            def accumulate(gradient: Tensor) -> None:
                if name not in into:
                    into[name] = GradientAccumulator(gradient.shape[-1], features.shape[-1])
                _named(name, into[name].update, _rows(gradient), _rows(features))

            output.register_hook(accumulate)

        return hook

    with _removed_afterwards([module.register_forward_hook(keep(name)) for name, module in layers.items()]):
        yield


@contextmanager
def _graph_from_inputs(model: Any) -> Iterator[None]:
    """Make the graph start at the embeddings and at the images, since no parameter requires a gradient."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)

    def start_graph(module: Any, args: tuple, output: Tensor) -> Tensor:
        return output.detach().requires_grad_(True)

    def start_at_input(module: Any, args: tuple) -> tuple:
        return (args[0].detach().requires_grad_(True), *args[1:])

    handles = [model.get_input_embeddings().register_forward_hook(start_graph)]
    handles += [module.register_forward_pre_hook(start_at_input) for module in _vision_outputs(model)]
    try:
        with _removed_afterwards(handles):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def _removed_afterwards(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _vision_outputs(model: Any) -> list[Any]:
    """The projector: what it receives from the frozen tower must start a graph for its own weights' gradients."""
    from mllm_keeplora.models.parts import PROJECTORS

    return [m for name, m in model.named_modules() if any(name == p or name.endswith(f".{p}") for p in PROJECTORS)]


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _real_rows(features: Tensor, attention_mask: Tensor) -> Tensor:
    """(n, d_in) rows of real tokens; a tensor that is not laid out as (b, t, d_in) carries no padding."""
    if features.shape[:-1] == attention_mask.shape:
        return features[attention_mask.bool()]
    return _rows(features)


def _rows(features: Tensor) -> Tensor:
    return features.reshape(-1, features.shape[-1])


def _named(name: str, update: Any, *rows: Tensor) -> None:
    try:
        update(*rows)
    except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None


def _sharing(moments: dict[str, MomentAccumulator]) -> list[list[str]]:
    """Names of layers by the accumulator that they share."""
    groups: dict[int, list[str]] = {}
    for name, accumulator in moments.items():
        groups.setdefault(id(accumulator), []).append(name)
    return list(groups.values())


def _refuse_missing(layers: dict[str, Any], reached: list[str], what: str) -> None:
    missing = sorted(layers.keys() - set(reached))
    if missing:
        raise RuntimeError(f"{len(missing)} target layers {what}, first {missing[0]}")
