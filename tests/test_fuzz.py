"""Nonsense, drawn at random: settings, configurations, command lines, tasks, images, archives and Python calls.

Whatever is not taken is refused in one line, by an error with a name, before anything is written.
"""

import io
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import innerloop as il
from innerloop.choices import ADAPTS, INNER, META_GRADIENT, choice, make
from innerloop.cli import main
from innerloop.errors import UsageError
from innerloop.tasks._files import Files, read_npz, read_table
from innerloop.tasks._pictures import decode, is_image
from innerloop.training.build import choose_device
from innerloop.training.choices import MODEL, OPTIMIZER, SCHEDULE
from innerloop.training.settings import Settings, flag, read_config


def cases(count: int) -> Any:
    """The same cases in every run of the tests."""
    health = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much]
    return settings(max_examples=count, derandomize=True, deadline=None, database=None, suppress_health_check=health)


def taken_or_refused(call: Callable[[], Any], refusals: tuple[type[Exception], ...] = (ValueError, UsageError)) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except refusals as error:
        text = str(error)
        assert text
        assert "\n" not in text, text
        assert "Traceback" not in text


# Values at the edges, and what people mistype; none of them asks for more than a moment or a few megabytes.
numbers = st.sampled_from(
    ["0", "1", "2", "3", "-1", "0.5", "-0.0", "1e-30", "1e400", "nan", "inf", "-inf", "1_0", "0x1", "", " ", "1,2", "٣"]
)
words = st.sampled_from(
    ["true", "false", "none", "None", "null", "[]", "{}", "a=b", "=", ":", "::", "a" * 300, "\x00", "\x1b[2J", "\udcff"]
)
values = st.one_of(numbers, words, st.text(max_size=8))
names = st.sampled_from([*ADAPTS, *INNER, *META_GRADIENT, *OPTIMIZER, *SCHEDULE, *MODEL, "x"])
KEYS = """lr steps eps beta1 betas momentum horizon size order iterations damping clip per mode copies memory
    weight_decay proximal floor filters capturable foreach fused nesterov
    minibatch moves learn_start pattern batch_norm foo"""
keys = st.sampled_from(KEYS.split())
arguments = st.lists(st.one_of(values, st.builds("{}={}".format, keys, values)), max_size=3).map(",".join)
chosen = st.one_of(names, st.builds("{}:{}".format, names, arguments), values)
typed = st.one_of(chosen, values)
fieldnames = st.sampled_from([each.name for each in fields(Settings)])
python_values = st.one_of(
    typed, st.none(), st.booleans(), st.integers(-2, 5), st.floats(width=16), st.lists(st.integers(), max_size=2),
    st.binary(max_size=3), st.just({}), st.just(10**400),
)  # fmt: skip


@cases(500)
@given(st.dictionaries(fieldnames, python_values, min_size=1, max_size=3))
def test_settings(values: dict[str, Any]) -> None:
    def build() -> None:
        choose_device(Settings(**values))

    taken_or_refused(build)


@cases(400)
@given(st.sampled_from(["optimizer", "schedule", "model", "adapts", "inner", "meta_gradient", "start"]), chosen)
def test_choices(what: str, text: str) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    tables = {"optimizer": (OPTIMIZER, (parameters,)), "schedule": (SCHEDULE, ()), "model": (MODEL, ((3, 16, 16), 5))}
    if what in tables:
        table, given = tables[what]
        taken_or_refused(lambda: make(what, table, text, *given))
    else:
        taken_or_refused(lambda: choice(text, what))


lines = st.one_of(
    st.builds("{}: {}".format, fieldnames, typed),
    st.builds("{} = {}".format, fieldnames, typed),
    st.builds('{{"{}": {}}}'.format, fieldnames, typed),
    st.sampled_from(
        ["- a", "? b", "&a [*a]", "!!python/object:os.system x", "<<: *a", "[a]", '{"steps": 1, "steps": 2}']
    ),
    st.text(max_size=20),
)


@cases(250)
@given(st.sampled_from(["c.yaml", "c.toml", "c.json"]), st.lists(lines, max_size=4), st.binary(max_size=2))
def test_configurations(tmp_path: Path, name: str, content: list[str], tail: bytes) -> None:
    file = tmp_path / name
    file.write_bytes("\n".join(content).encode("utf-8", "surrogatepass") + tail)
    taken_or_refused(lambda: Settings(**read_config(file)))


options = st.lists(
    st.one_of(
        st.builds("--{}={}".format, fieldnames.map(flag), typed),
        st.builds("--{}".format, fieldnames.map(flag)),
        st.sampled_from(
            ["--out", "--resume=nowhere", "--config=nowhere", "--method=maml", "--replay", "--budget=1", "-x"]
        ),
        values,
    ),
    min_size=1,
    max_size=3,
)


@cases(150)
@given(st.sampled_from(["train", "compare", "evaluate", "adapt", "check", "patterns", "data", "x"]), options)
def test_command_lines(tmp_path_factory: Any, command: str, given: list[str]) -> None:
    """Each ends in an option that is refused, so that none begins to train."""
    place = tmp_path_factory.getbasetemp() / "commands"
    place.mkdir(exist_ok=True)
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr("sys.stderr", output)
        patch.setattr("sys.stdout", io.StringIO())
        with pytest.raises(SystemExit) as ended:
            main([command, *given, "--steps=nan", "--dataset=nonesuch"])
    helped = "-h" in given or "--help" in given
    assert ended.value.code == (0 if helped else 2)
    assert helped or output.getvalue().count("\n") == 1, output.getvalue()
    assert output.getvalue()[:-1].isprintable()
    assert not list(place.iterdir())


def picture(kind: str) -> bytes:
    content = io.BytesIO()
    Image.effect_noise((12, 10), 50).convert("L" if kind != "WEBP" else "RGB").save(content, kind)
    return content.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "TGA", "PCX", "ICO")]
edits = st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=4)), max_size=4)


def edited(content: bytes, changes: list[tuple[float, bytes]], end: float) -> bytes:
    found = bytearray(content)
    for place, new in changes:
        at = int(place * len(found))
        found[at : at + len(new)] = new
    return bytes(found[: max(1, int(end * len(found)))])


@cases(250)
@given(st.one_of(st.sampled_from(PICTURES), st.binary(max_size=60)), edits, st.sampled_from([1.0, 0.9, 0.5, 0.1]))
def test_images(content: bytes, changes: list[tuple[float, bytes]], end: float) -> None:
    """Pillow raises nearly anything; what calls `decode` names the file. It neither hangs nor crashes."""
    taken_or_refused(lambda: decode(edited(content or b"0", changes, end), 8, 3), (Exception,))


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as file:
            for name in ("a/0.png", "b/0.png", "../c.png", "/d.png"):
                file.writestr(name, PICTURES[0])
    elif kind == "npz":
        with zipfile.ZipFile(content, "w") as file:
            array = io.BytesIO()
            np.save(array, np.zeros(3, np.uint8))
            file.writestr("images.npy", array.getvalue())
    else:
        with tarfile.open(fileobj=content, mode=f"w{kind}") as tar:  # type: ignore[call-overload]
            for name in ("a/0.png", "../b/0.png"):
                item = tarfile.TarInfo(name)
                item.size = len(PICTURES[0])
                tar.addfile(item, io.BytesIO(PICTURES[0]))
    return content.getvalue()


ARCHIVES = {f"x.{'tar' if ':' in kind else kind}{kind[1:] if ':' in kind else ''}": archive(kind)
            for kind in ("zip", "npz", ":", ":gz", ":bz2", ":xz")}  # fmt: skip


@cases(250)
@given(st.sampled_from(sorted(ARCHIVES)), edits, st.sampled_from([1.0, 0.9, 0.5]))
def test_archives(tmp_path: Path, name: str, changes: list[tuple[float, bytes]], end: float) -> None:
    file = tmp_path / name
    file.write_bytes(edited(ARCHIVES[name], changes, end))
    before = set(tmp_path.iterdir()) | {tmp_path / "cache"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INNERLOOP_CACHE", str(tmp_path / "cache"))

        def read() -> None:
            files = Files(file)
            list(files.read(files.stamps))

        taken_or_refused(read)
        taken_or_refused(lambda: read_npz(file, ["images"]))
    assert set(tmp_path.iterdir()) <= before


@cases(100)
@given(st.binary(max_size=40), st.text(max_size=12))
def test_tables_and_names(content: bytes, name: str) -> None:
    taken_or_refused(lambda: read_table(Path("some.csv"), content))
    taken_or_refused(lambda: is_image(name))


shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.one_of(
    st.builds(torch.zeros, shapes),
    st.builds(lambda shape, high: torch.full(shape, high), shapes, st.integers(-1, 9)),
    st.just(torch.full((2, 3), float("nan"))),
    st.none(), st.integers(0, 2), st.just("text"), st.just([]), st.just((torch.zeros(2, 3),)),
)  # fmt: skip
parts = st.one_of(st.tuples(tensors, tensors), tensors)


@cases(150)
@given(parts, parts, st.sampled_from(["meta_step", "evaluate", "adapt"]))
def test_tasks(support: Any, query: Any, what: str) -> None:
    learner = il.MetaLearner(
        torch.nn.Sequential(torch.nn.Linear(3, 2)), adapts=il.Everything(), inner=il.SGD(lr=0.1, steps=1)
    )

    def call() -> None:
        if what == "adapt":
            learner.adapt(support, query)
        else:
            getattr(learner, what)([il.Task(support, query)])

    taken_or_refused(call)


calls = st.sampled_from(
    [
        il.SGD,
        il.Momentum,
        il.Adam,
        il.AdamW,
        il.NewtonCG,
        il.LearnedRates,
        il.Truncated,
        il.Window,
        il.Binomial,
        il.Mixed,
    ]
)
given_values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.floats(width=16),
    st.just("x"),
    st.just([]),
    st.just({}),
    st.just((1, 2)),
)


@cases(200)
@given(calls, st.dictionaries(keys, given_values, max_size=3))
def test_python_calls(kind: Any, given: dict[str, Any]) -> None:
    """Python itself refuses arguments that a class has not, by TypeError; values that it takes are ours to refuse."""
    known = {each.name for each in fields(kind)}
    required = {"lr": 0.1, "steps": 1, "horizon": 1, "size": 2, "order": 1, "horizons": (1,), "weights": (1.0,)}
    arguments = {name: value for name, value in (required | given).items() if name in known}
    taken_or_refused(lambda: kind(**arguments))
