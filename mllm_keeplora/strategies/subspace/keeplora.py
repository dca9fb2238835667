"""KeepLoRA (+ with `prototypes`, ++ with `layer_scale`): train outside main directions of weights and past features.

Kept are the leading input directions of the pre-trained weights and the dominant feature directions of past domains
(and of an anchor set, if one is named); A spans the top of the residual of the domain's mean gradient and stays frozen,
only B is trained. KeepLoRA++ scales each layer's update by its depth; KeepLoRA+ trains, beside B, a vector for each
class of a dual encoder, to which pictures are compared beside the classes' texts.
Source: KeepLoRA (ICLR 2026, arXiv 2601.19659), Eqs. (1)-(10), and KeepLoRA++ (arXiv 2606.16256), Eq. (11), by the
numbers of docs/keeplora.md; anchors are our own. CorDA's knowledge-preserving mode, AlphaEdit and LLaVA-c keep the
features of general data, too, by other means.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from mllm_keeplora.errors import UserError
from mllm_keeplora.probes.plans import GradientPlan
from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.footprint import ALWAYS, Footprint, PassSizes, feature_pass, gradient_pass
from mllm_keeplora.strategies.subspace.deciding import decided_features
from mllm_keeplora.strategies.subspace.keeplora_options import PRESETS, KeepLoRAOptions
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.prototypes import Prototypes
    from mllm_keeplora.linalg import Basis, FrequentDirections
    from mllm_keeplora.probes.plans import Features


class KeepLoRA(Strategy):
    """Stores per domain: A, B, the basis columns that the domain added, and with `max_kept` those that it gave up."""

    Options: ClassVar[type[StrategyOptions]] = KeepLoRAOptions
    presets: ClassVar[dict[str, dict]] = PRESETS
    options: KeepLoRAOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.usage: dict[str, Tensor] = {}  # layer -> summed energy share of past domains along each feature direction

    @property
    def trains(self) -> tuple[str, ...]:
        return ("B",) if self.options.freeze_a else ("A", "B")

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate decompositions of the weights, a gradient pass before the domain, a feature pass behind it."""
        options, decomposition = self.options, {"decomposition": sizes.decomposition()}
        if options.feature_source == "activations":
            after = feature_pass(sizes, options.feature_statistic, options.feature_sketch_size)
        else:
            after = gradient_pass(sizes, exact=True) | decomposition
        exact = options.gradient_plan().statistic == "exact"
        before = gradient_pass(sizes, exact, options.sketch_width)
        always = {"kept bases": sizes.kept_bases()}
        return {ALWAYS: always, "prepare": decomposition, "gradient": before, "consolidate": after}

    def prepare(self, context: Context) -> None:
        """Keep the principal input subspace of every layer's weight, Eq. (1); then what the anchors add."""
        from mllm_keeplora.linalg import Basis, principal_subspace

        layers, is_legacy = context.layers, self.options.weight_side == "output_legacy"
        self.options.refuse_idle_patterns(layers.names)
        sizes = {layer: (layers.d_out(layer), layers.d_in(layer)) for layer in layers.names}
        self.options.refuse_unfit(sizes, {layer: layers.tower(layer) for layer in layers.names})

        # 1. Of each weight the leading directions; the processes deal the layers out among themselves.
        def principal(layer: str, weight: Tensor) -> Tensor:
            energy = self.options.threshold("energy_weights", layer)
            columns = principal_subspace(weight.mT if is_legacy else weight, energy, self.options.rank_rule)
            return columns.cpu()  # those of all layers would take much of a GPU

        for layer, columns in context.processes.dealt(layers.weight, principal).items():
            context.kept[layer] = Basis.from_columns(columns)
        # 2. Layers with the same input keep the same, if so asked: the span of what each keeps of its weight.
        for first, *others in layers.groups() if self.options.share_basis == "input" else ():
            for layer in others:
                context.kept[first].grow(context.kept[layer].columns.mT, energy=1.0)
            for layer in others:
                context.kept[layer] = Basis.from_columns(context.kept[first].columns)
        for basis in context.kept.values():
            basis.round_last(basis.rank, self.options.torch_dtype())
        # 3. What the features of anchors add.
        if self.options.anchors:
            added = {}
            for features in self._features(context, self.options.anchor_samples, "energy_anchor", self.options.anchors):
                added |= self._grow(context, features, "energy_anchor")
            context.log({"added_by_anchors": added})

    def before_domain(self, context: Context) -> Branch:
        """Begin A by the residual mean gradient, Eqs. (2)-(4), and B by 0, Eq. (5b), or S V^T, Eq. (5a).

        Weights are (d_out, d_in) here, the transpose of the paper's, so S V^T of the residual is G A^T.
        """
        import torch

        from mllm_keeplora.linalg import gradient_capture

        # 1. Mean gradients, or random rows in their place.
        options, layers = self.options, context.layers
        gradients = context.passes.gradients(options.grad_samples, options.gradient_plan())
        noise = {}  # rows to draw random directions from, where A does not come from gradients
        for layer in layers.names if options.a_init != "gradient" else ():
            noise[layer] = torch.randn(2 * options.rank, layers.d_in(layer), generator=context.rng)

        # 2. Where each layer starts.
        def begin(layer: str, gradient: Any) -> dict[str, Any]:
            kept = context.kept[layer]
            directions = self._directions(kept, gradient, noise.get(layer))
            split = gradient_capture(gradient, kept, directions)
            facts = {"rank": directions.shape[0], "kept": kept.rank, **split}
            B = gradient.mean.float() @ directions.to(gradient.mean).mT if options.b_init == "gradient" else None
            return {"A": directions, "B": B, "facts": facts}

        starts = context.processes.dealt(gradients.get, begin)
        facts = {layer: start["facts"] for layer, start in starts.items()}
        # 3. A layer without any direction left gets no adapter.
        A = {layer: start["A"] for layer, start in starts.items() if len(start["A"]) > 0}
        B = {layer: starts[layer]["B"] for layer in A} if options.b_init == "gradient" else {}
        self._warn_of_exhaustion(context, facts)
        # 4. Scales: by depth, and not by the number of directions that a layer has.
        scaling = options.alpha / options.rank
        depths, towers = ({layer: of(layer) for layer in layers.names} for of in (layers.depth, layers.tower))
        scales = options.layer_scales(depths, towers)
        alpha = {layer: scaling * scales[layer] * directions.shape[0] for layer, directions in A.items()}
        context.log({"gradient": facts, "layer_scale": scales})
        return Branch(A, alpha, self.trains, B, prototypes=self._prototypes(context))

    def after_domain(self, context: Context) -> None:
        """Grow every kept basis by the domain's dominant feature directions, Eqs. (8)-(10)."""
        samples, bounded = self.options.feature_samples, self.options.max_kept is not None
        if self.options.feature_source == "post_gradient":
            exact = GradientPlan("exact", spacing=self.options.sample_spacing)
            some_layers = iter([context.passes.gradients(samples, exact)])
        else:
            some_layers = self._features(context, samples, "energy_features")
        added: dict[str, int] = {}
        forgotten: dict[str, int] = {}
        for features in some_layers:
            grown = self._grow(context, features, "energy_features")
            if bounded:
                forgotten |= self._forget_least_used(context, features, grown)
            added |= grown
        context.log({"added": added, "forgotten": forgotten} if bounded else {"added": added})

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.usage)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.usage = dict(state)

    # -- parts of the above --------------------------------------------------------------------------------------

    def _prototypes(self, context: Context) -> Prototypes | None:
        """Begin prototypes at the mean of each class's pictures, as the model sees them before the domain."""
        if self.options.prototypes is None:
            return None
        classes = context.data.records[0].classes
        means = context.passes.class_means()
        return means.prototypes(classes.names, classes.digest, self.options.prototype_scale)

    def _directions(self, kept: Basis, gradient: Any, noise: Tensor | None) -> Tensor:
        """Find rows of A (r', d_in); none where the layer is to be left alone."""
        from mllm_keeplora.linalg import Basis, top_residual_directions

        options = self.options
        if noise is None:
            found = top_residual_directions(gradient, kept, options.rank, options.randomized())
        else:
            avoided = kept if options.a_init == "random_complement" else Basis(kept.d_in)
            found = top_residual_directions(noise, avoided, options.rank)
        if found.shape[0] < options.rank and options.on_exhaustion == "freeze_module":
            found = found[:0]
        return found.to(options.torch_dtype()).float()

    def _features(
        self, context: Context, samples: int | float, name: str, of: tuple[str, ...] = ()
    ) -> Iterator[Features]:
        """Give feature statistics, some layers at a time, that decide how far each layer's threshold reaches.

        Args:
            context, samples: whose records, and how many of them.
            name: of the option that holds the threshold.
            of: anchor sets; none for the domain's own records.
        """

        def decides(layer: str, sketch: FrequentDirections) -> bool:
            energy = self.options.threshold(name, layer)
            return context.kept[layer].is_decided(sketch, energy, self.options.energy_reference)

        return decided_features(context, samples, self.options.feature_plan(), decides, of)

    def _grow(self, context: Context, features: dict, name: str) -> dict[str, int]:
        def missing(layer: str, source: Any) -> Tensor:
            energy = self.options.threshold(name, layer)
            return context.kept[layer].missing(_rows(source), energy, self.options.energy_reference)

        added = context.processes.dealt(features.get, missing, features)
        for layer, columns in added.items():
            context.kept[layer].append(columns)
            context.kept[layer].round_last(columns.shape[1], self.options.torch_dtype())
        return {layer: columns.shape[1] for layer, columns in added.items()}

    def _forget_least_used(self, context: Context, features: dict, added: dict[str, int]) -> dict[str, int]:
        """Give up feature directions beyond `max_kept`, those along which past domains sent the least energy first.

        Every domain counts alike: its features are measured as shares of their energy. What a domain adds competes
        at once; directions of the weights and of anchors are never given up. A basis holds its columns in the order
        weights, anchors, past domains, this domain; usage is counted for the last two.
        """
        import torch

        forgotten = {}
        for layer in features:
            basis = context.kept[layer]
            usage = self.usage.get(layer, torch.zeros(0, dtype=torch.float64))
            pinned = basis.rank - added[layer] - len(usage)  # columns of weights and anchors
            usage = torch.cat([usage, usage.new_zeros(added[layer])])
            usage += basis.energies(_rows(features[layer]))[pinned:]
            excess = basis.rank - int(self.options.max_kept * basis.d_in)
            least = usage.argsort()[: max(excess, 0)]
            if len(least):
                context.forget(layer, (pinned + least).tolist())
            stays = torch.ones(len(usage), dtype=torch.bool)
            stays[least] = False
            self.usage[layer] = usage[stays]
            forgotten[layer] = len(least)
        return forgotten

    def _warn_of_exhaustion(self, context: Context, facts: dict[str, dict]) -> None:
        """Warn of layers with fewer directions than the rank, or with few that are free; refuse where none is left.

        Nothing is said of layers without a gradient, such as a projector's in a domain of text alone.

        Raises:
            UserError: no layer has a gradient, or a direction left; one has too few and `on_exhaustion` is `error`.
        """
        shares = ("protected", "captured", "discarded")
        facts = {layer: fact for layer, fact in facts.items() if any(fact[share] for share in shares)}
        ranks = {layer: fact["rank"] for layer, fact in facts.items()}
        name, wanted = context.domain.name, self.options.rank
        advice = "lower strategy.energy_features or strategy.energy_weights"
        if not facts:
            raise UserError(f"domain {name}: its records give no target layer a gradient, so there is nothing to learn")
        if not any(ranks.values()):
            raise UserError(f"domain {name}: no target layer has a direction left to learn in; {advice}")
        short = [layer for layer, rank in ranks.items() if rank < wanted]
        if short and self.options.on_exhaustion == "error":
            raise UserError(
                f"domain {name}: layer {short[0]} has {ranks[short[0]]} of {wanted} directions "
                f"(and {len(short) - 1} more layers too few), strategy.on_exhaustion is error; {advice}"
            )
        tight = [layer for layer, fact in facts.items() if context.layers.d_in(layer) - fact["kept"] < 4 * wanted]
        warnings = ((short, wanted, "directions"), (tight, 4 * wanted, "free directions (four times the rank)"))
        for layers, count, what in warnings:
            if layers:
                log.warning("%s: %d layers have fewer than %d %s, first %s", name, len(layers), count, what, layers[0])


def _rows(source: Any) -> Any:
    """Statistics of a layer's features, or the rows of the mean gradient that stand for them."""
    from mllm_keeplora.linalg import GradientAccumulator

    return source.mean if isinstance(source, GradientAccumulator) else source
