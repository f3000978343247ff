"""Write the table of the named methods in methods.md: ``python docs/make_methods.py``.

What follows the table there, where the hyper-parameters come from, is written by hand.
"""

from __future__ import annotations

import re
from pathlib import Path

from innerloop.training.build import INK
from innerloop.training.methods import METHODS, Method, method_settings
from innerloop.training.settings import Settings, flag

PAGE = Path(__file__).with_name("methods.md")
CHARACTERS, PICTURES = INK[0], "cifar_fs"  # one data set of each of the two variants
INNER = {"inner", "inner_lr", "inner_steps", "test_steps", "weight_decay", "proximal"}
SHOWN = {"adapts", "start", *INNER, "meta_gradient", "optimizer", "outer_lr"}

INTRO = """# The named methods

A name stands for all that a paper chooses: what adapts, how it moves, the meta-gradient, and the inner and outer
rates. You choose the tasks, the model, the number of tasks in a batch and, but for Reptile, the outer schedule.

```
innerloop train --method anil --dataset fc100 --data DATA            # other options override the method's
innerloop compare --methods maml,anil,window:5,lambda:00001 --dataset cifar_fs --data DATA --budget 10m
```

A name with a colon takes an argument: `window:5`. Any method may begin with the weights of another run, so that
pretraining and then meta-training is two lines:

```
innerloop train --method pretrained --dataset cifar_fs --data DATA --shots 5 --out runs/features
innerloop train --method proto-anil --dataset cifar_fs --data DATA --shots 5 --start-from runs/features
```

In Python:

```python
from innerloop.training.methods import method_settings
from innerloop.training.settings import Settings

settings = Settings(dataset="cifar_fs", **method_settings("window:5", "cifar_fs"))
adapts, inner, meta_gradient = settings.method()
print(adapts, inner, meta_gradient, settings.outer_lr, sep="\\n")
```

```text
Everything()
SGD(lr=0.01, steps=5)
Window(size=5)
0.001
```

`il.MetaLearner` takes the first three, `settings.start` and `settings.batch_norm`. An outer optimiser takes the rate.
`il.compare(["anil", "window:5"], folder="study", minutes=10)` compares methods. The script `docs/make_methods.py` makes
the table.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRO, *_settings(), "", PAGE.read_text(encoding="utf-8")[_sources() :]])


def _settings() -> list[str]:
    return [
        "## What they set",
        "",
        f"Some cells have two lines: the first is for {' and '.join(INK)}, the second for all other tasks.",
        "The words are those of the settings. *adapts* gives the start too, where that makes the head. *inner* gives",
        "the solver, its rate and steps, the steps of evaluation where they differ, and its weight decay or proximal",
        "weight. *outer* gives the optimiser, its rate and what else is set. A name with a second form takes an",
        "argument, and its row shows the bare name.",
        "",
        "| name | method | paper | adapts | inner | meta-gradient | outer |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(_row(name, each) for name, each in METHODS.items()),
    ]


def _row(name: str, each: Method) -> str:
    variants = [Settings(**{"dataset": data, **method_settings(name, data)}) for data in (CHARACTERS, PICTURES)]
    rest = sorted(method_settings(name, CHARACTERS).keys() - SHOWN)
    cells = [
        [f"`{settings.adapts}`" + (f" from `{settings.start}`" if settings.start else "") for settings in variants],
        [_inner(settings) for settings in variants],
        [f"`{settings.meta_gradient}`" for settings in variants],
        [_outer(settings, rest) for settings in variants],
    ]
    names = f"`{name}`" + (f", `{name}:{each.example}`" if each.argument else "")
    paper = f"[{each.paper}](https://arxiv.org/abs/{each.paper})"
    return f"| {' | '.join([names, each.title, paper, *('<br>'.join(dict.fromkeys(cell)) for cell in cells)])} |"


def _inner(settings: Settings) -> str:
    parts = [f"`{settings.inner}` at {settings.inner_lr}"]
    if not settings.inner_steps:
        return "no step"
    parts.append(f"{settings.inner_steps} step{'s' * (settings.inner_steps > 1)}")
    if settings.test_steps is not None:
        parts.append(f"{settings.test_steps} in evaluation")
    weights = {name: getattr(settings, name) for name in ("weight_decay", "proximal")}
    return ", ".join([*parts, *(f"{flag(name)} {weight:g}" for name, weight in weights.items() if weight)])


def _outer(settings: Settings, rest: list[str]) -> str:
    return ", ".join(
        [f"`{settings.optimizer}` at {settings.outer_lr:g}", *(f"{flag(x)} {getattr(settings, x)}" for x in rest)]
    )


def _sources() -> int:
    """Where the part that is written by hand begins; it has a row for each method."""
    text = PAGE.read_text(encoding="utf-8")
    begin = text.index("## Where the hyper-parameters come from")
    named = re.findall(r"^\| `([^`]+)`", text[begin:], flags=re.MULTILINE)
    if named != list(METHODS):
        raise ValueError(f"{PAGE.name} tells the sources of {named}, and the methods are {list(METHODS)}")
    return begin


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
