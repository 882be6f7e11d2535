"""DRO-V."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from align.methods.base import Method, method, option
from align.scoring.views import Singles, wide


@method(
    "dro_v",
    paper="2405.19107",
    view="singles",
    needs={"ref_logp", "reward", "value"},
    claim=("gold_reward", "up", "style"),
)
class DROV(Method):
    """Direct Reward Optimisation with a value role: regression of a scalar reward, one response a prompt.

        loss = 0.5 * (r - V(x) - tau * h)^2

    One value per completion [N], in squared units of the reward; minimised jointly over the policy (h, the log-ratio to
    the reference summed over tokens) and V, read at the last prompt token (`value[:, 0]`). Its zero is
    V* = tau log E_ref[e^{r/tau}], pi* = pi_ref e^{(r - V*)/tau}; it is 0 at the reference where V = r.

    The policy gradient of the joint loss is -tau (r - V - tau h) grad log pi. The paper's practical update,
    -(r - V) grad log pi + (tau/2) grad h^2, is that divided by tau, since grad h^2 = 2 h grad log pi: a rescaling of
    one role that moves no zero. `policy_grad_scale` multiplies the policy's gradient and leaves the value of the loss
    and V's gradient: 1 is the joint loss, 1/tau the paper's update; they agree at the default tau.
    Source: arXiv 2405.19107, Eqs. 9 and 10.
    """

    formula: ClassVar[str] = r"\mathcal{L} = \frac{1}{2} (r - V(x) - \tau h)^2"
    when: ClassVar[str] = (
        "Pick it when each prompt has one answer with a number as reward, and no second answer to compare with."
    )

    tau: float = option(1.0, above=0, doc="strength of the KL leash, in units of the reward; normalise rewards first")
    policy_grad_scale: float = option(1.0, above=0, doc="factor on the policy's gradient; 1/tau is the paper's update")

    def loss(self, view: Singles) -> Tensor:
        completions = view.completions
        h = completions.sum_log_ratio
        if self.policy_grad_scale != 1:
            h = h.detach() + self.policy_grad_scale * (h - h.detach())
        residual = completions.reward - wide(completions.value)[:, 0] - self.tau * h
        return 0.5 * residual.square()
