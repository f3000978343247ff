"""Weights and training state as safetensors with JSON inside: nothing is ever pickled or unpickled.

Each file holds the SHA-256 of all its bytes, header and tensors, so that a damaged one is never taken for whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from innerloop.files import write

Json = Any
CHECKSUM = b'"sha256":"%s"'  # in the header; with zeros in its place while it is computed
ZEROS = b"0" * 64


def save_weights(path: Path, weights: Mapping[str, Tensor], notes: Json = None) -> None:
    """Write a ``state_dict``, and notes about it as JSON, to one safetensors file, whole or not at all."""
    write(path, _whole(weights, {"notes": json.dumps(notes)}))


def load_weights(path: Path) -> tuple[dict[str, Tensor], Json]:
    """The tensors that `save_weights` wrote, by name and on the CPU, and the notes.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged.
    """
    tensors, metadata = _read(path)
    return tensors, json.loads(metadata.get("notes", "null"))


def take_weights(learner: nn.Module, path: Path) -> str:
    """Give a learner the weights of another that fit by name and shape, learned rates aside, in place.

    Args:
        learner: what shall begin there.
        path: a file that `save_weights` has written, of another learner.

    Returns:
        What was left as it is, in words, such as a head of another width; empty if nothing was.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no weight matrix fits, that of the head aside; or the file is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: start from a folder that innerloop train or il.fit has filled")
    given, _ = load_weights(path)
    own = {name: tensor for name, tensor in learner.state_dict().items() if not name.startswith("rates.")}
    fits = {name: given[name] for name, tensor in own.items() if name in given and given[name].shape == tensor.shape}
    matrices = [name for name, tensor in own.items() if tensor.ndim > 1] or list(own)
    if not fits.keys() & set(matrices[:-1] or matrices):
        raise ValueError(f"no weights of {path} fit {_shape(own, matrices[0])}: start from a run of the same model")
    learner.load_state_dict(fits, strict=False)
    return ", ".join(_shape(own, name) for name, _ in learner.named_parameters() if name in own.keys() - fits.keys())


def _shape(tensors: Mapping[str, Tensor], name: str) -> str:
    return f"{name} ({' x '.join(map(str, tensors[name].shape)) or '1'})"


def save_checkpoint(
    path: Path, states: Mapping[str, Mapping[Any, Any]], ready: Callable[[], object] | None = None
) -> None:
    """Write named states (of a learner, an optimiser, a schedule, the loop itself) to one file.

    A state is a tree of dicts, lists and tuples over tensors, numbers, strings, booleans and None. Its tensors are
    stored under their place in the tree, such as ``learner/model.head.weight``; the rest is the JSON of the file's
    metadata. ``ready`` is called once the new file is on the disk, before it takes the place of the old one.

    Raises:
        TypeError: a state holds something else.
        OSError: the file cannot be written; what it held before is still there.
    """
    tensors: dict[str, Tensor] = {}
    tree = {name: _pack(dict(state), name, tensors) for name, state in states.items()}
    write(path, _whole(tensors, {"state": json.dumps(tree)}), ready)


def load_checkpoint(path: Path) -> dict[str, dict[Any, Any]]:
    """The states that `save_checkpoint` wrote, bit for bit, tensors on the CPU.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or no checkpoint.
    """
    tensors, metadata = _read(path)
    if "state" not in metadata:
        raise ValueError(f"{path} holds weights and no training state; resume from a last.safetensors")
    return {name: _unpack(tree, tensors) for name, tree in json.loads(metadata["state"]).items()}


def _pack(tree: Any, place: str, tensors: dict[str, Tensor]) -> Json:
    """JSON for a tree whose tensors go to ``tensors``. Containers are tagged: JSON has no tuples, no integer keys."""
    match tree:
        case Tensor():
            while place in tensors:  # keys 1 and "1", or one that holds a slash
                place += "'"
            tensors[place] = tree
            return {"tensor": place}
        case dict():
            return {"dict": [[key, _pack(value, f"{place}/{key}", tensors)] for key, value in tree.items()]}
        case list() | tuple():
            kind = "list" if isinstance(tree, list) else "tuple"
            return {kind: [_pack(value, f"{place}/{index}", tensors) for index, value in enumerate(tree)]}
        case None | bool() | int() | float() | str():
            return tree
    raise TypeError(f"cannot store {place}, a {type(tree).__name__}: only tensors, numbers, text and containers")


def _unpack(tree: Json, tensors: Mapping[str, Tensor]) -> Any:
    match tree:
        case {"tensor": place}:
            return tensors[place]
        case {"dict": items}:
            return {key: _unpack(value, tensors) for key, value in items}
        case {"list": items}:
            return [_unpack(value, tensors) for value in items]
        case {"tuple": items}:
            return tuple(_unpack(value, tensors) for value in items)
    return tree


def _whole(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> bytes:
    # Copies, because safetensors refuses tensors that share memory, as tied weights do.
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    content = save(copies, metadata | {"sha256": ZEROS.decode()})
    return content.replace(CHECKSUM % ZEROS, CHECKSUM % hashlib.sha256(content).hexdigest().encode(), 1)


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    content = path.read_bytes()
    try:
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        metadata: dict[str, str] = header["__metadata__"]
        given = CHECKSUM % metadata["sha256"].encode()
        blank = content.replace(given, CHECKSUM % ZEROS, 1)
        if given not in content or hashlib.sha256(blank).hexdigest() != metadata["sha256"]:
            raise ValueError("its checksum does not fit")
        return load(content), metadata
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        why = "it has no checksum" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged ({why}); restore it or train again") from error
