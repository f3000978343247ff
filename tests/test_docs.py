"""The pages of docs/: their Python runs and prints what they show, and their tables say what the code does."""

import contextlib
import gc
import inspect
import io
import itertools
import math
import re
import runpy
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import innerloop as il
from innerloop.curvature import gradient, observed
from innerloop.meta_gradient import MetaGradient, Snapshot

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def text_of(page: str) -> str:
    return (DOCS / page).read_text(encoding="utf-8")


def same(printed: str, shown: str) -> bool:
    """Equal words and spaces aside, and numbers equal to one unit of the last digit shown."""
    if NUMBER.sub("#", printed).split() != NUMBER.sub("#", shown).split():
        return False
    return all(
        abs(float(mine) - float(wanted)) <= 1.01 * 10.0 ** -len(wanted.partition(".")[2]) * ("." in wanted)
        for mine, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True)
    )


def test_output_is_compared_to_the_last_digit_shown():
    assert same("loss  0.1234 of 5", "loss 0.1235 of 5")
    assert not same("loss 0.1234", "loss 0.1236")
    assert not same("of 5", "of 6")
    assert not same("loss 0.1", "cost 0.1")


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs_and_prints_what_is_shown(page):
    blocks = re.findall(r"^```(python|text)\n(.*?)^```$", text_of(page), flags=re.DOTALL | re.MULTILINE)
    names: dict = {"__name__": "page"}
    printed = ""
    for kind, block in blocks:
        if kind == "text":
            assert same(printed, block), f"{page} shows\n{block}\nbut prints\n{printed}"
            printed = ""
            continue
        assert not printed, f"{page} does not show what a block prints:\n{printed}"
        with contextlib.redirect_stdout(io.StringIO()) as stream:
            exec(compile(block, page, "exec"), names)
        printed = stream.getvalue()
    assert not printed


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", text_of(page)):
        assert link.startswith("https://arxiv.org/abs/") or (DOCS / link).exists(), link


def test_the_table_of_methods_is_up_to_date():
    make = runpy.run_path(str(DOCS / "make_methods.py"))
    assert text_of("methods.md") == make["page"](), "run python docs/make_methods.py"


def test_estimators_that_a_page_names_by_string_exist():
    from innerloop.choices import META_GRADIENT, make
    from innerloop.cli import COMMANDS
    from innerloop.training.methods import method

    text = "\n".join(map(text_of, PAGES))
    commands = re.findall(r"(?:^|`)innerloop (\w+)", text, flags=re.MULTILINE)
    assert {"check", "compare", "patterns", "adapt", "train"} <= set(commands) <= set(COMMANDS)
    for names in re.findall(r"--methods? (\S+)", text):
        for name in names.split(","):
            method(name)
    for names in re.findall(r"--estimators (\S+)", text):
        for name in names.split(","):
            make("estimator", META_GRADIENT, name)


# --- the costs of choosing.md -----------------------------------------------------------------------------------------

SIZE = 37
COSTS = re.findall(r"^\| `(\w+\(.*\))` \| (.+) \| (.+) \| (.+) \|$", text_of("choosing.md"), flags=re.MULTILINE)


def quartic() -> tuple[il.Problem, dict[str, Tensor], il.Task]:
    """An inner loss whose Hessian is positive definite and changes along the way."""

    def inner_loss(params: dict[str, Tensor], meta: dict[str, Tensor], batch: Tensor) -> Tensor:
        distance = params["p"] - meta["target"]
        return (distance.square() + distance**4 / 4).sum() / 2

    problem = il.Problem(
        lambda meta: {"p": meta["start"]}, inner_loss, lambda params, meta, batch: params["p"].cos().sum()
    )
    meta = {"start": torch.full((SIZE,), 0.05).double(), "target": torch.linspace(0.1, 1, SIZE).double()}
    return problem, meta, il.Task(torch.zeros(()), torch.zeros(()))


def counts(estimator: MetaGradient, inner: il.inner.InnerSolver, monkeypatch) -> Counter:
    """Inner gradients, curvature products and, while the outer loss is computed, snapshots of the inner loop."""
    problem, meta, task = quartic()
    found: Counter = Counter()

    def counted(*arguments):
        found["gradients"] += 1
        return gradient(*arguments)

    def observe(step: int, direction: dict[str, Tensor], products: object) -> None:
        found["products"] += torch.func.debug_unwrap(direction["p"], recurse=True).numel() // SIZE

    def judged(*arguments):
        found["snapshots"] = sum(type(each) is Snapshot for each in gc.get_objects())
        return problem.outer_loss(*arguments)

    gc.freeze()  # get_objects passes over what is there already
    with monkeypatch.context() as patch, observed(observe):
        patch.setattr("innerloop.inner._loop.gradient", counted)
        result = il.hypergradient(replace(problem, outer_loss=judged), meta, task, inner, estimator)
    gc.unfreeze()
    found["reported"] = int(result.diagnostics["curvature_products"])
    return found


def test_all_estimators_have_a_row():
    kinds = {cells[0].partition("(")[0] for cells in COSTS}
    public = {name: getattr(il.meta_gradient, name) for name in il.meta_gradient.__all__}
    estimators = {name for name, each in public.items() if inspect.isclass(each) and issubclass(each, MetaGradient)}
    estimators -= {name for name in estimators if public[name].joint}  # which has no inner loop
    assert kinds == estimators - {"MetaGradient"} | {"MemoryReduced"}


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is exactly zero")
@pytest.mark.parametrize("sizes", [dict(K=7, w=3, h=2, n=4, L=3), dict(K=9, w=11, h=20, n=2, L=1)])
@pytest.mark.parametrize("row", COSTS, ids=lambda row: row[0])
def test_costs_are_what_is_counted(row, sizes, monkeypatch):
    copies, steps = sizes["n"], sizes["K"]
    runs = next(runs for runs in itertools.count(1) if math.comb(copies - 1 + runs, copies - 1) >= steps)
    names = {"ceil": math.ceil, "runs": runs, "lam": 2.0, **vars(il), **sizes}
    estimator, *cells = row
    inner = il.SGD(lr=0.05, steps=sizes["K"])
    found = counts(eval(estimator, names), inner, monkeypatch)
    assert found["reported"] == found["products"]
    for cell, what in zip(cells, ("gradients", "products", "snapshots"), strict=True):
        formula = cell.removeprefix("at most ").strip("`")
        wanted = 0 if formula == "none" else eval(formula, names)
        assert found[what] <= wanted if cell.startswith("at most") else found[what] == wanted, (what, found)


@pytest.mark.filterwarnings("ignore:the meta-gradient of .* is exactly zero")
def test_the_remarks_on_costs(monkeypatch):
    solvers = (
        il.Adam(lr=0.05, steps=6),
        il.AdamW(lr=0.05, steps=6),
        il.LearnedRates(lr=0.05, steps=6),
        il.SGD(lr=0.05, steps=6, clip=1.0),
    )
    for solver, estimator in itertools.product(solvers, (il.FirstOrder(), il.Truncated(2))):
        assert counts(estimator, solver, monkeypatch)["snapshots"] == 6
    for solver in solvers:
        again = counts(il.Unrolled(copies=3), solver, monkeypatch)["gradients"]
        assert again == counts(il.Unrolled(copies=3), il.SGD(lr=0.05, steps=6), monkeypatch)["gradients"] + 6
    assert math.comb(20 - 1 + 2, 20 - 1) < 1000 <= math.comb(20 - 1 + 3, 20 - 1)
    assert counts(il.Implicit(il.Neumann(3)), il.SGD(lr=0.05, steps=2), monkeypatch)["products"] == 3 + 1 + 5
    newton = il.NewtonCG(steps=2, iterations=5, trials=8)
    found = counts(il.Implicit(il.CG(3)), newton, monkeypatch)
    assert (found["products"], found["reported"]) == (2 * 5 + 4, 4)


# --- what choosing.md says of meta-parameters inside the inner loss ---------------------------------------------------


@pytest.mark.parametrize("estimator", [row[0] for row in COSTS])
def test_only_first_order_and_reptile_give_zero_inside_the_inner_loss_and_say_so(estimator):
    names = {"lam": 2.0, "K": 4, "w": 2, "h": 2, "n": 4, "L": 1, **vars(il)}
    zero = estimator.startswith(("FirstOrder", "Reptile"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        grad = il.hypergradient(*quartic(), il.SGD(lr=0.05, steps=4), eval(estimator, names)).grad["target"]
    assert bool(grad.any()) != zero
    assert any("target is exactly zero" in str(each.message) for each in caught) == zero
