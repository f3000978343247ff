"""Few-shot regression on real weather: the year of one station from a few of its days."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import numpy as np

from innerloop.tasks._episodes import SPLITS, Bits, recorded
from innerloop.tasks._files import read_npz
from innerloop.tasks._regression import Floats, Regression

FILE = "temperature_normals.npz"
LAYOUT = (
    f"data= (--data) takes {FILE} or its folder: arrays tavg_tenths_degF [stations, 366] in tenths of a degree "
    f"Fahrenheit and split [stations] with 0 train, 1 validation, 2 test"
)
DAYS = 366


class Stations(Regression):
    """See `stations`.

    Attributes:
        mean: of the training stations' temperatures, in degrees Celsius.
        std: their standard deviation; a target is ``(temperature - mean) / std``.
    """

    def __init__(self, path: Path, shots: int, queries: int, seed: int) -> None:
        super().__init__("stations", 1, shots, queries, seed)
        arrays = read_npz(path, ("tavg_tenths_degF", "split"))
        split = arrays["split"]
        celsius = (arrays["tavg_tenths_degF"] / 10 - 32) / 1.8
        if celsius.shape != (len(split), DAYS) or not {0, 1, 2} <= set(split.tolist()):
            raise ValueError(f"{path} is not laid out as expected; {LAYOUT}")
        self.mean, self.std = float(celsius[split == 0].mean()), float(celsius[split == 0].std())
        self._temperatures = (celsius - self.mean) / self.std
        self._stations = {name: np.flatnonzero(split == number) for number, name in enumerate(SPLITS)}

    def _width(self) -> int:
        return 1 + DAYS

    def _draw(self, split: str, bits: Bits) -> tuple[Floats, Floats]:
        members = self._stations[split]
        station = members[(bits[:, 0] % np.uint64(len(members))).astype(np.int64)]
        days = bits[:, 1:].argsort(axis=1, kind="stable")[:, : self.shots + self.queries]
        days = np.concatenate([np.sort(days[:, : self.shots]), np.sort(days[:, self.shots :])], axis=1)
        return np.linspace(-1, 1, DAYS)[days][..., None], self._temperatures[station[:, None], days][..., None]


@recorded
def stations(
    shots: int = 5, queries: int | None = None, seed: int = 0, data: str | PathLike[str] | None = None
) -> Stations:
    """Few-shot regression on the daily mean temperatures of weather stations: a few days are given, the others asked.

    A task is one station and some random days. The input ``[days, 1]`` is the day of the year, from -1 (1 January) to 1
    (31 December); the target ``[days, 1]`` is the temperature, less the mean and over the standard deviation of the
    training stations. Days are in order, and no day is in both sets.

    Args:
        shots: support days.
        queries: query days; by default all others of the year's 366.
        seed: selects the stream of tasks.
        data: the npz file (arrays ``tavg_tenths_degF`` and ``split``), or the folder that holds it.

    Raises:
        FileNotFoundError: no ``data``, or nothing at that place.
        ValueError: damaged data, or more days than there are.
    """
    if data is None:
        raise FileNotFoundError(f"stations is not downloaded; {LAYOUT}")
    root = Path(data).expanduser()
    path = root / FILE if root.is_dir() else root
    if not path.is_file():
        raise FileNotFoundError(f"found no weather stations at {root}; {LAYOUT}")
    queries = DAYS - shots if queries is None else queries
    if shots + queries > DAYS:
        raise ValueError(f"stations: {shots} shots and {queries} queries are more than the {DAYS} days of a year")
    return Stations(path, shots, queries, seed)
