"""LwF: one carried LoRA branch that, beside the domain's answers, learns to answer as the model before the domain did.

For the domain's own records (none of the past is kept) the model before the domain, the teacher, gives a distribution
over the next token at every token of the answers, and the student is drawn to it:

    loss = loss of the domain + strength * T^2 * mean over answer tokens of KL(softmax(z_teacher / T) || softmax(z / T))

Source: Li and Hoiem 2016 (arXiv 1606.09282), with the T^2 of Hinton et al. 2015 (arXiv 1503.02531), which keeps the
size of the gradient whatever T is. The first domain has no teacher, as in the code of TRACE (arXiv 2310.06762), which
departs in the rest: KL(student || teacher) without T^2, over padding and questions too, divided by the batch alone, and
with teacher logits of other records.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from mllm_keeplora.strategies.base import Branch, Context, Step, Strategy, StrategyOptions
from mllm_keeplora.strategies.baselines.plain import carried_branch

if TYPE_CHECKING:
    from torch import Tensor


class LwFOptions(StrategyOptions):
    """Both numbers are those of TRACE and of the paper."""

    strength: float = Field(1.0, ge=0.0)
    temperature: float = Field(2.0, gt=0.0)


class LwF(Strategy):
    """Stores the branch: as the last domain left it, it is the next one's teacher."""

    Options: ClassVar[type[StrategyOptions]] = LwFOptions
    options: LwFOptions

    def before_domain(self, context: Context) -> Branch:
        return carried_branch(context, self.options)

    def extra_loss(self, context: Context, batch: Mapping[str, Any], outputs: Any, step: Step) -> Tensor | float:
        """Give the distillation of a batch; 0 in the first domain. It costs a second forward, of the teacher."""
        if context.domain.index == 0:
            return 0.0
        teacher = context.passes.teacher_logits(batch)
        divergences = distillation(teacher, outputs.logits[0], self.options.temperature)
        return self.options.strength * step.token_mean(divergences)


def distillation(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """Measure how far a student's next token is from its teacher's, softened by a temperature T.

    Args:
        teacher, student: (n, vocabulary) logits.
        temperature: T.

    Returns:
        (n,) float32: T^2 KL(softmax(teacher / T) || softmax(student / T)) of every token.
    """
    import torch.nn.functional as F

    wanted = F.log_softmax(teacher.float() / temperature, dim=-1)
    given = F.log_softmax(student.float() / temperature, dim=-1)
    return temperature**2 * F.kl_div(given, wanted, reduction="none", log_target=True).sum(dim=-1)
