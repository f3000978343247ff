"""Test-time training of a small transformer on characters (after TTT-E2E, arXiv 2512.23675): does meta-training pay?

    python experiments/test_time_training/run.py [--quick] [--seeds 3]

A causal transformer reads a sequence in chunks, and sees nothing beyond its chunk. When it has predicted a chunk, the
MLP of its last block takes one SGD step on that chunk's loss. Meta-training lowers the mean loss of all chunks, each
judged before its own step. Does its exact gradient beat its first-order one, and do both beat plain training? Parts:

bits: bits a character on held-out topics of Python's documentation, at equal outer steps and at equal cost.
"""

from __future__ import annotations

import math
import statistics
import sys
from argparse import Namespace
from copy import deepcopy
from functools import cache, partial
from itertools import accumulate, product
from pathlib import Path
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from common import Part, Results, Section, collect, in_turns, judged, page_of, run
from test_time_training import Block, Embed

import innerloop as il
from innerloop.reporting import paired, table, verdict_of
from innerloop.reporting.figures import MARKED, Line, Panel, panels

FOLDER = Path(__file__).parent

CHUNKS, LENGTH = 8, 64  # of a sequence, and characters of a chunk
BLOCKS, WIDTH, HEADS = 2, 64, 4
MOVES = f"{BLOCKS}.mlp."  # the last MLP, by name
BATCH, BASE_STEPS, STEPS, TUNING_STEPS = 8, 600, 300, 60
BASE_LR, OUTER_LR = 3e-3, 1e-3  # Adam's; both fall to zero along a line
RATES = (0.1, 0.3, 1.0, 3.0)
PLAIN, FIRST, EXACT = "plain training", "first order", "exact"
WITHOUT, WITH = "no inner steps", "inner steps"
EQUAL = "steps", "cost"
METHODS = {PLAIN: None, FIRST: il.FirstOrder(), EXACT: il.Unrolled()}

# --- text -----------------------------------------------------------------------------------------


@cache
def documents() -> tuple[list[Tensor], int]:
    """The topics as codes, longest first, without paragraphs that came before; and the number of symbols."""
    seen: set[str] = set()
    texts = []
    for topic in sorted(topics.values(), key=len, reverse=True):
        own = [each for each in topic.split("\n\n") if each not in seen]
        seen.update(own)
        if len(text := "\n\n".join(own)) > CHUNKS * LENGTH:
            texts.append(text)
    codes = {symbol: code for code, symbol in enumerate(sorted(set("".join(texts))))}
    return [torch.tensor([codes[symbol] for symbol in text]) for text in texts], len(codes)


def held_out(place: int) -> Tensor:
    """Sequences of every sixth topic, side by side, ``[sequences, CHUNKS * LENGTH + 1]``: 3 is test, 4 validation."""
    size = CHUNKS * LENGTH
    return torch.cat([topic.unfold(0, size + 1, size) for topic in documents()[0][place::6]])


@cache
def to_train() -> tuple[Tensor, Tensor]:
    """All other topics in one piece, and where a sequence may begin so that it stays within its topic."""
    kept = [topic for place, topic in enumerate(documents()[0]) if place % 6 not in (3, 4)]
    firsts = accumulate((len(topic) for topic in kept[:-1]), initial=0)
    pairs = zip(firsts, kept, strict=True)
    return torch.cat(kept), torch.cat([first + torch.arange(len(topic) - CHUNKS * LENGTH) for first, topic in pairs])


def drawn(generator: torch.Generator) -> Tensor:
    text, firsts = to_train()
    chosen = firsts[torch.randint(len(firsts), (BATCH, 1), generator=generator)]
    return text[chosen + torch.arange(CHUNKS * LENGTH + 1)]


# --- model ----------------------------------------------------------------------------------------


def reader(model: nn.Module, rate: float, meta_gradient: il.meta_gradient.MetaGradient | None = None) -> il.MetaLearner:
    """A copy of the model, whose last MLP learns as it reads."""
    inner = il.SGD(lr=rate, steps=CHUNKS - 1)
    return il.MetaLearner(model, il.Named(f"{MOVES}*"), inner, meta_gradient, chunk_size=BATCH)


# --- training and reading -------------------------------------------------------------------------


def chunks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets, ``[sequences, chunks, LENGTH]`` each."""
    return rows[:, :-1].unflatten(1, (-1, LENGTH)), rows[:, 1:].unflatten(1, (-1, LENGTH))


def task(rows: Tensor) -> il.Task:
    """Step k learns from chunk k and is judged on chunk k + 1."""
    inputs, targets = chunks(rows)
    return il.Task(il.Steps((inputs[:, :-1], targets[:, :-1])), il.Steps((inputs[:, 1:], targets[:, 1:])))


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    """Loss of each chunk by itself, without inner steps, ``[sequences, chunks]``."""
    inputs, targets = chunks(rows)
    return cross_entropy(model(inputs).movedim(-1, 1), targets, reduction="none").mean(-1)


def add_gradient(learner: il.MetaLearner, method: str, rows: Tensor) -> None:
    """The gradient of the mean loss over sequences and chunks, into ``.grad``."""
    if METHODS[method] is None:
        losses(learner.model, rows).mean().backward()
        return
    learner.meta_step(task(rows), step_weights=[1 / CHUNKS] * (CHUNKS - 1))
    # no step comes before the first chunk
    (losses(learner.model, rows[:, : LENGTH + 1]).mean() / CHUNKS).backward()


def trained(model: nn.Module, method: str, rate: float, steps: int, seed: int, lr: float = OUTER_LR) -> nn.Module:
    """A copy of the model after so many outer steps; methods of one seed see the same sequences."""
    learner = reader(model, rate, METHODS[method])
    optimizer = torch.optim.Adam(learner.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        add_gradient(learner, method, drawn(generator))
        optimizer.step()
        schedule.step()
    return learner.model


@cache
def base(seed: int, steps: int = BASE_STEPS) -> nn.Module:
    """The plainly trained transformer that all methods of a seed begin with."""
    torch.manual_seed(seed)
    ends = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, documents()[1])
    first, blocks = Embed(documents()[1], WIDTH, LENGTH), (Block(WIDTH, HEADS) for _ in range(BLOCKS))
    fresh = nn.Sequential(first, *blocks, *ends)
    return trained(fresh, PLAIN, 1.0, steps, 1000 + seed, BASE_LR)


@torch.no_grad()
def bits(model: nn.Module, rows: Tensor, rate: float | None = None) -> Tensor:
    """Bits a character in each chunk, ``[sequences, CHUNKS]``; without a rate the model takes no inner steps."""
    found = losses(model, rows)
    if rate is not None:
        found[:, 1:] = reader(model, rate).evaluate(task(rows), curve=True).loss_curve[:, 1:]
    return found / math.log(2)


# --- measurement ----------------------------------------------------------------------------------


def costs(model: nn.Module, rounds: int = 15) -> dict[str, float]:
    """Seconds of an outer step over those of one plain gradient of the same characters."""
    rows = drawn(torch.Generator().manual_seed(0))
    learners = {method: reader(model, 1.0, gradient) for method, gradient in METHODS.items()}
    steps = {method: partial(add_gradient, learner, method, rows) for method, learner in learners.items()}
    seconds = in_turns(steps, rounds)
    return {method: round(each / seconds[PLAIN], 2) for method, each in seconds.items()}


def tuned() -> dict[str, float]:
    """For each method the inner rate that reads the validation topics best after a short training."""

    def loss(method: str, rate: float) -> float:
        found = bits(trained(base(0), method, rate, TUNING_STEPS, 0), held_out(4), rate).mean().item()
        print(f"  {method}, inner rate {rate:g}: {found:.4f} bits in validation", flush=True)
        return found if math.isfinite(found) else math.inf

    return {method: min(RATES, key=partial(loss, method)) for method in METHODS}


def measured(model: nn.Module, key: Results, rate: float, steps: int, test: Tensor) -> Results:
    """One training, read without and with inner steps: means of each test sequence and of each chunk."""
    end = trained(model, key["method"], rate, steps, key["seed"])
    found: Results = {"outer steps": steps}
    for name, given in {WITHOUT: None, WITH: rate}.items():
        values = bits(end, test, given)
        found[name] = {"sequences": values.mean(1).tolist(), "chunks": values.mean(0).tolist()}
        found[f"bits, {name}"] = values.mean().item()
    return found


def measure_bits(arguments: Namespace) -> Results:
    def one(key: Results, rows: list[Results]) -> Results:
        """The first row finds costs and inner rates for all."""
        known = rows[0] if rows else {"costs": costs(base(0)), "rates": tuned()}
        settled, method = {name: known[name] for name in ("costs", "rates")}, key["method"]
        times = known["costs"][EXACT] / known["costs"][method] if key["equal"] == "cost" else 1.0
        return settled | measured(base(key["seed"]), key, known["rates"][method], round(times * STEPS), held_out(3))

    trainings = [(method, equal) for equal in EQUAL for method in METHODS if (method, equal) != (EXACT, "cost")]
    wanted = [{"method": m, "equal": equal, "seed": seed} for seed in range(arguments.seeds) for m, equal in trainings]
    return collect(arguments.out / "bits.json", wanted, one)


def quick_bits(_: Namespace) -> Results:
    """The exact gradient is that of a loop written by hand, and first order is not; inner and outer steps help."""
    model, test, rate = base(0, 40), held_out(3)[::5], 1.0
    apart = {method: error(model, method, rate) for method in (EXACT, FIRST)}
    assert apart[EXACT] < 1e-6, f"the exact gradient should be that of the loop by hand, relative errors {apart}"
    assert apart[FIRST] > 1e-2, f"first order should leave something out, relative errors {apart}"
    still, moving = (float(bits(model, test, given).mean()) for given in (None, rate))
    assert moving < still - 0.05, f"inner steps should help: {still:.3f} bits without, {moving:.3f} with them"
    settled, rows = {"costs": costs(model, 2), "rates": dict.fromkeys(METHODS, rate)}, []
    for method in METHODS:
        key = {"method": method, "equal": "steps", "seed": 0}
        rows.append(key | settled | measured(model, key, rate, 10, test))
        after = rows[-1][f"bits, {WITH}"]
        assert after < moving - 0.05, f"{method} should learn: {moving:.3f} bits before, {after:.3f} after 10 steps"
    return {"rows": rows}


def error(model: nn.Module, method: str, rate: float) -> float:
    """Relative error of a meta-gradient against autograd through a loop written by hand, in float64."""
    rows = drawn(torch.Generator().manual_seed(0))[:2]
    learner = reader(deepcopy(model).double(), rate, METHODS[method])
    add_gradient(learner, method, rows)
    by_name = dict(learner.model.named_parameters())
    found = torch.cat([p.grad.flatten() for p in by_name.values()])
    total = torch.zeros((), dtype=torch.float64)
    with sdpa_kernel(SDPBackend.MATH):
        for sequence in zip(*chunks(rows), strict=True):
            params = dict(by_name)
            for inputs, targets in zip(*sequence, strict=True):
                loss = cross_entropy(functional_call(learner.model, params, inputs), targets)
                total = total + loss / (len(rows) * CHUNKS)
                moving = {name: p for name, p in params.items() if name.startswith(MOVES)}
                grads = torch.autograd.grad(loss, [*moving.values()], create_graph=True)
                params |= {name: p - rate * grad for (name, p), grad in zip(moving.items(), grads, strict=True)}
        expected = torch.cat([grad.flatten() for grad in torch.autograd.grad(total, [*by_name.values()])])
    assert abs(float(bits(learner.model, rows, rate).mean()) * math.log(2) - float(total.detach())) < 1e-6, (
        "another loss is read than that of the loop"
    )
    return float((found - expected).norm() / expected.norm())


# --- page -----------------------------------------------------------------------------------------

COMPARED = [
    ("exact beats first order", "others disagree", (EXACT, WITH), (FIRST, WITH)),
    ("exact beats plain training without inner steps", "–", (EXACT, WITH), (PLAIN, WITHOUT)),
    ("exact beats plain training that is read with inner steps", "–", (EXACT, WITH), (PLAIN, WITH)),
    ("first order beats plain training that is read with inner steps", "–", (FIRST, WITH), (PLAIN, WITH)),
    ("inner steps help after plain training", "–", (PLAIN, WITH), (PLAIN, WITHOUT)),
]


def by_seed(results: Results, method: str, equal: str) -> dict[int, Results]:
    """The rows of a method; those of the exact one serve both comparisons."""
    key = method, "steps" if method == EXACT else equal
    return {row["seed"]: row for row in results["rows"] if (row["method"], row["equal"]) == key}


def tell_bits(results: Results) -> Section:
    claims, body = [], []
    for (claim, published, ours, theirs), equal in product(COMPARED, EQUAL):
        (first, one), (second, other) = ((by_seed(results, method, equal), name) for method, name in (ours, theirs))
        saved = [
            [b - a for a, b in zip(first[seed][one]["sequences"], second[seed][other]["sequences"], strict=True)]
            for seed in first.keys() & second.keys()
        ]
        if saved:
            # the sequences are the same for all seeds
            of_sequences, of_seeds = (
                [statistics.fmean(of) for of in each] for each in (zip(*saved, strict=True), saved)
            )
            mean, half = paired(of_sequences, of_seeds if len(saved) > 1 else None)
            scale = f"{CHUNKS} chunks of {LENGTH} characters, {len(saved)} seed{'s' * (len(saved) > 1)}"
            verdict = judged(verdict_of(mean, half, margin=0.0)) if len(saved) > 1 else "open"
            claims.append([f"{claim}; equal {equal}", published, f"{mean:+.4f} ± {half:.4f} bits", scale, verdict])
    for equal, method in product(EQUAL, METHODS):
        mine = [row for row in by_seed(results, method, equal).values() if row["equal"] == equal]
        if mine:
            means = [f"{statistics.fmean(row[f'bits, {name}'] for row in mine):.4f}" for name in (WITHOUT, WITH)]
            settled = [f"{mine[0]['costs'][method]:.2f}", f"{mine[0]['rates'][method]:g}"]
            body.append([f"{method}, equal {equal}", str(len(mine)), str(mine[0]["outer steps"]), *settled, *means])
    head = ["training", "seeds", "outer steps", "cost of one", "inner rate", f"bits, {WITHOUT}", f"bits, {WITH}"]
    return claims, f"## Bits a character\n\n{READING}\n\n{table(head, body)}\n\n{COST}"


def draw_bits(results: Results) -> Figure:
    places, plain = range(1, CHUNKS + 1), by_seed(results, PLAIN, "steps")
    read: dict[str, Line] = {}
    saved: dict[str, Line] = {}
    for method, name in ((PLAIN, WITHOUT), (PLAIN, WITH), (FIRST, WITH), (EXACT, WITH)):
        if mine := by_seed(results, method, "steps"):
            each = torch.tensor([row[name]["chunks"] for row in mine.values()])
            less = torch.tensor([plain[seed][WITHOUT]["chunks"] for seed in mine]) - each
            for lines, values in ((read, each), (saved, less)):
                lines[f"{method}, {name}"] = Line(places, values.mean(0), MARKED, values.amin(0), values.amax(0))
    axes = {"xlabel": "chunk of the sequence", "xticks": places}
    left, right = ({"ylabel": label} for label in ("bits a character", "bits saved beside the first line"))
    return panels([Panel(read, axes | left), Panel(saved, axes | right)])


GRID = ", ".join(f"{rate:g}" for rate in RATES)
READING = f"""\
A sequence has {CHUNKS} chunks, so {CHUNKS - 1} inner steps; each chunk is judged before the step on it. All methods of
a seed begin with the same plainly trained transformer ({BASE_STEPS} steps) and see the same sequences, {BATCH} an outer
step. The inner rate is the best of {GRID} on validation topics, after {TUNING_STEPS} outer steps of seed 0. Plain
training has no inner steps; read with them it is dynamic evaluation. ± is a 95 % interval, paired by sequence, and the
wider of that and the one over seeds. Bands of the figure, which is at equal steps, span the seeds."""
COST = """\
The cost of an outer step is its time over that of one plain gradient of the same characters. At equal cost each method
has as many plain gradients as the exact one. First order need not cost so much: the characters that judge one step are
those of the next, so a single gradient of each chunk would do. The library computes two."""

HEADER = f"""\
# Test-time training of a small transformer (after TTT-E2E, arXiv 2512.23675)

**What differs from the paper.** It trains language models of 125 million to 3 billion parameters, with 128 inner steps
and clipped gradients. Here a causal transformer of about 120 thousand parameters reads characters. It has {BLOCKS}
blocks, and sees nothing before its chunk of {LENGTH} characters. The MLP of the last block learns as it reads, by plain
SGD. The text is Python's own documentation, as `pydoc_data` holds it, without repeated paragraphs. A third of its
topics is held out, half of them for validation. So no number of the paper's stands here. Others who tried both
gradients disagree on whether the exact one pays. Bits are bits a character, fewer being better. A positive difference
is what the first of two saves."""


def page(results: dict[str, Results]) -> str:
    return page_of(HEADER, {"bits": tell_bits}, results, "`python experiments/test_time_training/run.py --threads 1`")


PARTS = {"bits": Part(measure_bits, draw_bits, quick_bits, grows=True)}

if __name__ == "__main__":
    run(__doc__ or "", FOLDER, PARTS, page)
