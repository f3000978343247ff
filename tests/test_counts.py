"""What a meta-step computes, counted: gradients, curvature products and forward passes of the model, never seconds.

K inner steps of one task, of which the estimators may take so many passes and no more. A pass is one call of the
model's first layer on one task's images; a product without kept graphs runs the model once more.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import innerloop as il
from innerloop.curvature import observed

K = 4
ANIL = {"adapts": il.Head()}
CASES: list[tuple[str, dict[str, Any], int, int]] = [  # settings, forward passes, products
    ("kept graphs", {}, K + 1, 0),
    ("no memory", {"memory": 0}, 2 * K + 1, K),
    ("first order", {"meta_gradient": il.FirstOrder()}, K + 1, 0),
    ("truncated", {"meta_gradient": il.Truncated(1), "memory": 0}, K + 2, 1),
    ("window", {"meta_gradient": il.Window(2), "memory": 0}, K // 2 + 1 + K // 2, K // 2),
    ("two copies", {"meta_gradient": il.Unrolled(copies=2), "memory": 0}, K + 1 + K + sum(range(K - 1)), K),
    ("implicit", {"meta_gradient": il.Implicit(il.CG(3)), "proximal": 1.0}, K + 2, 4),
    ("features once", ANIL, 2, 0),
    ("features once, no memory", {**ANIL, "memory": 0}, 2, K),
    ("features in every step", {**ANIL, "reuse_prefix": False}, K + 1, 0),
]


class Counted(nn.Linear):
    """Counts its calls."""

    calls = 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        Counted.calls += 1
        return super().forward(input)


@pytest.mark.parametrize(("settings", "passes", "products"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_a_meta_step_takes_no_more_than_it_needs(
    settings: dict[str, Any], passes: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Counted(6, 8), nn.Tanh(), nn.Linear(8, 3))
    proximal = settings.get("proximal", 0.0)
    rest = {name: value for name, value in settings.items() if name != "proximal"}
    learner = il.MetaLearner(model, inner=il.SGD(lr=0.1, steps=K, proximal=proximal), chunk_size=1, **rest)
    part = torch.randn(1, 5, 6), torch.arange(5).remainder(3).unsqueeze(0)
    batch = il.Task(part, part)
    learner.meta_step(batch)  # the first looks at the model and measures it
    Counted.calls, seen = 0, []
    with observed(lambda step, direction, found: seen.append(step)):
        learner.meta_step(batch)
    assert (Counted.calls, len(seen)) == (passes, products)


def test_adapting_takes_one_pass_a_step_and_keeps_what_stands_still() -> None:
    model = nn.Sequential(Counted(6, 8), nn.Tanh(), nn.Linear(8, 3))
    images, labels = torch.randn(5, 6), torch.arange(5).remainder(3)
    for adapts, passes in ((il.Everything(), K), (il.Head(), 1)):
        learner = il.MetaLearner(model, adapts=adapts, inner=il.SGD(lr=0.1, steps=K))
        learner.adapt(images, labels)
        Counted.calls = 0
        learner.adapt(images, labels)
        assert Counted.calls == passes
