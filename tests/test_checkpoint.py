"""Round trips in a fresh process, and every kind of damaged file."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import HealthCheck, given, settings
from light_cnn_oracle import light_cnn_configs, slow
from oracle import randomise_
from safetensors import safe_open
from safetensors.torch import save_file
from strategies import pruned_configs
from torch import nn

from prune_dn.checkpoint import load, read_info, save, save_state_dict
from prune_dn.errors import CheckpointError
from prune_dn.models import (
    DenseNet,
    DenseNetConfig,
    LayerConfig,
    LightCNN,
    LightCNNConfig,
    TransitionConfig,
    densenet,
    light_cnn_29,
)
from prune_dn.pruning import prune

UNEVEN = DenseNetConfig(
    num_init_features=4,
    blocks=(
        (LayerConfig("denselayer2", 4, 6, (0, 3), "3/2"), LayerConfig("denselayer3", 3)),
        (
            LayerConfig("denselayer1", 2, mfm="2/1"),
            LayerConfig("denselayer2", 3, 4, (0, 1, 3), "2/1", (4, 1, 3), (1,)),
        ),
    ),
    transitions=(TransitionConfig(3, (1, 4, 8), "2/1", (2, 4, 10), (0, 2)),),
    num_classes=5,
    stem="cifar",
    classifier_indices=(0, 2, 4),
    classifier_rivals=(7, 2, 6),
    norm_eps=1e-3,
)


def uneven(dtype: torch.dtype = torch.float32) -> DenseNet:
    return randomise_(DenseNet(UNEVEN), 0).to(dtype).eval()


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)).to(dtype)


def tensor_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


FRESH = """
import sys, torch, prune_dn.checkpoint
net = prune_dn.checkpoint.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(net(x).detach(), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_in_a_fresh_process(tmp_path: Path, dtype: torch.dtype) -> None:
    net = uneven(dtype)
    files = [str(tmp_path / name) for name in ("net.safetensors", "x.pt", "y.pt")]
    save(net, files[0])
    torch.save(images(dtype), files[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, env=environment)
    found = torch.load(files[2], weights_only=True)
    assert found.dtype == dtype
    assert torch.equal(found, net(images(dtype)).detach())  # bit by bit


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(pruned_configs())
def test_round_trip_of_any_config(tmp_path: Path, config: DenseNetConfig) -> None:
    net = randomise_(DenseNet(config), 1)
    save(net, tmp_path / "net")
    again = load(tmp_path / "net")
    assert again.config == config
    assert not any(module.training for module in again.modules())
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert all(p.requires_grad for p in again.parameters())


def test_save_changes_nothing_and_loading_owns_its_memory(tmp_path: Path) -> None:
    net = uneven().train()
    net.features.norm5.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    save(net, tmp_path / "net")
    assert net.training and not net.features.norm5.training
    again = load(tmp_path / "net")
    (tmp_path / "net").write_bytes(b"\0" * (tmp_path / "net").stat().st_size)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, before[name]), name
        assert tensor.is_contiguous()


def test_info(tmp_path: Path) -> None:
    info = {
        "data": {"name": "digits", "classes": ["0", "1"], "mean": [0.5]},
        "metrics": {"accuracy": np.float32(0.5), "n": np.int64(3), "loss": torch.tensor(1.5)},
        "note": "grüße",
    }
    save(uneven(), tmp_path / "net", info=info)
    found = read_info(tmp_path / "net")
    assert found["metrics"] == {"accuracy": 0.5, "n": 3, "loss": 1.5}
    assert found["data"] == info["data"] and found["note"] == "grüße"
    save(uneven(), tmp_path / "net")
    assert read_info(tmp_path / "net") == {}


def test_metadata_explains_the_file(tmp_path: Path) -> None:
    save(uneven(), tmp_path / "net")
    with safe_open(tmp_path / "net", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "prune_dn/1"
    assert DenseNetConfig.from_json(metadata["config"]) == UNEVEN
    assert metadata["torch_version"] == torch.__version__
    assert {"info", "prune_dn_version"} <= set(metadata)


def test_norm_momentum_is_kept(tmp_path: Path) -> None:
    net = uneven()
    net.features.norm5.momentum = None
    net.features.denseblock1.denselayer2.norm2.momentum = 0.01
    save(net, tmp_path / "net")
    again = load(tmp_path / "net")
    assert again.features.norm5.momentum is None
    assert again.features.denseblock1.denselayer2.norm2.momentum == 0.01
    assert again.features.denseblock1.denselayer2.norm1.momentum == 0.1


def test_size_is_the_tensors_only(tmp_path: Path) -> None:
    net = densenet([2], 4, stem="cifar", num_classes=3)
    big = torch.randn(1000, 1000)
    with torch.no_grad():  # a slice of a large storage, and not contiguous
        net.classifier.weight = nn.Parameter(big[: net.classifier.weight.shape[1], :3].t())
    expected = tensor_bytes(net)
    save(net, tmp_path / "net.safetensors")
    save_state_dict(net, tmp_path / "net.pt")
    assert (tmp_path / "net.safetensors").stat().st_size < expected + 6_000
    assert (tmp_path / "net.pt").stat().st_size < expected + 12_000
    for name in ("net.safetensors", "net.pt"):
        assert torch.equal(load(tmp_path / name).classifier.weight, net.classifier.weight)


def test_shared_storages_are_saved(tmp_path: Path) -> None:
    net = uneven()
    net.features.norm5.bias = net.features.norm5.weight
    save(net, tmp_path / "net")
    again = load(tmp_path / "net").features.norm5
    assert torch.equal(again.bias, again.weight)
    assert torch.equal(again.weight, net.features.norm5.weight)


def test_plain_state_dict(tmp_path: Path) -> None:
    net = densenet([1, 1], 4, stem="cifar", num_classes=3).eval()
    save_state_dict(net, tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt", weights_only=True)
    assert type(state) is dict and list(state) == list(net.state_dict())
    again = load(tmp_path / "net.pt")
    assert again.config == net.config and not again.training
    assert torch.equal(again(images()), net(images()))
    assert read_info(tmp_path / "net.pt") == {}
    first = (tmp_path / "net.pt").read_bytes()
    save_state_dict(net, tmp_path / "other.pt")
    assert (tmp_path / "other.pt").read_bytes() == first


def test_foreign_files(tmp_path: Path) -> None:
    theirs = torchvision.models.DenseNet(4, (2, 1), 6, num_classes=5).eval()
    save_file(theirs.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt"})
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "b.pth")
    torch.save(theirs.state_dict(), tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    x = torch.randn(2, 3, 64, 64)
    for name in ("a.safetensors", "b.pth", "c.pt"):
        with torch.no_grad():
            torch.testing.assert_close(load(tmp_path / name)(x), theirs(x))
    assert read_info(tmp_path / "a.safetensors") == {}


def test_any_header_length_is_read(tmp_path: Path) -> None:
    """A header of 0x..80 bytes begins like a pickle."""
    seen = set()
    for n in range(0, 256, 8):
        save(uneven(), tmp_path / "net", info={"pad": "x" * n})
        seen.add((tmp_path / "net").read_bytes()[:1])
        assert load(tmp_path / "net").config == UNEVEN
    assert b"\x80" in seen


# -- what cannot be saved ------------------------------------------------------------------------


def test_only_our_densenets_are_saved(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save a Linear: pass a prune_dn DenseNet"):
        save(nn.Linear(2, 2), tmp_path / "net")  # type: ignore[arg-type]
    with pytest.raises(
        CheckpointError, match=r"cannot save a DataParallel: .* \(model.module of a"
    ):
        save(nn.DataParallel(uneven()), tmp_path / "net")  # type: ignore[arg-type]
    net = uneven()
    net.classifier = nn.Linear(3, 7)
    with pytest.raises(
        CheckpointError, match=r"classifier.weight has shape 7x3 where 5x3 is needed"
    ):
        save(net, tmp_path / "net")
    with pytest.raises(CheckpointError, match="on the meta device: it has no weights yet"):
        save(uneven().to("meta"), tmp_path / "net")
    with pytest.raises(CheckpointError, match="info cannot be saved: a value of type object is no"):
        save(uneven(), tmp_path / "net", info={"a": object()})
    assert os.listdir(tmp_path) == []


# -- what cannot be loaded -----------------------------------------------------------------------


def rewritten(path: Path, edit: Callable[[dict], None]) -> None:
    """Change the header of a safetensors file."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def fails(path: Path, text: str) -> None:
    with pytest.raises(CheckpointError, match=text) as error:
        load(path)
    assert str(path) in str(error.value)


def test_missing_empty_and_other_files(tmp_path: Path) -> None:
    fails(tmp_path / "none.safetensors", "cannot read .*none.safetensors: No such file")
    fails(tmp_path, "is a folder; give the checkpoint file in it")
    (tmp_path / "empty").touch()
    fails(tmp_path / "empty", "is empty; it was not written to the end")
    (tmp_path / "text").write_text("model: densenet40\n")
    fails(tmp_path / "text", "is no checkpoint: neither a safetensors file nor a .pt state dict")
    (tmp_path / "json").write_bytes(struct.pack("<Q", 8) + b"{broken}")
    fails(tmp_path / "json", "is no safetensors file: its header is broken")
    with pytest.raises(CheckpointError, match="cannot read"):
        read_info(tmp_path / "none")


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    for name, write in (("a.safetensors", save), ("b.pt", save_state_dict)):
        write(uneven(), tmp_path / name)
        data = (tmp_path / name).read_bytes()
        for size in (1, 8, 9, 20, 500, len(data) // 2, len(data) - 1):
            (tmp_path / name).write_bytes(data[:size])
            fails(tmp_path / name, "truncated|is no checkpoint|damaged")
    save(uneven(), tmp_path / "a")
    data = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(data[:-4])
    fails(tmp_path / "a", f"is truncated: it has {len(data) - 4} bytes of {len(data)}; copy or")


def test_newer_formats_and_damaged_headers(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    def metadata(**values: str) -> Callable[[dict], None]:
        return lambda header: header["__metadata__"].update(values)

    def again(edit: Callable[[dict], None], text: str) -> None:
        save(uneven(), path)
        rewritten(path, edit)
        fails(path, text)

    again(
        metadata(format="prune_dn/2", prune_dn_version="9.1"),
        "has format prune_dn/2, made by prune_dn 9.1; .* reads prune_dn/1: upgrade prune_dn",
    )
    again(metadata(config="{}"), "is damaged: not a DenseNetConfig in JSON")
    again(metadata(norm_momentum='{"features.gone": 0.1}'), "is damaged: .*gone")
    again(
        lambda header: header.__setitem__("extra", header.pop("classifier.bias")),
        "is damaged: .* classifier.bias is missing, extra is unexpected",
    )
    again(
        lambda header: header["classifier.weight"].update(shape=[3, 5]),
        "is damaged: .* classifier.weight has shape 3x5 where 5x3 is needed",
    )
    save(uneven(), path)
    rewritten(path, metadata(info="[1]"))
    with pytest.raises(CheckpointError, match="is damaged: its info is no JSON object"):
        read_info(path)


def test_pickles_that_need_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"state_dict": uneven().state_dict(), "best": np.float64(0.9)}, path)
    fails(
        path, r"holds more than tensors, .* run code \(it needs numpy.*scalar\). Where it was made"
    )
    torch.save(uneven(), path)
    fails(path, r"it needs prune_dn.models.dense_net.DenseNet\). .* torch.save\(model.state_dict")
    torch.save([1], path)
    fails(path, "a state dict is a mapping of names to tensors, not a value of type list")


def test_plain_state_dicts_that_shapes_do_not_explain(tmp_path: Path) -> None:
    save_state_dict(uneven(), tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "a plain state dict does not say which: load the .safetensors file")
    torch.save(torchvision.models.squeezenet1_0().state_dict(), tmp_path / "net.pt")
    fails(tmp_path / "net.pt", "this is no DenseNet: features.conv0.weight is missing")


def test_a_pruned_light_cnn_in_a_fresh_process(tmp_path: Path) -> None:
    net = randomise_(light_cnn_29(5, image_size=32, widths=(4, 6, 6, 6, 6), embedding=8), 0)
    small = prune(net, 0.5).double().eval()
    files = [str(tmp_path / name) for name in ("net.safetensors", "x.pt", "y.pt")]
    save(small, files[0], info={"note": "half"})
    x = torch.randn(2, 1, 32, 32).double()
    torch.save(x, files[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", FRESH, *files], check=True, env=environment)
    found = torch.load(files[2], weights_only=True)
    assert torch.equal(found, small(x).detach())
    assert read_info(files[0]) == {"note": "half"}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(light_cnn_configs())
def test_round_trip_of_any_light_cnn(tmp_path: Path, config: LightCNNConfig) -> None:
    net = randomise_(LightCNN(config), 1).double()
    save(net, tmp_path / "net")
    again = load(tmp_path / "net")
    assert again.config == config and not again.training
    x = torch.randn(1, config.in_channels, config.image_size, config.image_size).double()
    torch.testing.assert_close(again(x), slow(net, x), rtol=0, atol=1e-9)


def test_files_say_what_net_they_hold(tmp_path: Path) -> None:
    """A file from before there were Light CNNs is a DenseNet's."""
    save(uneven(), tmp_path / "net")
    rewritten(tmp_path / "net", lambda header: header["__metadata__"].pop("architecture"))
    assert load(tmp_path / "net").config == UNEVEN
    rewritten(tmp_path / "net", lambda h: h["__metadata__"].update(architecture="LightCNN"))
    with pytest.raises(CheckpointError, match="is damaged: not a LightCNNConfig in JSON"):
        load(tmp_path / "net")
    rewritten(tmp_path / "net", lambda h: h["__metadata__"].update(architecture="Other"))
    with pytest.raises(CheckpointError, match="is damaged: 'Other'"):
        load(tmp_path / "net")


def test_a_published_light_cnn_checkpoint(tmp_path: Path) -> None:
    """As the published training code writes it: wrapped, with other values beside the weights."""
    net = light_cnn_29(5, image_size=32, widths=(4, 6, 6, 6, 6), embedding=8).eval()
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 3, "arch": "LightCNN", "state_dict": state, "prec1": 0.5}, tmp_path / "a")
    again = load(tmp_path / "a")
    x = torch.randn(2, 1, 32, 32)
    assert again.config == net.config and torch.equal(again(x), net(x))
