"""A probe of a net: an example of its inputs and some of its answers, as data that a file can hold.

The inputs are made of a formula, so that every machine and every version of PyTorch has the same; the
answers are of eval mode, in float64 on the CPU where the net runs so.
"""

from __future__ import annotations

import copy
import json
import math
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map

from prune_dn.base import limits
from prune_dn.base.files import parse_json
from prune_dn.errors import CheckpointError
from prune_dn.graph import call, tensors, to_inference_

_KEPT = 16  # numbers of each answer
_USUAL = {1: (256, 4096), 2: (64, 224), 3: (32, 64)}  # pixels a side, by the number of sides
_DEEPEST = 8  # containers in containers
_DTYPES = {str(getattr(torch, name)).removeprefix("torch."): getattr(torch, name) for name in (
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool"
)}  # fmt: skip


@dataclass(frozen=True)
class Probe:
    """`inputs` describes an example (see `describe`); `answers` are (shape, largest, numbers) of each.

    `given` is whether the example was, else it is an image of a usual size.
    """

    inputs: Any
    given: bool
    dtype: str
    answers: list[tuple[list[int], float, list[float]]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Probe:
        """Raises ValueError for what is no probe."""
        told = parse_json(text)
        if not isinstance(told, dict) or told.keys() != {"inputs", "given", "dtype", "answers"}:
            raise ValueError("its probe is none")
        if told["dtype"] not in ("float64", "float32"):
            raise ValueError(f"its probe has dtype {told['dtype']!r:.100}")
        answers = told["answers"]
        if not isinstance(answers, list) or not all(map(_is_answer, answers)):
            raise ValueError("its probe holds answers that are none")
        make(told["inputs"])
        answers = [tuple(a) for a in answers]
        return Probe(told["inputs"], told["given"] is True, told["dtype"], answers)


def probe(model: nn.Module, example_inputs: Any = None) -> Probe | None:
    """The probe of a net on inputs like `example_inputs`, or where there are none on an image.

    None where no example is given and the net runs on no image of a usual size, and where its answers
    are not the same a second time or not finite.

    Raises CheckpointError for an example on which the net does not run, or that no file can hold.
    """
    given = [] if example_inputs is None else [describe(example_inputs)]
    reasons = []
    for inputs in given or map(describe, _usual_images(model)):
        for dtype in ("float64", "float32"):
            try:
                first, second = (_answers(model, inputs, dtype, seed) for seed in (0, 1))
            except Exception as error:  # whatever a foreign forward raises
                reasons.append(f"{type(error).__name__}: {error}".splitlines()[0])
                continue
            numbers = [x for _, largest, found in first for x in (largest, *found)]
            if first != second or not first or not all(map(math.isfinite, numbers)):
                return None
            return Probe(inputs, bool(given), dtype, first)
    if given:
        raise CheckpointError(
            f"this {type(model).__name__} does not run on its example_inputs, made float and on the CPU "
            f"({reasons[0]}); give what it takes: a tensor, a tuple of its arguments, or a dict of them by name"
        )
    return None


def differs(model: nn.Module, known: Probe) -> str | None:
    """The way in which the answers of `model` are others than those of the probe beyond rounding; None = they are not."""
    try:
        found = _answers(model, known.inputs, known.dtype, 0)
    except Exception as error:  # whatever a foreign forward raises
        return f"it does not run ({type(error).__name__}: {str(error)[:500]})"
    shapes, wanted = ([shape for shape, _, _ in x] for x in (found, known.answers))
    if shapes != wanted:
        return f"its answers have the shapes {shapes}, not {wanted}"
    allowed = torch.finfo(_DTYPES[known.dtype]).eps ** 0.5  # half of the digits
    for (_, mine, ours), (_, largest, theirs) in zip(found, known.answers, strict=True):
        pairs = zip((mine, *ours), (largest, *theirs), strict=True)
        off = max(abs(a - b) for a, b in pairs)
        if not off <= allowed * largest:
            return f"its answers are others (by {off:.2g}, with answers up to {largest:.2g})"
    return None


def describe(inputs: Any, depth: int = 0) -> Any:
    """The shapes and dtypes of inputs as JSON. Raises CheckpointError for what `make` cannot make again."""
    if isinstance(inputs, Tensor):
        dtype = str(inputs.dtype).removeprefix("torch.")
        if dtype in _DTYPES:
            return {"tensor": list(inputs.shape), "dtype": dtype}
    elif isinstance(inputs, list | tuple) and depth < _DEEPEST:
        kind = "tuple" if isinstance(inputs, tuple) else "list"
        return {kind: [describe(x, depth + 1) for x in inputs]}
    elif isinstance(inputs, dict) and depth < _DEEPEST and all(isinstance(k, str) for k in inputs):
        return {"dict": {key: describe(x, depth + 1) for key, x in inputs.items()}}
    elif inputs is None or isinstance(inputs, bool | int | float | str):
        return {"value": inputs}
    raise CheckpointError(
        f"example_inputs hold a {type(inputs).__name__}; give tensors, numbers and strings, in tuples, "
        "lists and dicts"
    )


def make(description: Any, depth: int = 0) -> Any:
    """Inputs as described: floating-point ones of a wave, whole numbers 0. Raises ValueError for what is none."""
    if isinstance(description, dict) and depth <= _DEEPEST:
        if description.keys() == {"tensor", "dtype"}:
            return _tensor(description["tensor"], description["dtype"])
        kind, value = next(iter(description.items()), (None, None))
        if len(description) == 1 and kind in ("list", "tuple") and isinstance(value, list):
            found = [make(x, depth + 1) for x in value]
            return tuple(found) if kind == "tuple" else found
        if len(description) == 1 and kind == "dict" and isinstance(value, dict):
            return {key: make(x, depth + 1) for key, x in value.items()}
        plain = value is None or isinstance(value, bool | int | float | str)
        if len(description) == 1 and kind == "value" and plain:
            return value
    raise ValueError(f"it describes an input as {description!r:.100}")


def _tensor(shape: Any, dtype: Any) -> Tensor:
    right = isinstance(shape, list) and len(shape) < 16 and isinstance(dtype, str)
    right = right and dtype in _DTYPES and all(type(s) is int and s >= 0 for s in shape)
    if not right or math.prod(shape) > limits.EXAMPLE:
        raise ValueError(f"it describes an input of shape {shape!r:.100} and dtype {dtype!r:.100}")
    if not _DTYPES[dtype].is_floating_point:
        return torch.zeros(shape, dtype=_DTYPES[dtype])
    wave = torch.arange(math.prod(shape), dtype=torch.float64).sin()
    return wave.reshape(shape).to(_DTYPES[dtype])


def _usual_images(model: nn.Module) -> Iterator[Tensor]:
    """Images of usual sizes with the channels of the first convolution."""
    first = next((m for m in model.modules() if isinstance(m, _ConvNd)), None)
    if first is not None:
        sides = len(first.kernel_size)
        for size in _USUAL[sides]:
            yield torch.empty(1, first.in_channels, *[size] * sides)


def _answers(
    model: nn.Module, inputs: Any, dtype: str, seed: int
) -> list[tuple[list[int], float, list[float]]]:
    """Shape, largest absolute value and some values of each answer."""
    net = to_inference_(copy.deepcopy(model).cpu().to(_DTYPES[dtype]), branches=False)
    example = _in_dtype(make(inputs), _DTYPES[dtype])
    with torch.no_grad(), torch.random.fork_rng([]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        found = tensors(call(net, example))
    answers = []
    for answer in found:
        flat = answer.flatten().double()
        step = max(1, flat.numel() // _KEPT)
        largest = flat.abs().max().item() if flat.numel() else 0.0
        answers.append((list(answer.shape), largest, flat[::step][:_KEPT].tolist()))
    return answers


def _in_dtype(inputs: Any, dtype: torch.dtype) -> Any:
    return tree_map(
        lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, inputs
    )


def _is_answer(told: Any) -> bool:
    if not isinstance(told, list) or len(told) != 3:
        return False
    shape, largest, numbers = told
    return (
        isinstance(shape, list)
        and isinstance(numbers, list)
        and all(type(s) is int for s in shape)
        and all(type(x) is float for x in (largest, *numbers))
    )
