"""The layer's equations in plain numpy, double precision, one token at a time where it matters.

docs/numerics.md has every formula. Only the forward is here: gradients are compared with central
differences of it, element by element, with the selection held.
"""

import math

import numpy as np

_phi = np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))), otypes=[float])
_erf = np.vectorize(math.erf, otypes=[float])


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def softmax(z):
    e = np.exp(z - z.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


ACT = {
    "relu": lambda z: np.maximum(z, 0),
    "gelu_tanh": lambda z: z / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "gelu_erf": lambda z: z * _phi(z),
    "silu": lambda z: z * sigmoid(z),
}
GATED = {"swiglu": "silu", "geglu_tanh": "gelu_tanh", "geglu_erf": "gelu_erf", "reglu": "relu"}


def cv2(v):
    return np.var(v) / (np.mean(v) ** 2 + 1e-10)


def select(h, k):
    """The k largest of each row, ties to the lower index."""
    return np.argsort(-h, axis=1, kind="stable")[:, :k]


class Layer:
    """A configuration; run() gives y and the losses for inputs and parameters of the moment."""

    def __init__(self, gate, experts, output="linear"):
        self.g = {"kind": "top_k", "score": "softmax", "order": "select_then_score",
                  "renormalize": 0, "route_scale": 1.0, **gate}  # fmt: skip
        self.e = {"activation": "relu", "output": "linear", **experts}
        self.output = output

    def logits(self, x, p, noise):
        clean = x @ p["gate.weight"]
        if "gate.bias" in p:
            clean = clean + p["gate.bias"]
        sd = np.zeros_like(clean)
        if noise is not None:
            sd = np.log1p(np.exp(x @ p["gate.noise_weight"])) + 1e-2
            return clean, clean + noise * sd, sd
        return clean, clean, sd

    def weights(self, h, ids):
        """[T,K] weights of the chosen, before dropping."""
        g = self.g
        chosen = np.take_along_axis(h, ids, axis=1)
        if g["kind"] == "softmax_dense":
            return np.take_along_axis(softmax(h), ids, axis=1)
        if g["score"] == "sigmoid":
            w = sigmoid(chosen)
        elif g["order"] == "select_then_score":
            w = softmax(chosen)
        else:
            w = np.take_along_axis(softmax(h), ids, axis=1)
        if g["renormalize"]:
            w = w / w.sum(axis=1, keepdims=True)
        return w * g["route_scale"]

    def kept(self, ids):
        """[T,K] whether an entry finds room, in order of token, then of choice."""
        keep = np.ones(ids.shape, bool)
        if "capacity" in self.g:
            taken = np.zeros(self.g["num_experts"], int)
            for t, k in np.ndindex(*ids.shape):
                keep[t, k] = taken[ids[t, k]] < self.g["capacity"]
                taken[ids[t, k]] += 1
        return keep

    def losses(self, clean, h, sd, ids, w):
        g, (tokens, count), e = self.g, ids.shape, self.g["num_experts"]
        routed = np.zeros((tokens, e))
        np.put_along_axis(routed, ids, 1.0, axis=1)
        counts = routed.sum(axis=0)
        total = {}
        if "importance_weight" in g:
            dense = np.zeros((tokens, e))
            np.put_along_axis(dense, ids, w, axis=1)
            total["importance"] = g["importance_weight"] * cv2(dense.sum(axis=0))
        if "load_weight" in g:
            order = -np.sort(-h, axis=1)
            next_best, worst_chosen = order[:, count : count + 1], order[:, count - 1 : count]
            threshold = np.where(routed == 1, next_best, worst_chosen)
            load = _phi((clean - threshold) / sd).sum(axis=0)
            total["load"] = g["load_weight"] * cv2(load)
        if "switch_weight" in g:
            p = softmax(clean).mean(axis=0)
            total["switch"] = g["switch_weight"] * e * (counts / counts.sum() * p).sum()
        if "gshard_weight" in g:
            first = np.bincount(ids[:, 0], minlength=e) / tokens
            total["gshard"] = g["gshard_weight"] * e * (first * softmax(clean).mean(axis=0)).sum()
        if "z_weight" in g:
            total["z"] = g["z_weight"] * (np.log(np.exp(clean).sum(axis=1)) ** 2).mean()
        if "sequence_weight" in g:
            s = sigmoid(clean)
            share = (s / s.sum(axis=1, keepdims=True)).mean(axis=0)
            total["sequence"] = g["sequence_weight"] * e * (counts / counts.sum() * share).sum()
        return total

    def expert(self, e, x, p):
        name = self.e["activation"]
        a = x @ p["experts.w1"][e] + (p["experts.b1"][e] if "experts.b1" in p else 0)
        if name in GATED:
            b = x @ p["experts.w3"][e] + (p["experts.b3"][e] if "experts.b3" in p else 0)
            h = ACT[GATED[name]](a) * b
        else:
            h = ACT[name](a)
        z = h @ p["experts.w2"][e] + (p["experts.b2"][e] if "experts.b2" in p else 0)
        return sigmoid(z) if self.e["output"] == "sigmoid" else z

    def run(self, x, p, noise=None, ids=None):
        """y, the losses by name, and the selection. `ids` holds a selection."""
        clean, h, sd = self.logits(x, p, noise)
        count = self.g["num_experts"] if self.g["kind"] == "softmax_dense" else self.g["top_k"]
        ids = select(h, count) if ids is None else ids
        w = self.weights(h, ids)
        losses = self.losses(clean, h, sd, ids, w)
        w = w * self.kept(ids)
        z = np.stack([self.expert(e, x, p) for e in range(self.g["num_experts"])], axis=1)
        y = np.einsum("tk,tko->to", w, np.take_along_axis(z, ids[:, :, None], axis=1))
        return (sigmoid(y) if self.output == "sigmoid" else y), losses, ids
