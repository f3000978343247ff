"""Data rating: a small network learns which examples of a stream are worth training on (DataRater, arXiv 2505.17895).

RESULTS
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

import innerloop as il

EXAMPLES, LENGTH = 32, 25  # of a batch, and characters of an example
BAD = 0.2  # share of the examples whose characters are shuffled
MODELS, LIFE = 3, 100  # inner models, and after how many windows each is replaced by a new one

# The model.


class Characters(nn.Module):
    """Scores of the next character at every place, from the last six."""

    def __init__(self, symbols: int) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(symbols, 16), nn.Conv1d(16, 64, 6), nn.Linear(64, symbols)

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.mix(F.pad(self.embed(rows).mT, (5, 0))).relu().mT)


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
HELD_OUT = torch.arange(len(ROWS)) % 6 == 5
TRAIN, CLEAN = ROWS[~HELD_OUT], ROWS[HELD_OUT]
MODEL, RATER = Characters(len(SYMBOLS)), Rater(len(SYMBOLS))  # what is called with the parameters of others


def draw(rows: Tensor, *shape: int) -> Tensor:
    return rows[torch.randint(len(rows), shape)]


def stream(*shape: int) -> tuple[Tensor, Tensor]:
    """Training examples ``[*shape, LENGTH]``, and which of them are bad."""
    rows, bad = draw(TRAIN, *shape), torch.rand(shape) < BAD
    return torch.where(bad.unsqueeze(-1), rows.gather(-1, torch.rand(rows.shape).argsort(-1)), rows), bad


def losses(params: il.problem.Tree, rows: Tensor) -> Tensor:
    scores = functional_call(MODEL, params, (rows[:, :-1],)).log_softmax(-1)
    return -scores.gather(-1, rows[:, 1:, None]).squeeze(-1).mean(-1)


def weighted_loss(params: il.problem.Tree, meta: il.problem.Tree, rows: Tensor) -> Tensor:
    return functional_call(RATER, meta, (rows,)).softmax(-1) @ losses(params, rows)


def new(*_: object) -> il.problem.Tree:
    return {name: value.detach() for name, value in Characters(len(SYMBOLS)).named_parameters()}


PROBLEM = il.Problem(new, weighted_loss, lambda params, meta, rows: losses(params, rows).mean())
INNER = il.AdamW(lr=0.01, steps=2, clip=1.0, eps=1e-4)


def learner(meta_gradient: il.meta_gradient.MetaGradient) -> il.Bilevel:
    return il.Bilevel(PROBLEM, Rater(len(SYMBOLS)), inner=INNER, meta_gradient=meta_gradient)


def window(rating: il.Bilevel, step: int, ends: list[il.End | None]) -> list[il.End]:
    """Two steps of every inner model on the stream, from where it was left, and the gradient of the rater."""
    for place in range(MODELS):
        if ends[place] is None or (step + place * LIFE // MODELS) % LIFE == 0:
            start = new()
            ends[place] = il.End(start, INNER.init(start), 0)
    tasks = [il.Task(support=il.Steps(stream(INNER.steps, EXAMPLES)[0]), query=draw(CLEAN, EXAMPLES)) for _ in ends]
    return rating.meta_step(tasks, begin=ends).end


def found(rater: nn.Module) -> float:
    """How often a bad example is rated below a good one (AUC; 0.5 is chance)."""
    rows, bad = stream(2000)
    with torch.no_grad():
        below = rater(rows)[~bad, None] - rater(rows)[bad]
    return ((below > 0).double() + (below == 0).double() / 2).mean().item()


def bits(rater: nn.Module, steps: int) -> float:
    """Bits per clean character of a new model that was trained on the stream as the rater weighs it."""
    params = {name: value.requires_grad_() for name, value in new().items()}
    optimizer, meta = torch.optim.AdamW(params.values(), lr=0.01, weight_decay=0.0), dict(rater.named_parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        weighted_loss(params, meta, stream(EXAMPLES)[0]).backward()
        optimizer.step()
    return losses(params, CLEAN).mean().item() / math.log(2)


def main(windows: int = 200, steps: int = 300) -> dict[str, tuple[float, float]]:
    results = {}
    for name, meta_gradient in {"exact": il.Unrolled(), "first order": il.FirstOrder(), "none": None}.items():
        torch.manual_seed(0)
        rating = learner(meta_gradient)
        optimizer, ends = torch.optim.Adam(rating.parameters(), lr=0.01), [None] * MODELS
        for step in range(windows if meta_gradient else 0):
            optimizer.zero_grad()
            ends = window(rating, step, ends)
            optimizer.step()
            if step % 50 == 49:
                print(f"{name}, window {step + 1}: bad rated below good {found(rating.meta):.3f}", flush=True)
        torch.manual_seed(1)
        results[name] = found(rating.meta), bits(rating.meta, steps)
        print(f"{name}: bad rated below good {results[name][0]:.3f}, {results[name][1]:.3f} bits per character")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
