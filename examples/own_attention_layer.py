"""
FIRE in an attention layer of your own: it learns to copy the token six places back, and does so in longer texts, too.

    python examples/own_attention_layer.py

`FirePositionBias` has the learned parameters; `fire_attention` adds what it says to the scores, without ever writing
it down for all pairs of tokens.
"""

import argparse

import torch
from torch import nn

from modeling_fire import FirePositionBias, fire_attention


VOCABULARY, WIDTH, HEADS, BACK, LENGTH = 64, 64, 4, 6, 64


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_key_value, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        # c and L as FireConfig starts them: below L, here 4096 tokens, the bias depends on nothing but the distance.
        self.position_bias = FirePositionBias(HEADS, init_c=1.0, init_L=64 * LENGTH, train_length=LENGTH)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        query, key, value = self.query_key_value(hidden).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = fire_attention(query, key, value, self.position_bias)  # (batch, heads, length, head_dim)
        return self.output(attended.transpose(1, 2).flatten(2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), Attention(), nn.Linear(WIDTH, VOCABULARY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(args.steps):
        tokens = torch.randint(VOCABULARY, (16, LENGTH))
        logits = model(tokens)[:, BACK:].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, tokens[:, :-BACK].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == args.steps - 1:
            print(f"step {step}: loss {loss.item():.3f}")

    for length in (LENGTH, 4 * LENGTH, 16 * LENGTH, 64 * LENGTH):
        tokens = torch.randint(VOCABULARY, (1, length))
        with torch.no_grad():
            copied = model(tokens).argmax(-1)[:, BACK:] == tokens[:, :-BACK]
        print(f"{length:5} tokens: {copied[:, -32:].float().mean():.0%} of the last 32 are copied")


if __name__ == "__main__":
    main()
