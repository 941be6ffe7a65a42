"""Find the weights of a net in what a checkpoint holds, whatever they are called there."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from prune_dn.base.sound import find_unsound
from prune_dn.errors import ConversionError
from prune_dn.models.families import first_weights

EXPECTED = (
    "torchvision's DenseNet keys such as features.conv0.weight, "
    "features.denseblock1.denselayer1.norm1.weight, features.norm5.weight, classifier.weight"
)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_COUNTERS = ("total_ops", "total_params", "n_averaged")  # left behind by thop and AveragedModel
_WRAPPERS = re.compile(
    r"(?<![^.])(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_OLD_KEY = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.(?=[12]\.)")
_AVERAGED = re.compile(r"(?<![a-z])(?:ema|swa|avg|averaged?|shadow)(?![a-z])", re.IGNORECASE)
COUNTER = "num_batches_tracked"
_MOST_SHARED = 4  # times the data that there is
_DEEPEST = 5  # mappings in mappings
_MOST_VALUES = 100_000


@dataclass(frozen=True)
class Weights:
    """One net in a checkpoint: the mapping that holds it, how one gets there, the prefix of its keys.

    `firsts` are the names by which it was found; None: those of our nets.
    """

    mapping: Mapping[Any, Any]
    where: str = ""
    prefix: str = ""
    firsts: tuple[str, ...] | None = None

    @property
    def averaged(self) -> bool:
        """Whether these are averages over training steps, by their name."""
        return _AVERAGED.search(f"{self.where}.{self.prefix}") is not None

    def tensors(self) -> dict[str, Tensor]:
        """Under the net's own keys. Nothing is copied."""
        return clean_state_dict(self.mapping, self.prefix, self.firsts)

    def __str__(self) -> str:
        prefix = f"the keys in {cut(self.prefix)!r}" if self.prefix else ""
        inside = f"the mapping {cut(self.where)!r}" if self.where else ""
        return " of ".join(filter(None, (prefix, inside))) or "the keys at the top"


def find_weights(
    state: Any, *, ema: bool = False, firsts: tuple[str, ...] | None = None
) -> tuple[Weights, list[Weights]]:
    """The weights of the one net in `state`, and the others that it also holds.

    `firsts` are names by one of which a net's keys are known, by default those of our nets. They may lie in
    any mapping and behind any prefix. Of plain and averaged ones (`ema`, by their name) the plain are
    meant unless `ema`. Raises ConversionError where there are none or several such, and
    where there is more in the mapping than the net, which might change its answers.
    """
    if not isinstance(state, Mapping):
        raise ConversionError(
            f"a state dict is a mapping of names to tensors, not {_kind(state)}; "
            "pass model.state_dict()"
        )
    mappings = list(_mappings(state))
    known = first_weights() if firsts is None else firsts
    found = [weights for where, mapping in mappings for weights in _nets(where, mapping, known)]
    if not found:
        seen = max((_tensor_names(mapping) for _, mapping in mappings), key=len)
        what = f"{known[0]} is missing"
        there = f"found {shorten(seen) or ('no tensors' if state else 'no keys')}"
        if firsts is None:
            what = f"this is no DenseNet: {what}; expected {EXPECTED}"
            there += (
                "; of another net say which: load(path, model=...), or --model torchvision/NAME"
            )
        raise ConversionError(f"{what}; {there}")
    chosen = [weights for weights in found if weights.averaged == ema]
    if not chosen and not ema:
        chosen = found
    if len(chosen) != 1:
        listed = shorten([str(weights) for weights in found])
        if not chosen:
            raise ConversionError(f"it holds no averaged (EMA) weights; there are {listed}")
        raise ConversionError(
            f"it holds the weights of several nets: {listed}; save those that you mean in a file of "
            "their own"
        )
    return chosen[0], [weights for weights in found if weights is not chosen[0]]


def clean_state_dict(
    state_dict: Mapping[Any, Any], prefix: str = "", firsts: tuple[str, ...] | None = None
) -> dict[str, Tensor]:
    """The tensors behind `prefix`, under plain keys (see `plain_key`). Nothing is copied."""
    known, tensors = first_weights() if firsts is None else firsts, dict[str, Tensor]()
    for key, value in state_dict.items():
        name = plain_key(key)
        if not name.startswith(prefix) or is_counter(name):
            continue
        name = name.removeprefix(prefix)
        if not isinstance(value, Tensor):
            if "." not in name and not tensors.keys().isdisjoint(known):
                continue  # an epoch, the arguments of a script: no net has such a key
            raise ConversionError(
                f"the value of {key!r} is {_kind(value)}, not a tensor"
                + (f"; expected {EXPECTED}" if firsts is None else "")
            )
        if name in tensors:
            raise ConversionError(f"two keys of the state dict mean {name!r}; one is {key!r}")
        tensors[name] = value
    return tensors


def unusable(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that no net of ours can compute with: see `not_plain`; other dtypes, NaN, negative variances."""
    dtypes: dict[torch.dtype, str] = {}
    sound: list[tuple[str, Tensor]] = []
    odd = dict(_layouts(tensors))
    yield from not_plain(tensors)
    for name, tensor in sorted(tensors.items()):
        if name in odd or not tensor.is_floating_point():
            continue
        if tensor.dtype not in FLOATS:
            yield f"{name} has dtype {tensor.dtype}, in which nets do not run"
            continue
        if not name.endswith(COUNTER):
            dtypes.setdefault(tensor.dtype, name)
        sound.append((name, tensor))
    if problem := find_unsound(sound):
        yield problem
    if len(dtypes) > 1:
        some = " and ".join(f"{dtype} ({name})" for dtype, name in list(dtypes.items())[:2])
        yield f"it mixes the dtypes {some}: make them one, as model.float() does"


def not_plain(tensors: Mapping[str, Tensor]) -> Iterator[str]:
    """Tensors that are none of their own: without data, of other layouts, many numbers of few bytes."""
    odd = dict(_layouts(tensors))
    yield from odd.values()
    own = {name: tensor for name, tensor in tensors.items() if name not in odd}
    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in own.values()}
    needed = sum(t.numel() * t.element_size() for t in own.values())
    if needed > _MOST_SHARED * max(sum(stored.values()), 1 << 20):
        yield f"its tensors share their data: {needed:,} bytes from {sum(stored.values()):,}"


def _layouts(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Each tensor without data, of another layout, or expanded, and what is wrong with it."""
    for name, tensor in sorted(tensors.items()):
        if tensor.is_meta or tensor.layout != torch.strided or tensor.is_quantized:
            kind = "meta" if tensor.is_meta else str(tensor.layout).removeprefix("torch.")
            yield name, f"{name} is a {kind} tensor, not a plain one with data"
            continue
        bytes_there = tensor.untyped_storage().nbytes()
        if bytes_there < tensor.numel() * tensor.element_size():
            yield (
                name,
                f"{name} is expanded: {tensor.numel():,} numbers from {bytes_there:,} bytes",
            )


def _mappings(state: Mapping[Any, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """`state` and all mappings in it, each once, with the keys that lead there."""
    waiting, seen, left = deque([("", state, 0)]), {id(state)}, _MOST_VALUES
    while waiting:
        where, mapping, depth = waiting.popleft()
        yield where, mapping
        left -= len(mapping)
        if depth == _DEEPEST or left < 0:
            continue
        for key, value in mapping.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append((f"{where}.{key}" if where else str(key), value, depth + 1))


def _nets(where: str, mapping: Mapping[Any, Any], firsts: tuple[str, ...]) -> Iterator[Weights]:
    """The nets in one mapping, by their prefixes."""
    names = {str(key): plain_key(key) for key in mapping}
    ends = {
        name.removesuffix(first)
        for name in names.values()
        for first in firsts
        if name == first or name.endswith(f".{first}")
    }
    # block1.0.conv1.filter is a layer of the Light CNN around it
    prefixes = [end for end in ends if not any(end != e and end.startswith(e) for e in ends)]
    extra = [
        name
        for name in _tensor_names(mapping)
        if not names[name].startswith(tuple(prefixes)) and not is_counter(names[name])
    ]
    if prefixes and extra:
        raise ConversionError(
            f"beside the net's keys in {' and '.join(map(repr, sorted(prefixes)))} there are "
            f"{shorten(extra)}: another head or a loss, which may change the answers. "
            "Pass the whole module to prune_dn.prune, or save the net's own state_dict()"
        )
    yield from (Weights(mapping, where, prefix, firsts) for prefix in sorted(prefixes))


def _tensor_names(mapping: Mapping[Any, Any]) -> list[str]:
    return [str(key) for key, value in mapping.items() if isinstance(value, Tensor)]


def is_counter(name: str) -> bool:
    return name.rpartition(".")[2] in _COUNTERS


def plain_key(key: Any) -> str:
    """A key without the names of wrappers, and torchvision's old `norm.1` as the present `norm1`."""
    return _OLD_KEY.sub(r"\1", _WRAPPERS.sub("", str(key)))


def shorten(items: list[str], most: int = 6) -> str:
    """The first items, and how many more there are."""
    more = f", and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(cut, items[:most])) + more


def cut(text: str, most: int = 200) -> str:
    """The beginning of a long text."""
    return text if len(text) <= most else f"{text[:most]}..."


def shape_of(tensor: Tensor) -> str:
    """The sizes of a tensor in words, such as 16x3x3x3."""
    return "x".join(map(str, tensor.shape)) or "scalar"


def _kind(value: Any) -> str:
    return f"a value of type {type(value).__name__}"
