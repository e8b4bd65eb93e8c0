"""The layer's equations in plain PyTorch operations, for comparison; docs/numerics.md has them all.

Nothing here calls libmoe. A configuration is the keyword arguments of moe.torch.MoELayer.
"""

from __future__ import annotations

from typing import Any, Dict, Mapping, NamedTuple, Optional

import torch
from torch.nn import functional

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "gelu_erf": functional.gelu,
    "silu": functional.silu,
    "swiglu": functional.silu,
    "geglu_tanh": lambda z: functional.gelu(z, approximate="tanh"),
    "geglu_erf": functional.gelu,
    "reglu": torch.relu,
}


class EagerOutput(NamedTuple):
    y: torch.Tensor
    losses: Dict[str, torch.Tensor]  # weighted
    ids: torch.Tensor  # [T,K]


def cv_squared(v: torch.Tensor) -> torch.Tensor:
    """Shazeer et al. 2017, eq. 7."""
    return v.var(unbiased=False) / (v.mean() ** 2 + 1e-10)


def threshold(h: torch.Tensor, k: int) -> torch.Tensor:
    """[T,E]: the k-th largest of a row without the entry itself; eq. 9."""
    top = h.topk(k + 1, dim=1).values
    chosen = h >= top[:, k - 1 : k]
    return torch.where(chosen, top[:, k : k + 1], top[:, k - 1 : k])


class EagerMoE:
    """y and losses of a configuration for parameters by the library's names."""

    def __init__(self, d_model: int, d_hidden: int, num_experts: int, top_k: int = 1, *,
                 activation: str = "relu", gate: Mapping[str, Any] = {},
                 experts: Mapping[str, Any] = {}, output: str = "linear",
                 **_: Any) -> None:  # fmt: skip
        self.experts, self.k = num_experts, top_k
        self.gate, self.activation = dict(gate), activation
        self.sigmoid_rows = experts.get("output", "linear") == "sigmoid"
        self.sigmoid_y = output == "sigmoid"
        if self.gate.get("kind") == "softmax_dense":
            self.k = num_experts

    def __call__(
        self,
        p: Mapping[str, torch.Tensor],
        x: torch.Tensor,
        noise: Optional[torch.Tensor] = None,
        gate_x: Optional[torch.Tensor] = None,
    ) -> EagerOutput:
        seen = x if gate_x is None else gate_x
        clean = seen @ p["gate.weight"]
        if "gate.bias" in p:
            clean = clean + p["gate.bias"]
        h, sd = clean, None
        if self.gate.get("kind") == "noisy_top_k" and noise is not None:  # eq. 4
            sd = functional.softplus(seen @ p["gate.noise_weight"])
            sd = sd + self.gate.get("noise_epsilon", 1e-2)
            h = clean + noise * sd
        ids = h.topk(self.k, dim=1).indices
        weights = self._weights(h, ids)
        losses = self._losses(clean, h, sd, ids, weights)
        kept = self._keep(ids).to(x.dtype)
        weights = weights * kept
        if self.gate.get("renormalize_after_drop"):
            sums = weights.sum(1, keepdim=True)
            weights = weights / torch.where(sums == 0, torch.ones_like(sums), sums)
        y = self._mix(p, x, ids, weights, kept)
        return EagerOutput(torch.sigmoid(y) if self.sigmoid_y else y, losses, ids)

    def _weights(self, h: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        g = self.gate
        first = g.get("order", "select_then_score") == "score_then_select"
        if g.get("score", "softmax") == "sigmoid":
            scores = torch.sigmoid(h).gather(1, ids)
        elif first:
            scores = torch.softmax(h, 1).gather(1, ids)
        else:
            scores = torch.softmax(h.gather(1, ids), 1)
        if g.get("renormalize"):
            scores = scores / (scores.sum(1, keepdim=True) + g.get("renormalize_epsilon", 0.0))
        return scores * g.get("route_scale", 1.0)

    def _keep(self, ids: torch.Tensor) -> torch.Tensor:
        """[T,K] 1 for entries that found room: in order of token, then of choice."""
        kept = torch.ones(ids.shape, dtype=torch.float64)
        if self.gate.get("capacity_kind") == "number":
            count = [0] * self.experts
            for t, row in enumerate(ids.tolist()):
                for i, e in enumerate(row):
                    kept[t, i] = float(count[e] < self.gate["capacity"])
                    count[e] += 1
        return kept

    def _losses(self, clean: torch.Tensor, h: torch.Tensor, sd: Optional[torch.Tensor],
                ids: torch.Tensor, weights: torch.Tensor) -> Dict[str, torch.Tensor]:  # fmt: skip
        tokens, experts, g = len(clean), self.experts, self.gate
        importance = torch.zeros_like(clean).scatter_add(1, ids, weights).sum(0)
        counts = torch.bincount(ids.flatten(), minlength=experts).to(clean.dtype)
        first = torch.bincount(ids[:, 0], minlength=experts).to(clean.dtype)
        mean = torch.softmax(clean, 1).mean(0)
        scores = torch.sigmoid(clean)
        best = clean.topk(self.k, 1).indices.flatten()
        plain = torch.bincount(best, minlength=experts).to(clean.dtype)
        found = {
            "importance": lambda: cv_squared(importance),
            "load": lambda: cv_squared(  # eq. 8-11
                (0.5 * (1 + torch.erf((clean - threshold(h, self.k)) / (2**0.5 * sd)))).sum(0)
            ),
            "switch": lambda: experts * (counts / counts.sum() * mean).sum(),
            "gshard": lambda: experts * (first / tokens * mean).sum(),
            "z": lambda: (torch.logsumexp(clean, 1) ** 2).mean(),
            "sequence": lambda: experts
            * (plain / plain.sum() * (scores / scores.sum(1, keepdim=True)).mean(0)).sum(),
        }
        weight = {name: g.get(name + "_weight", 0.0) for name in found}
        return {name: weight[name] * f() for name, f in found.items() if weight[name]}

    def _mix(self, p: Mapping[str, torch.Tensor], x: torch.Tensor, ids: torch.Tensor,
             weights: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:  # fmt: skip
        y = x.new_zeros(len(x), p["experts.w2"].shape[2])
        for e in range(self.experts):
            token, slot = torch.nonzero((ids == e) & (kept > 0), as_tuple=True)
            if len(token):
                out = self._expert(p, x[token], e) * weights[token, slot, None]
                y = y.index_add(0, token, out)
        return y

    def _expert(self, p: Mapping[str, torch.Tensor], rows: torch.Tensor, e: int) -> torch.Tensor:
        def linear(z: torch.Tensor, which: str) -> torch.Tensor:
            out = z @ p["experts.w" + which][e]
            return out + p["experts.b" + which][e] if "experts.b" + which in p else out

        hidden = ACTIVATIONS[self.activation](linear(rows, "1"))
        if "experts.w3" in p:
            hidden = hidden * linear(rows, "3")
        out = linear(hidden, "2")
        return torch.sigmoid(out) if self.sigmoid_rows else out
