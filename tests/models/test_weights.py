"""Known nets are found in whatever mapping and behind whatever prefix they were saved."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torchvision
from oracle import randomise_
from torch import Tensor, nn

from prune_dn.errors import ConversionError
from prune_dn.models import densenet, light_cnn_9, light_cnn_29
from prune_dn.models.state_dicts import from_state_dict
from prune_dn.models.weights import find_weights

State = dict[str, Any]


def theirs(seed: int = 0) -> nn.Module:
    net = torchvision.models.DenseNet(4, (2, 1), 6, bn_size=2, num_classes=5)
    return randomise_(net, seed).eval()


def state(seed: int = 0) -> State:
    return dict(theirs(seed).state_dict())


def behind(prefix: str, tensors: Mapping[str, Any]) -> State:
    return {f"{prefix}{key}": value for key, value in tensors.items()}


def is_net(found: nn.Module, seed: int = 0) -> None:
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.eval()(x), theirs(seed)(x))


class Other:
    """As an `argparse.Namespace` or a number of numpy is read: an object that is no tensor."""


@pytest.mark.parametrize(
    "disguise",
    [
        *(lambda s, k=k: {k: s, "epoch": 3, "optimizer": {"state": {0: {"step": torch.ones(1)}}}}
          for k in ("net", "model_state_dict", "weights", "ema_state_dict", "params", "my own key")),
        *(lambda s, p=p: behind(p, s)
          for p in ("model.", "net.", "backbone.", "densenet121.", "module.densenet121.", "a.b.c.")),
        lambda s: {"state_dict": behind("model.", s), "hyper_parameters": {"lr": 0.1}, "epoch": 1},
        lambda s: {"checkpoint": {"net": {"weights": behind("module.backbone.", s)}}},
        lambda s: {"model": s, "args": Other(), "best": Other(), "optimizer": {"param_groups": [{}]}},
        lambda s: {**s, "epoch": 3, "args": Other(), "best_acc": None},
        lambda s: {"n_averaged": torch.tensor(7), **behind("module.", s)},
        lambda s: behind("_orig_mod.module.", s),
        lambda s: {k.replace("features.", "features.module."): v for k, v in s.items()},
        lambda s: {k.replace(".conv1.", "._checkpoint_wrapped_module.conv1."): v for k, v in s.items()},
        lambda s: OrderedDict(net=OrderedDict(s)),
        lambda s: {"model": s, "state_dict": s},  # one mapping, under two names
        lambda s: {"model": s, "model_ema": behind("module.", {k: v + 1 for k, v in s.items()})},
        lambda s: {"state_dict": s, "state_dict_ema": {k: v + 1 for k, v in s.items()}},
        lambda s: {**behind("model.", s), **behind("ema_model.", {k: v + 1 for k, v in s.items()})},
    ],
)  # fmt: skip
def test_plain_weights_are_found(disguise: Callable[[State], State]) -> None:
    is_net(from_state_dict(disguise(state())))


@pytest.mark.parametrize("name", ["ema", "model_ema", "state_dict_ema", "ema_state_dict", "EMA.net", "swa_model"])  # fmt: skip
def test_averaged_weights_are_taken_when_they_are_asked_for(name: str) -> None:
    for both in (
        {"model": state(), name: state(1)},
        {name: state(1), "model": state()},
        {"state_dict": {**behind("model.", state()), **behind(f"{name}.", state(1))}},
    ):
        is_net(from_state_dict(both))
        is_net(from_state_dict(both, ema=True), 1)
        taken, others = find_weights(both, ema=True)
        assert name in str(taken) and len(others) == 1 and name not in str(others[0])
    is_net(from_state_dict({name: state(1)}), 1)  # there are no others
    with pytest.raises(
        ConversionError, match=r"no averaged .EMA. weights; there are the keys at the"
    ):
        from_state_dict(state(), ema=True)


def test_words_that_only_look_like_averages() -> None:
    for name in ("schema", "avgpool_net", "demarcation"):
        is_net(from_state_dict({name: state()}))
        with pytest.raises(ConversionError, match="no averaged"):
            from_state_dict({name: state()}, ema=True)


def test_several_nets_are_not_guessed_at() -> None:
    with pytest.raises(
        ConversionError,
        match="several nets: the mapping 'student', the mapping 'teacher'; save those that you mean",
    ):
        from_state_dict({"student": state(), "teacher": state(1)})
    with pytest.raises(ConversionError, match=r"several nets: the keys in 'a.', the keys in 'b.'"):
        from_state_dict({**behind("a.", state()), **behind("b.", state(1))})
    with pytest.raises(ConversionError, match="several nets"):
        from_state_dict({"ema": state(), "swa": state(1), "model": state()}, ema=True)


def test_what_lies_beside_the_net_is_named() -> None:
    mixed = {
        **behind("model.", state()),
        "criterion.weight": torch.ones(5),
        "head.bias": torch.ones(2),
    }
    with pytest.raises(
        ConversionError,
        match=r"beside the net's keys in 'model.' there are criterion.weight, head.bias: another head or",
    ):
        from_state_dict({"state_dict": mixed})
    with pytest.raises(ConversionError, match="op_threshs is unexpected"):
        from_state_dict({**state(), "op_threshs": torch.ones(18)})
    with pytest.raises(ConversionError, match=r"two keys of the state dict mean 'classifier.bias'"):
        from_state_dict({**behind("net.", state()), "module.net.classifier.bias": torch.ones(5)})


def head(*layers: nn.Module) -> nn.Module:
    net = theirs()
    net.classifier = nn.Sequential(*layers)
    return net


@pytest.mark.parametrize(
    ("net", "text"),
    [
        (
            head(nn.Linear(11, 14), nn.Sigmoid()),
            r"another head than one linear layer .*: it has classifier.0.weight, classifier.0.bias. If "
            r"classifier.0 is all of it \(but dropout, or a sigmoid on its answers\), rename",
        ),
        (head(nn.Dropout(), nn.Linear(11, 2)), "rename classifier.1.weight and classifier.1.bias to cl"),
        (head(nn.Linear(11, 4), nn.ReLU(), nn.Linear(4, 2)), "classifier.2.bias. Pass the module itself"),
        (head(nn.Identity()), "it has none. Pass the module itself to prune_dn.prune"),
    ],
)  # fmt: skip
def test_other_heads_are_called_so(net: nn.Module, text: str) -> None:
    for disguise in (lambda s: s, lambda s: {"state_dict": behind("module.densenet121.", s)}):
        with pytest.raises(ConversionError, match=text):
            from_state_dict(disguise(dict(net.state_dict())))


def test_the_remedy_for_another_head_works() -> None:
    net = head(nn.Linear(11, 14), nn.Sigmoid()).eval()
    renamed = {k.replace("classifier.0", "classifier"): v for k, v in net.state_dict().items()}
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(from_state_dict(renamed).eval()(x).sigmoid(), net(x))


@pytest.mark.parametrize(
    "net", [light_cnn_9(5, image_size=32), light_cnn_29(5, image_size=32, widths=(4, 6, 6, 6, 6))]
)
def test_light_cnns_are_found_too(net: nn.Module) -> None:
    """Inner layers of a Light CNN end in the names of its first."""
    for disguise in (lambda s: {"net": behind("backbone.", s)}, lambda s: behind("module.a.", s)):
        again = from_state_dict(disguise(dict(net.state_dict())))
        assert again.config == net.config
        for key, value in net.state_dict().items():
            assert torch.equal(again.state_dict()[key], value)


def test_counters_that_were_halved_with_the_weights() -> None:
    halves = {key: value.half() for key, value in state().items()}
    net = from_state_dict(halves)
    counters = [v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked")]
    assert counters and {c.dtype for c in counters} == {torch.int64}
    assert {p.dtype for p in net.parameters()} == {torch.float16}


def test_large_and_deep_mappings_are_searched_in_no_time() -> None:
    """A container that is there many times is looked at once; nothing is followed without end."""
    bomb: dict[str, Any] = {}
    for _ in range(200):
        bomb = {"a": bomb, "b": bomb, "c": bomb}
    is_net(from_state_dict({"x": bomb, "net": state()}))
    own: dict[str, Any] = {"net": state()}
    own["self"] = own
    is_net(from_state_dict(own))


def test_long_names_are_cut_in_messages() -> None:
    strange: dict[str, Tensor] = {f"{i}" * 100_000: torch.ones(1) for i in range(10)}
    for mapping in (
        strange,
        {**behind("net.", state()), **strange},
        {"k" * 100_000: state(), "l": state(1)},
    ):
        with pytest.raises(ConversionError) as error:
            from_state_dict(copy.copy(mapping))
        assert len(str(error.value)) < 3_000


def test_names_without_end() -> None:
    strange = state()
    key = next(k for k in strange if "denselayer2.conv1" in k)
    for name in (
        key.replace("denseblock1", f"denseblock{'9' * 5000}"),
        key.replace("denselayer2", f"denselayer{'9' * 5000}"),
        key.replace("denseblock1", "denseblock999999999"),
        f"features.transition{'9' * 5000}.conv.weight",
        "features.transition999999999.conv.weight",
    ):
        with pytest.raises(ConversionError):
            from_state_dict({**strange, name: strange[key]})
    many = {key.replace("denselayer2", f"denselayer{i}"): strange[key] for i in range(3, 3000)}
    with pytest.raises(ConversionError, match="there are more than 1,000 layers and blocks"):
        from_state_dict({**strange, **many})
    wide = densenet([1], 4, stem="cifar", num_classes=2).to("meta").state_dict()
    tensors = {k: torch.zeros(v.shape) for k, v in wide.items()}
    tensors["classifier.weight"] = torch.zeros(1_000_001, tensors["classifier.weight"].shape[1])
    with pytest.raises(
        ConversionError, match=r"do not fit a DenseNet: .*\n.*nets have at most 1,000,0"
    ):
        from_state_dict(tensors)
