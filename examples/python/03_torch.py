"""A small PyTorch model with two Mixture-of-Experts layers, trained on its own source.

It predicts a byte from the eight before it. The auxiliary losses are outputs as any other, the
optimizer is PyTorch's, and with --checkpoint each block keeps its routing and computes its
activations anew in the backward.
"""

import argparse
from pathlib import Path

import torch
from torch import nn

import moe
from moe.torch import MoELayer, checkpoint, loss

CONTEXT, WIDTH, BYTES = 8, 48, 128


# snippet: module
class Block(nn.Module):
    """x + MoE(norm(x))"""

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.moe = MoELayer(
            WIDTH, 96, num_experts=8, top_k=2, activation="gelu_tanh", layer_id=layer_id,
            gate={"kind": "noisy_top_k", "importance_weight": 0.02, "load_weight": 0.02},
        )  # fmt: skip

    def forward(self, x):
        out = self.moe(self.norm(x))
        return x + out.y, out.losses


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, WIDTH // CONTEXT)
        self.blocks = nn.ModuleList(Block(i) for i in range(2))
        self.head = nn.Linear(WIDTH, BYTES)

    def forward(self, text, frugal=False):
        x, losses = self.embedding(text).flatten(1), 0
        for block in self.blocks:
            x, more = checkpoint(block, x) if frugal else block(x)
            losses = losses + more
        return self.head(x), losses
# end snippet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--checkpoint", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(1)
    text = torch.tensor(list(Path(__file__).read_bytes())) % BYTES
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = last = 0.0
    for step in range(options.steps):
        at = torch.randint(len(text) - CONTEXT, (256,))
        rows = text[at[:, None] + torch.arange(CONTEXT + 1)]
        # snippet: step
        logits, losses = model(rows[:, :-1], frugal=options.checkpoint)
        error = nn.functional.cross_entropy(logits, rows[:, -1])
        optimizer.zero_grad()
        (error + losses.sum()).backward()
        optimizer.step()
        # end snippet
        last = float(error.detach())
        first = first or last
        if step % 50 == 0 or step + 1 == options.steps:
            balance = float(loss(losses, "importance").detach())
            print(f"step {step:4}  cross-entropy {last:.3f}  importance loss {balance:.4f}")
    assert last < 0.6 * first, "the loss did not go down"
    with torch.no_grad():
        model.eval()
        x = model.embedding(text[:CONTEXT][None]).flatten(1)
        stats = model.blocks[0].moe(x).stats
    print(f"a byte visits {int(stats[moe.Stat.TOUCHED])} experts of the first layer's 8")


if __name__ == "__main__":
    main()
