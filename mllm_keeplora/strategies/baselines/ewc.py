"""EWC: train one LoRA branch on, and hold each of its parameters the more firmly, the more past domains depend on it.

After a domain, the squared gradients of single records tell how much each trained parameter matters to it (the diagonal
of the empirical Fisher matrix F, at the parameters theta* that training ended with). From then on leaving theta* costs:

    loss = loss of the domain + strength / 2 * sum_j F_j (theta_j - theta*_j)^2
    F_j  = mean over records of (d log p(answer | question) / d theta_j)^2

`online` keeps one F, which becomes gamma F + F of the new domain, and the last theta*; `separate` keeps F and theta* of
every past domain and adds their penalties up. With `fisher_batch: n` F is the mean over batches of n records of the
squared gradient of their mean loss over answer tokens, as LAMDA-CL/Prism has it: much smaller, for a larger strength.
Source: Kirkpatrick et al. 2017 (arXiv 1612.00796), Eq. (3); `online`: Schwarz et al. 2018 (arXiv 1805.06370). The code
of TRACE (arXiv 2310.06762) departs: it squares the gradients of mini-batches, penalty included, while it trains.
A and B are held entry by entry, although only their product matters to the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from mllm_keeplora.config import later
from mllm_keeplora.strategies.base import Branch, Context, Need, Samples, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch
from mllm_keeplora.strategies.footprint import Footprint, PassSizes

if TYPE_CHECKING:
    from torch import Tensor

    ByName = dict[str, Tensor]  # a tensor for each trained parameter


PRISM = {"strength": 5000.0, "mode": "separate"}


class EWCOptions(StrategyOptions):
    """`strength` is the lambda of TRACE, for another F than ours: sweep it, 1e1 to 1e5.

    No paper that we follow states `gamma` or `samples` for language models: 1 forgets no domain, and 512 records give a
    steady mean. Samples are a count of records, or a share of them (0.2, 1.0).

    The presets are LAMDA-CL/Prism's for LLaVA-1.5, `prism` on UCIT and `prism-coin` on CoIN: 50 batches of 8 and of 12
    records for F there, drawn anew in each process; here spaced evenly, all processes together.
    """

    strength: float = Field(400.0, ge=0.0)
    mode: Literal["online", "separate"] = "online"
    gamma: float = Field(1.0, ge=0.0, le=1.0)
    samples: Samples = 512
    fisher_batch: int | None = later(None, ge=1)  # records whose mean loss is squared as one; null: single records


class EWC(Strategy):
    """Stores the branch, and F and theta* of its size: once (`online`), or for every past domain (`separate`)."""

    Options: ClassVar[type[StrategyOptions]] = EWCOptions
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "prism": {**PRISM, "rank": 96, "alpha": 192.0, "samples": 400, "fisher_batch": 8},
        "prism-coin": {**PRISM, "rank": 64, "alpha": 128.0, "samples": 600, "fisher_batch": 12},
    }
    # The penalty reads parameters outside of the model's forward.
    needs: ClassVar[frozenset[Need]] = frozenset({"parameters"})
    options: EWCOptions

    def __init__(self, options: EWCOptions):
        super().__init__(options)
        self.fisher: list[ByName] = []  # F of past domains, oldest first; one for all of them if online
        self.optimum: list[ByName] = []  # theta*, likewise

    def footprint(self, sizes: PassSizes) -> Footprint:
        """Estimate gradients of one record after the other, beside what is known and what is added up."""
        records = self.options.fisher_batch or 1
        return {"consolidate": {"graph": sizes.graph(records, sizes.rank), "Fisher information": 3 * 4 * sizes.numbers}}

    def before_domain(self, context: Context) -> Branch:
        return carried_branch(context, self.options)

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        """Give the penalty on theta as it is now; 0 in the first domain."""
        theta = context.branches.trainable()
        self.fisher = [beside(theta, each) for each in self.fisher]
        self.optimum = [beside(theta, each) for each in self.optimum]
        total: Tensor | float = 0.0
        for fisher, optimum in zip(self.fisher, self.optimum, strict=True):
            for name, values in theta.items():
                total = total + (fisher[name] * (values - optimum[name]).square()).sum()
        return self.options.strength / 2 * total

    def after_domain(self, context: Context) -> None:
        """Add F and theta* of the domain that has just been learnt to what is kept."""
        theta = context.branches.trainable()
        fisher, records = mean_squared_gradients(context, self.options.samples, self.options.fisher_batch)
        context.log({"fisher": {"records": records, "sum": sum(float(each.sum()) for each in fisher.values())}})
        if self.options.mode == "online" and self.fisher:
            earlier = beside(theta, self.fisher.pop())
            fisher = {name: self.options.gamma * earlier[name] + each for name, each in fisher.items()}
            self.optimum.clear()
        self.fisher.append(fisher)
        self.optimum.append({name: values.detach().float().clone() for name, values in theta.items()})

    def state_dict(self) -> ByName:
        return {**packed("fisher", self.fisher), **packed("optimum", self.optimum)}

    def load_state_dict(self, state: ByName) -> None:
        self.fisher, self.optimum = unpacked("fisher", state), unpacked("optimum", state)


def mean_squared_gradients(context: Context, samples: int | float, batch: int | None = None) -> tuple[ByName, int]:
    """Take the diagonal of the empirical Fisher matrix at the model's present parameters.

    Args:
        context: of the domain, its branch open.
        samples: so many of its records (or that share of them), evenly spaced and divided over the processes.
        batch: how many of them are one gradient, that of their mean loss over answer tokens; None: each for itself.

    Returns:
        Mean over the records of the squared gradient of log p(answer | question), float32, by parameter name; and how
        many gradients that were.
    """
    import torch

    theta = context.branches.trainable()
    sums = {name: torch.zeros_like(values, dtype=torch.float32) for name, values in theta.items()}
    count = torch.zeros(1, device=next(iter(sums.values())).device)
    passes = context.passes
    for gradient in passes.batch_gradients(samples, batch) if batch else passes.record_gradients(samples):
        for name, each in gradient.items():
            sums[name] += each.float().square()
        count += 1
    context.processes.reduce([*sums.values(), count])
    return {name: each / count for name, each in sums.items()}, int(count)


def beside(theta: ByName, kept: ByName) -> ByName:
    """Give what is kept of each parameter on its device: copied there once, the same tensors from then on."""
    return {name: kept[name].to(values.device) for name, values in theta.items()}


def packed(what: str, domains: list[ByName]) -> ByName:
    """Put what is kept of past domains into one dictionary, whose keys name kind, domain and parameter."""
    return {f"{what}|{number}|{name}": each for number, kept in enumerate(domains) for name, each in kept.items()}


def unpacked(what: str, state: ByName) -> list[ByName]:
    """Take what is kept of a kind out of the dictionary again, domain by domain."""
    found: dict[int, ByName] = {}
    for key, tensor in state.items():
        kind, number, name = key.split("|", 2)
        if kind == what:
            found.setdefault(int(number), {})[name] = tensor
    return [found[number] for number in sorted(found)]
