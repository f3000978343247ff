"""Downloads: checked by hash, shown as they go, kept whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from innerloop.tasks._cache import cache_folder

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


def download(url: str, sha256: str) -> Path:
    """The cached copy of a file on the web, downloaded first if it is not there or does not match its hash.

    A bar on standard error shows the progress where that is a terminal.

    Raises:
        ConnectionError: the file could not be fetched whole.
        ValueError: what was fetched has another hash; it is deleted.
        OSError: the cache folder cannot be written.
    """
    import pooch
    import requests

    cure = "try again, or fetch it another way and name it with data= (--data)"
    name = url.rsplit("/", 1)[-1]
    try:
        with _bar(name) as bar:
            downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16)
            return Path(pooch.retrieve(url, f"sha256:{sha256}", name, cache_folder() / "downloads", None, downloader))
    except requests.RequestException as error:
        raise ConnectionError(f"could not download {url} ({_one_line(error)}); {cure}") from error
    except ValueError as error:
        raise ValueError(f"what {url} sent is not the file that is expected ({_one_line(error)}); {cure}") from error
    except OSError as error:
        raise OSError(
            f"could not keep {url} ({_one_line(error)}); set INNERLOOP_CACHE to a folder that can be written"
        ) from error


@contextmanager
def _bar(name: str) -> Iterator[_Bar]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Bar(progress, progress.add_task(name, total=None))


class _Bar:
    """The part of tqdm's interface that pooch calls, drawn by rich."""

    total = 0

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def update(self, amount: int) -> None:
        self._progress.update(self._task, total=self.total or None, advance=amount)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.refresh()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
