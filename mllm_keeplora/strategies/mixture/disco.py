"""DISCO: a branch for each domain, trained from the base; all answer, each as much as a question is like its domain.

With e(q) the mean feature of a question's words and m_t its mean over domain t's questions, in every layer

    y = W x + sum_t g_t s B_t A_t x,    g_t = softmax_t( cos(e(q), m_t) / temperature ).

Softer than `routed`, and nothing is left to the base: a question of no domain gets a mixture, so general skill falls
with the first domain. With `temperature` towards 0 it is routing by cosine.
Source: DISCO (ICCV 2025, arXiv 2503.12897) as MCITlib runs it (`2956dfd`): without the federation, a slot a domain; the
paper matches clients to slots at a cosine of 0.9. Published slots share one rank of T r at a scale of 2, hence presets
of rank r and alpha 2 r.
Departures: features are those of this base's frozen parts, not of a CLIP text model beside it, which no seam loads yet;
so the published temperature, 0.05, is but a start, and cosines are about the mean of the domains' means (`centered`):
mean embeddings all point one way. m_t is the mean of `samples` evenly spaced questions in float64 (released: of all, in
bfloat16, which stalls), and domains not learnt take no part (released: their zeros do). A projector is adapted or
frozen: published ones are trained in full, which live branches have no place for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes, question_pass

if TYPE_CHECKING:
    from torch import Tensor


class DISCOOptions(StrategyOptions):
    temperature: float = Field(0.05, gt=0.0)
    modality: Literal["text", "picture", "both"] = Field("text", description="whose cosines count")
    centered: bool = Field(True, description="cosines about the mean of the domains' means; published: false, of CLIP")
    samples: int = Field(2048, ge=1, description="questions of a domain that its mean is of; published: all")


class DISCO(Strategy):
    """Stores a branch a domain, and the mean features of its questions (float64)."""

    Options: ClassVar[type[StrategyOptions]] = DISCOOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "mllm_dcl": {"rank": 32, "alpha": 64.0},
        "mllm_acl": {"rank": 32, "alpha": 64.0},
        "ucit": {"rank": 16, "alpha": 32.0},
    }
    start_from: ClassVar[Literal["base"]] = "base"
    combine: ClassVar[Literal["gate"]] = "gate"
    options: DISCOOptions

    def __init__(self, options: DISCOOptions):
        super().__init__(options)
        self.means: Tensor | None = None  # (domains, d) float64, of those learnt so far

    def footprint(self, sizes: PassSizes) -> Footprint:
        d = sizes.question[1 if self.options.modality == "text" else 0]
        return {"consolidate": {"questions": (4 + 8) * self.options.samples * d, **question_pass(sizes)}}

    def before_domain(self, context: Context) -> Branch:
        return fresh_branch(context, self.options)

    def after_domain(self, context: Context) -> None:
        import torch

        from mllm_keeplora.adapters.mixers.similarity import Similarity

        options, passes = self.options, context.passes
        features = context.processes.gathered(passes.question_features(options.samples, options.modality != "text"))
        mean = features.double().mean(dim=0, keepdim=True)
        self.means = mean if self.means is None else torch.cat([self.means, mean])
        mixer = Similarity(
            *self.means.shape,
            passes.feature_sizes(pictures=False)[0],
            options.modality,
            options.temperature,
            options.centered,
            **self._weighed(context),
        )
        mixer.means.copy_(self.means)
        context.answer_with(mixer)
        context.log({"likeness": {"mean_weights": mixer(features).mean(dim=0).tolist()}})

    def state_dict(self) -> dict[str, Tensor]:
        return {} if self.means is None else {"means": self.means}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.means = state.get("means")

    def _weighed(self, context: Context) -> dict[str, Any]:
        """Further keywords of the mixer: all layers are weighed."""
        return {}
