"""Data rating: a small network learns which examples of a stream are worth training on (DataRater, arXiv 2505.17895).

A fifth of the examples of a stream have their characters shuffled; nobody says which. The rater gives every example a
weight, three inner models take two AdamW steps a window on what it weighs, and the rater learns from how well they then
read clean text. They are carried over windows; each is replaced by a new one every 100, at a time of its own.

    python examples/data_rating.py

25 seconds on one CPU thread, printed last for each way to the rater's gradient (200 windows):

    exact:       a bad example below a good one 97.0%, 3.410 bits a character
    first order: a bad example below a good one 50.0%, 3.457 bits a character
    none:        a bad example below a good one 50.0%, 3.457 bits a character

The first number is the AUC on examples drawn anew, the second the clean loss of the inner models, all ages together,
over the last 100 windows. Only the inner loss reads the rater, so its first-order gradient is exactly zero, as the
library warns, and all weights stay equal. With two other seeds the AUC was 95.5 and 95.2%. text.txt is by Shakespeare,
Poe, Jefferson, Lincoln and Carroll, in the public domain.
"""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il
from innerloop.problem import Tree

EXAMPLES, LENGTH = 32, 25  # in a batch, and characters of each
BAD = 0.2  # share of the examples whose characters are shuffled
MODELS, LIFE = 3, 100  # inner models, and after how many windows each is replaced by a new one

# The model.


class Characters(nn.Module):
    """Scores of the next character at every place, from the last six."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(symbols, 16), nn.Conv1d(16, 64, 6), nn.Linear(64, symbols)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.mix(nn.functional.pad(self.embed(rows).mT, (5, 0))).relu().mT)


class Rater(nn.Module):
    """One score an example, from its runs of three characters; at first the same for all."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(symbols, 16), nn.Conv1d(16, 32, 3), nn.Linear(32, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.mix(self.embed(rows).mT).tanh().mean(-1)).squeeze(-1)


# The recipe.
TEXT = (Path(__file__).parent / "text.txt").read_text("utf-8")
SYMBOLS = sorted(set(TEXT))
ROWS = torch.tensor([SYMBOLS.index(each) for each in TEXT][: len(TEXT) // LENGTH * LENGTH]).view(-1, LENGTH)
TRAIN, CLEAN = ROWS[torch.arange(len(ROWS)) % 6 != 5], ROWS[5::6]
MODEL, RATER = Characters(len(SYMBOLS)), Rater(len(SYMBOLS))  # called with parameters from elsewhere


def draw(rows: Tensor, *shape: int) -> Tensor:
    return rows[torch.randint(len(rows), shape)]


def stream(*shape: int) -> tuple[Tensor, Tensor]:
    """Training examples ``[*shape, LENGTH]``, and which of them are bad."""
    rows, bad = draw(TRAIN, *shape), torch.rand(shape) < BAD
    return torch.where(bad.unsqueeze(-1), rows.gather(-1, torch.rand(rows.shape).argsort(-1)), rows), bad


def losses(params: Tree, rows: Tensor) -> Tensor:
    scores = functional_call(MODEL, params, (rows[:, :-1],)).log_softmax(-1)
    return -scores.gather(-1, rows[:, 1:, None]).squeeze(-1).mean(-1)


def weighted_loss(params: Tree, meta: Tree, rows: Tensor) -> Tensor:
    return functional_call(RATER, meta, (rows,)).softmax(-1) @ losses(params, rows)


def new() -> il.End:
    """An inner model before its first step."""
    params = {name: value.detach() for name, value in Characters(len(SYMBOLS)).named_parameters()}
    return il.End(params, INNER.init(params), step=0)


# Every inner model is given by begin=, so the start is not read.
PROBLEM = il.Problem(lambda meta: new().params, weighted_loss, lambda params, meta, rows: losses(params, rows).mean())
INNER = il.AdamW(lr=0.01, steps=2, clip=0.4, eps=1e-4)  # about half of the gradients are longer


def learner(meta_gradient: il.meta_gradient.MetaGradient) -> il.Bilevel:
    return il.Bilevel(PROBLEM, Rater(len(SYMBOLS)), inner=INNER, meta_gradient=meta_gradient)


def found(rater: nn.Module) -> float:
    """How often a bad example is rated below a good one (AUC; 0.5 is chance)."""
    rows, bad = stream(2000)
    with torch.no_grad():
        above = rater(rows)[~bad, None] - rater(rows)[bad]
    return (above.sign().double().mean().item() + 1) / 2


def main(windows: int = 200) -> dict[str, tuple[float, float]]:
    results, ways = {}, {"exact": il.Unrolled(), "first order": il.FirstOrder(), "none": il.FirstOrder()}
    for name, meta_gradient in ways.items():
        torch.manual_seed(0)
        rating, ends, bits = learner(meta_gradient), [new() for _ in range(MODELS)], []
        optimizer = torch.optim.Adam(rating.parameters(), lr=0.02)
        for step in range(windows):
            # Each inner model goes on where the last window left it, and ends its life at a time of its own.
            ends = [end if (step + LIFE * k // MODELS) % LIFE else new() for k, end in enumerate(ends)]
            batches = [stream(INNER.steps, EXAMPLES)[0] for _ in ends]
            optimizer.zero_grad()
            metrics = rating.meta_step([il.Task(il.Steps(rows), draw(CLEAN, EXAMPLES)) for rows in batches], begin=ends)
            ends = metrics.end
            if name != "none":
                optimizer.step()
            bits.append(metrics.loss.item() / math.log(2))
            if step % 50 == 49:
                print(f"{name}, window {step + 1}: a bad example below a good one {found(rating.meta):.1%}", flush=True)
        results[name] = found(rating.meta), sum(bits[-LIFE:]) / len(bits[-LIFE:])
        print(f"{name}: a bad example below a good one {results[name][0]:.1%}, {results[name][1]:.3f} bits a character")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
