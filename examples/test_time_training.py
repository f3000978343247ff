"""Test-time training: a transformer that goes on learning as it reads, meta-trained to do so (arXiv 2512.23675).

A small transformer sees 24 characters at a time. While it reads a passage of 17 such chunks, the MLPs of its last two
blocks take one SGD step on every chunk, and it is judged on the chunk after. Every passage is in a Caesar cipher of its
own, so that what it has read of this one is worth knowing, and none of it can be known before.

    python examples/test_time_training.py

15 seconds on one CPU thread, printed last for each way to the meta-gradient (40 meta-steps of four passages):

    exact:       4.085 bits per character on passages held out
    first order: 4.176 bits per character on passages held out
    none:        4.674 bits per character on passages held out

"none" is the same transformer trained without adaptation; with 400 steps it reaches 4.466, with 1,000 steps 4.404. With
two other seeds exact was better than first order by 0.063 and 0.073. Half of the inner gradients are clipped. What lies
below the adapted blocks is computed once a chunk: the model is a plain `nn.Sequential`. text.txt is by Shakespeare,
Poe, Jefferson, Lincoln and Carroll, in the public domain.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

import innerloop as il

CHUNKS, LENGTH = 16, 24  # inner steps, and characters of a chunk
WIDTH, HEADS = 32, 2

# The model.


class Embed(nn.Module):
    """Characters and their places in the chunk, beyond which no block looks back."""

    def __init__(self, symbols: int, width: int, length: int) -> None:
        super().__init__()
        self.symbol, self.place = nn.Embedding(symbols, width), nn.Parameter(torch.randn(length, width) / 10)

    def forward(self, codes: Tensor) -> Tensor:
        return self.symbol(codes) + self.place


class Block(nn.Module):
    """Causal attention, then an MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.read, self.write = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        parts = self.read(self.norm(x)).unflatten(-1, (3, self.heads, -1)).movedim(-3, 0).transpose(-2, -3)
        x = x + self.write(
            nn.functional.scaled_dot_product_attention(*parts, is_causal=True).transpose(-2, -3).flatten(-2)
        )
        return x + self.mlp(x)


def transformer() -> nn.Sequential:
    blocks = (Block(WIDTH, HEADS) for _ in range(3))
    return nn.Sequential(
        Embed(len(SYMBOLS), WIDTH, LENGTH), *blocks, nn.LayerNorm(WIDTH), nn.Linear(WIDTH, len(SYMBOLS))
    )


# The recipe.
TEXT = (Path(__file__).parent / "text.txt").read_text("utf-8").lower()
SYMBOLS = sorted(set(TEXT))
LETTERS = torch.tensor([code for code, symbol in enumerate(SYMBOLS) if symbol.isalpha()])
PASSAGE = (CHUNKS + 1) * LENGTH + 1
CODES = torch.tensor([SYMBOLS.index(each) for each in TEXT][: len(TEXT) // (2 * PASSAGE) * 2 * PASSAGE])
PAGES = CODES.view(-1, 2 * PASSAGE)
HELD_OUT = torch.arange(len(PAGES)) % 6 == 2


def passages(pages: Tensor, count: int) -> Tensor:
    """From anywhere in the pages, ``[count, PASSAGE]``; in each all letters are shifted by a number of its own."""
    rows, places = torch.randint(len(pages), (count, 1)), torch.randint(PASSAGE, (count, 1)) + torch.arange(PASSAGE)
    cipher = torch.arange(len(SYMBOLS)).repeat(count, 1)
    cipher[:, LETTERS] = torch.stack([LETTERS.roll(int(shift)) for shift in torch.randint(len(LETTERS), (count,))])
    return cipher.gather(1, pages[rows, places])


def task(rows: Tensor) -> il.Task:
    """Step k learns from chunk k and is judged on chunk k + 1."""
    inputs, targets = (part.unflatten(1, (-1, LENGTH)) for part in (rows[:, :-1], rows[:, 1:]))
    return il.Task(support=il.Steps((inputs[:, :-1], targets[:, :-1])), query=il.Steps((inputs[:, 1:], targets[:, 1:])))


def learner(meta_gradient: il.meta_gradient.MetaGradient) -> il.MetaLearner:
    return il.MetaLearner(
        transformer(),
        adapts=il.Named("2.mlp.*", "3.mlp.*"),
        inner=il.SGD(lr=0.5, steps=CHUNKS, clip=1.0),
        meta_gradient=meta_gradient,
    )


def plain_loss(model: nn.Module, batch: il.Task) -> Tensor:
    """The loss on the same chunks without adaptation."""
    inputs, targets = batch.query.rows
    return nn.functional.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def main(steps: int = 40, batch: int = 4, held_out: int = 32) -> dict[str, float]:
    torch.manual_seed(0)
    test, results = task(passages(PAGES[HELD_OUT], held_out)), {}
    for name, meta_gradient in {"exact": il.Unrolled(), "first order": il.FirstOrder(), "none": None}.items():
        torch.manual_seed(1)
        reader = learner(meta_gradient)
        optimizer = torch.optim.Adam(reader.parameters(), lr=0.01)
        for step in range(steps):
            optimizer.zero_grad()
            given = task(passages(PAGES[~HELD_OUT], batch))
            if meta_gradient:
                loss = reader.meta_step(given, step_weights=[1 / CHUNKS] * CHUNKS).loss
            else:
                loss = plain_loss(reader.model, given)
                loss.backward()
            optimizer.step()
            if step % 10 == 9:
                print(f"{name}, step {step + 1}: {loss.item() / math.log(2):.3f} bits per character", flush=True)
        with torch.no_grad():
            loss = (
                reader.evaluate(test, curve=True).loss_curve[:, 1:] if meta_gradient else plain_loss(reader.model, test)
            )
        results[name] = loss.mean().item() / math.log(2)
        print(f"{name}: {results[name]:.3f} bits per character on passages held out")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
