"""Train the two small runs that come with the package, and put them into ``src/innerloop/weights``.

    python experiments/make_weights.py [--data FOLDER]

Some ten minutes each on one core. CIFAR-FS is downloaded unless ``--data`` names a copy. What is kept of a run: its
settings without the place of the data, its best weights, and its results.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from innerloop.reporting import write_json

WEIGHTS = Path(__file__).parents[1] / "src" / "innerloop" / "weights"
RECIPES = {
    "glyphs": "--shots 5 --start prototypes --inner sgd --inner-lr 0.1 --inner-steps 10 --steps 4000",
    "photos": "--dataset cifar_fs --shots 5 --queries 5 --method pretrained --outer-lr 3e-3 --steps 3200 "
    "--validate-every 400 --validation-tasks 100 --test-tasks 300",
}


def keep(run: Path, name: str) -> None:
    """Copy what is worth keeping of a run; nothing of it names this machine."""
    folder = WEIGHTS / name
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(run / "best.safetensors", folder / "best.safetensors")
    settings, results = (json.loads((run / file).read_text("utf-8")) for file in ("settings.json", "results.json"))
    results = {key: results[key] for key in ("training", "test", "time", "versions")}
    for file, content in (("settings.json", settings | {"data": None, "threads": None}), ("results.json", results)):
        write_json(folder / file, content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="a copy of CIFAR-FS, as innerloop train --dataset cifar_fs takes it")
    data = parser.parse_args().data
    with tempfile.TemporaryDirectory() as folder:
        for name, recipe in RECIPES.items():
            run = Path(folder, name)
            place = ["--data", data] if data and name == "photos" else []
            command = [sys.executable, "-m", "innerloop", "train", "--out", str(run), *recipe.split(), *place]
            subprocess.run([*command, "--device", "cpu", "--threads", "1"], check=True)
            keep(run, name)


if __name__ == "__main__":
    main()
