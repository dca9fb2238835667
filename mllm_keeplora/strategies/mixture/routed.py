"""Routed branches: one for each domain, trained from the base; which of them answers, a router reads off the question.

No interference in the weights and no domain named at answering time; what can be lost is lost by the router. With the
mean m_t of each domain's question features x and one covariance S within domains, a question goes to

    argmax_t  x' S^-1 m_t - m_t' S^-1 m_t / 2   =   argmin_t  (x - m_t)' S^-1 (x - m_t),

the linear discriminant with equal priors; S is shrunk towards its diagonal. Counts, means and summed scatter are all
that S needs, so domains that come one by one give what all give at once. A question that is further from every domain
than nearly all of the domain's own is answered by the base alone.
Source: the idea of MR-LoRA (arXiv 2506.05453), which asks the MLLM itself: a further LoRA, tuned on 20 records of every
domain, answers with the letter of one of several described experts, and no question is left to the base. Here nothing
is tuned, described or replayed, and a question costs no second answer. Features are those that training records show of
their first question (`models.causal.features`). Two workshop papers route alike, and are options here:

    prototypes      argmax_t cos(x, m_t): RePro (ICML 2026), on frozen features; as good as MR-LoRA's router there
    least_squares   argmax_t x' w_t,  W = (sum x x' + gamma I)^-1 sum x y',  y the one-hot domain: CF-Router (ICLR
                    2026), on mean states behind the last block (`features: final_hidden`), a pass more a question

Both were read as abstracts and from notes alone. Ours are: words and pictures count alike in a cosine; gamma is a share
of the mean square (`ridge`; theirs was not found); a state is a mean over pictures' tokens, too; and `reject`, by what
a score lacks of one (the presets leave nothing to the base).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.errors import UserError
from mllm_keeplora.strategies.base import Branch, Context, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import fresh_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes, question_pass
from mllm_keeplora.system.log import log

if TYPE_CHECKING:
    from torch import Tensor

    from mllm_keeplora.adapters.mixers.router import Nearest

HELD_OUT = 4  # one question in so many is not fitted to: it measures how far a domain's own questions lie
MATRICES = 7  # float64 (d, d) alive at once: scatter of before and now, covariance, mixed, factor, whitening
FLOOR = 1e-8  # share of the mean variance that a feature has at least, if it never varied


class RoutedOptions(StrategyOptions):
    """All defaults are our own.

    So many `samples` of a domain's questions are looked at. `shrinkage` must be above 0: there may be more features
    than questions. `reject` is the quantile of a domain's own distances beyond which a question is none of its; null
    leaves no question to the base. Its default keeps the base's general skill, which a general assistant is asked for
    most, and costs about one question in a hundred. Without `pictures` the words alone decide.
    """

    router: Literal["discriminant", "prototypes", "least_squares"] = "discriminant"
    features: Literal["frozen", "final_hidden"] = Field(
        "frozen", description="what is looked at: embeddings and tower, or states of the base behind its last block"
    )

    samples: int = Field(2048, ge=HELD_OUT)
    shrinkage: float = Field(0.1, gt=0.0, le=1.0, description="of a discriminant's covariance")
    ridge: float = Field(1e-3, gt=0.0, description="of least squares")
    reject: float | None = Field(0.99, gt=0.0, le=1.0)
    pictures: bool = True


class Routed(Strategy):
    """Stores a branch a domain, mean and held-out features of its questions; and twice a matrix over features (d, d).

    At LLaVA-1.5-7B (d = 5120) the matrices take 210 MB (scatter, float64) and 105 MB (router, float32) for each unit;
    least squares need the first alone, prototypes none.
    """

    Options: ClassVar[type[StrategyOptions]] = RoutedOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "repro": {"router": "prototypes", "reject": None},
        "cf-router": {"router": "least_squares", "features": "final_hidden", "reject": None},
    }
    start_from: ClassVar[Literal["base"]] = "base"
    combine: ClassVar[Literal["route"]] = "route"
    options: RoutedOptions

    def __init__(self, options: StrategyOptions):
        super().__init__(options)
        self.seen: dict[str, Tensor] = {}  # statistics of all domains so far: see `_add`

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Statistics of questions of d features: float64 matrices of (d, d), and the questions twice."""
        options, passed = self.options, question_pass(sizes)
        d = sizes.question[0 if options.pictures else 1]
        if options.features == "final_hidden":
            d, passed = sizes.base.width, {**passed, "forward": sizes.forward(sizes.probe)}
        matrices = 0 if options.router == "prototypes" else MATRICES
        statistics = matrices * 8 * d * d + (4 + 8) * options.samples * d
        return {"consolidate": {"question statistics": statistics, **passed}}

    def before_domain(self, context: Context) -> Branch:
        count = len(context.data.records)
        if count < HELD_OUT:
            raise UserError(f"domain {context.domain.name}: a router needs at least {HELD_OUT} records, got {count}")
        return fresh_branch(context, self.options)

    def after_domain(self, context: Context) -> None:
        samples, pictures = self.options.samples, self.options.pictures
        passes, is_frozen = context.passes, self.options.features == "frozen"
        look = passes.question_features if is_frozen else passes.question_states
        features = context.processes.gathered(look(samples, pictures))
        self._add(features)
        router = self._router(passes.feature_sizes(pictures=False)[0] if is_frozen else features.shape[1])
        context.answer_with(router)
        # Shares of this domain's questions sent to its branch and to the base; of each domain's held-out ones.
        chosen = router.choose(features).float()
        own, base = float(chosen[:, -1].mean()), 1 - float(chosen.sum(dim=1).mean())
        text = "%s: %.1f%% of its questions go to its branch, %.1f%% to the base"
        log.info(text, context.domain.name, 100 * own, 100 * base)
        held = [float(router.choose(rows)[:, number].float().mean()) for number, rows in enumerate(self._held_out())]
        context.log({"routing": {"own": own, "base": base, "held_out": held}})

    def state_dict(self) -> dict[str, Tensor]:
        return dict(self.seen)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.seen = dict(state)

    # -- parts of the above --------------------------------------------------------------------------------------

    def _add(self, features: Tensor) -> None:
        """Add a domain's questions, (n, d) float32, to the statistics.

        `counts` (domains,), `means` (domains, d) and `scatter` (d, d, about each domain's mean) are those of the
        questions that are fitted to, in float64; `held_out` has the rows of the others, `held_counts` of each domain.
        """
        import torch

        held = torch.arange(len(features)) % HELD_OUT == HELD_OUT - 1
        fitted = features[~held].double()
        mean = fitted.mean(dim=0, keepdim=True)
        gaps = fitted - mean
        added = {
            "counts": torch.tensor([len(fitted)]),
            "means": mean,
            "held_counts": held.sum().view(1),
            "held_out": features[held],
        }
        seen = self.seen
        self.seen = {name: torch.cat([seen[name], rows]) if seen else rows for name, rows in added.items()}
        if self.options.router != "prototypes":
            self.seen["scatter"] = gaps.mT @ gaps + seen.get("scatter", 0.0)

    def _router(self, words: int) -> Nearest:
        """Make a router of the statistics; `words` of the features are of words."""
        from mllm_keeplora.adapters.mixers.router import Router, Scores, unit

        options, means, seen = self.options, self.seen["means"], self.seen
        router: Nearest
        if options.router == "discriminant":
            router = Router(*means.shape, options.pictures, features=options.features)
            whitening = whitening_of(seen["scatter"] / seen["counts"].sum(), options.shrinkage)
            router.whitening.copy_(whitening)
            router.means.copy_(means @ whitening.mT)
        elif options.router == "prototypes":
            router = Scores(*means.shape, options.pictures, words, features=options.features)
            router.columns.copy_(unit(means, words))
        else:
            router = Scores(*means.shape, options.pictures, features=options.features)
            router.columns.copy_(least_squares(seen["scatter"], means, seen["counts"], options.ridge))
        if options.reject is not None:
            for number, own in enumerate(self._held_out()):
                router.limits[number] = router.distances(own)[:, number].quantile(options.reject)
        return router

    def _held_out(self) -> Iterable[Tensor]:
        return self.seen["held_out"].split(self.seen["held_counts"].tolist())


def whitening_of(covariance: Tensor, shrinkage: float) -> Tensor:
    """Find what makes features uncorrelated and of variance one, after their covariance was shrunk.

    Args:
        covariance: (d, d) float64; it may be singular.
        shrinkage: share of its diagonal in the mixture of both, in (0, 1].

    Returns:
        W (d, d), lower triangular, with W' W = ((1 - shrinkage) S + shrinkage diag S)^-1. The diagonal's variances
        are at least `FLOOR` of their mean.
    """
    import torch

    variances = covariance.diagonal()
    lowest = FLOOR * float(variances.mean()) or 1.0
    scales = variances.clamp(min=lowest).rsqrt()
    mixed = (1 - shrinkage) * covariance * scales.outer(scales)
    mixed.diagonal().add_(shrinkage)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(mixed), scales.diag(), upper=False)


def least_squares(scatter: Tensor, means: Tensor, counts: Tensor, ridge: float) -> Tensor:
    """Regress which domain a question is of on its features, from what is kept of all questions.

    Args:
        scatter, means, counts: (d, d) about each domain's mean, (domains, d) and (domains,), float64.
        ridge: gamma as a share of the mean square of the features, summed over questions.

    Returns:
        (domains, d): columns of W = (sum x x' + gamma I)^-1 sum x y'.
    """
    import torch

    sums = means * counts.unsqueeze(1)
    moments = scatter + means.mT @ sums
    moments.diagonal().add_(ridge * float(moments.diagonal().mean()) or 1.0)  # of features that are all zero
    return torch.cholesky_solve(sums.mT, torch.linalg.cholesky(moments)).mT
