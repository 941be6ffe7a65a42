"""Round trips in a fresh process, and every kind of damaged file."""

from __future__ import annotations

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from damaged import fails, rewritten
from hypothesis import HealthCheck, given, settings
from light_cnn_oracle import light_cnn_configs, slow
from oracle import randomise_
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from strategies import pruned_configs
from torch import nn

from prune_dn.checkpoints.checkpoint import load, read_info, save, save_state_dict
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


def plain() -> DenseNet:
    """A net that a state dict tells whole."""
    return randomise_(densenet([2, 1], 4, stem="cifar", num_classes=3), 0).eval()


def images(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)).to(dtype)


def tensor_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


FRESH = """
import sys, torch, prune_dn.checkpoints.checkpoint
net = prune_dn.checkpoints.checkpoint.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
torch.save(net(x).detach(), sys.argv[3])
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_in_a_fresh_process(tmp_path: Path, dtype: torch.dtype) -> None:
    net = uneven(dtype)
    files = [str(tmp_path / name) for name in ("net.safetensors", "x.pt", "y.pt")]
    save(net, files[0])
    torch.save(images(dtype), files[1])
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
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


def test_the_same_net_gives_the_same_bytes_in_any_process(tmp_path: Path) -> None:
    """Rust's maps have another order in each process, and for each map."""
    net, info = uneven(), {"data": {"name": "größer"}, "note": 'a "quoted"\x1b\n line'}
    for i in range(3):
        save(net, tmp_path / f"{i}", info=info)
    first = (tmp_path / "0").read_bytes()
    assert [(tmp_path / f"{i}").read_bytes() == first for i in range(3)] == [True] * 3
    (length,) = struct.unpack("<Q", first[:8])
    metadata = json.loads(first[8 : 8 + length])["__metadata__"]
    assert list(metadata) == sorted(metadata)
    assert read_info(tmp_path / "0") == info


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    """Or it is one that says nothing, such as a space: then the net is equal."""
    net = plain()
    save(net, tmp_path / "net", info={"note": "x"})
    data = bytearray((tmp_path / "net").read_bytes())
    generator, refused = torch.Generator().manual_seed(0), 0
    places = torch.randint(len(data), (300,), generator=generator).tolist()
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << (place % 8)
        (tmp_path / "net").write_bytes(changed)
        try:
            again = load(tmp_path / "net")
        except CheckpointError:
            refused += 1
            continue
        assert again.config == net.config
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in net.state_dict().items())
    assert refused > 0.98 * len(places)


def test_the_digest_is_of_what_the_file_says_not_of_its_layout(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(uneven(), path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, metadata=metadata)  # another tool, which changed nothing
    assert load(path).config == UNEVEN
    save_file(tensors, path, metadata={**metadata, "config": metadata["config"].replace("3", "4")})
    fails(path, "is damaged: it was changed since it was saved; copy it again")
    tensors["classifier.bias"][0] += 1
    save_file(tensors, path, metadata=metadata)
    fails(path, "is damaged: it was changed since it was saved")
    save_file(tensors, path, metadata={**metadata, "format": "pt"})
    fails(path, "is damaged: it was changed since it was saved")


def test_files_of_before_there_were_digests_are_read(tmp_path: Path) -> None:
    save(uneven(), tmp_path / "net")
    rewritten(tmp_path / "net", lambda header: None)
    again = load(tmp_path / "net")
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in uneven().state_dict().items())


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


def test_what_training_scripts_leave(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Arguments and numbers of numpy lie beside the weights; which were taken is said."""
    theirs = torchvision.models.DenseNet(4, (2, 1), 6, num_classes=5).eval()
    averaged = {f"module.{k}": v * 1.01 for k, v in theirs.state_dict().items()}
    script = {
        "model": theirs.state_dict(),
        "model_ema": {**averaged, "n_averaged": torch.tensor(3)},
        "args": argparse.Namespace(lr=0.1),
        "best": np.float64(0.9),
        "optimizer": torch.optim.SGD(theirs.parameters(), 0.1, momentum=0.9).state_dict(),
    }
    path = tmp_path / "net.pth"
    torch.save(script, path)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(load(path)(x), theirs(x))
    assert re.fullmatch(
        r".*net.pth: took the mapping 'model', not the mapping 'model_ema' \(ema: the averaged ones\); "
        r"tensors do not tell, so this was assumed: eps 1e-05, no dropout, ReLU and the poolings of "
        r"torchvision; nor how pixels were normalised",
        caplog.messages[0],
    )
    found = load(path, ema=True)
    assert torch.equal(found.classifier.weight, averaged["module.classifier.weight"])
    assert "took the mapping 'model_ema', not the mapping 'model'" in caplog.messages[1]


def test_our_own_files_are_read_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(uneven(), tmp_path / "net")
    load(tmp_path / "net")
    assert caplog.messages == []
    with pytest.raises(CheckpointError, match="holds no averaged"):
        load(tmp_path / "net", ema=True)


def test_a_light_cnn_says_what_was_assumed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_state_dict(light_cnn_29(5, image_size=32, widths=(4, 6, 6, 6, 6)), tmp_path / "net.pt")
    load(tmp_path / "net.pt")
    assert "was assumed: a dropout of 0.5, images of 32 pixels; nor how pixels" in caplog.text


def test_any_header_length_is_read(tmp_path: Path) -> None:
    """A header of 0x..80 bytes begins like a pickle."""
    seen = set()
    for n in range(0, 256, 8):
        save(uneven(), tmp_path / "net", info={"pad": "x" * n})
        seen.add((tmp_path / "net").read_bytes()[:1])
        assert load(tmp_path / "net").config == UNEVEN
    assert b"\x80" in seen


# -- what cannot be saved ------------------------------------------------------------------------


def test_nets_that_are_not_saved(tmp_path: Path) -> None:
    net = uneven()
    net.classifier = nn.Linear(4, 7)
    with pytest.raises(
        CheckpointError, match=r"classifier.weight has shape 7x4 where 7x3 is needed"
    ):
        save(net, tmp_path / "net")
    with pytest.raises(CheckpointError, match="on the meta device: it has no weights yet"):
        save(uneven().to("meta"), tmp_path / "net")
    with pytest.raises(CheckpointError, match="info cannot be saved: a value of type object is no"):
        save(uneven(), tmp_path / "net", info={"a": object()})
    assert os.listdir(tmp_path) == []


# -- what cannot be loaded -----------------------------------------------------------------------


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
        metadata(format="prune_dn/3", prune_dn_version="9.1"),
        "has format prune_dn/3, made by .* 9.1; .* reads prune_dn/1 and prune_dn/2: upgrade prune_dn",
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


@pytest.mark.parametrize(
    ("metadata", "text"),
    [
        ({"norm_momentum": '{"features.norm5": "x"}'}, "norm_momentum of features.norm5 is 'x', not"),
        ({"norm_momentum": '{"features.norm5": NaN}'}, "norm_momentum of features.norm5 is nan, not"),
        ({"norm_momentum": '{"features.norm5": true}'}, "norm_momentum of .* is True, not in"),
        ({"norm_momentum": "[1]"}, "its norm_momentum is no JSON object"),
        ({"norm_momentum": '{"": 0.1}'}, "its norm_momentum names '', which is no norm"),
        ({"norm_momentum": '{"classifier": 0.1}'}, "names 'classifier', which is no norm"),
        ({"config": "[" * 100_000}, "its JSON is nested too deeply"),
        ({"norm_momentum": "[" * 100_000}, "its JSON is nested too deeply"),
        ({"config": "1" * 10_000}, "is damaged: not a DenseNetConfig in JSON"),
        ({"config": "null"}, "is damaged: not a DenseNetConfig in JSON"),
        ({"architecture": "ResNet"}, "its architecture is 'ResNet', not DenseNet or LightCNN"),
        ({"norm_momentum": ["x"]}, "its header is broken"),
        ({"format": 1}, "its header is broken"),
    ],
)  # fmt: skip
def test_damaged_metadata(tmp_path: Path, metadata: dict[str, Any], text: str) -> None:
    save(uneven(), tmp_path / "net")
    rewritten(tmp_path / "net", lambda header: header["__metadata__"].update(metadata))
    fails(tmp_path / "net", text)


@pytest.mark.parametrize("metadata", [[], ["a"], "text", 1, None])
def test_metadata_that_are_no_mapping(tmp_path: Path, metadata: Any) -> None:
    save(uneven(), tmp_path / "net")
    rewritten(tmp_path / "net", lambda header: header.update(__metadata__={}))
    rewritten(tmp_path / "net", lambda header: header["__metadata__"].update(a="b"))
    data = (tmp_path / "net").read_bytes().replace(b'{"a": "b"}', json.dumps(metadata).encode())
    (length,) = struct.unpack("<Q", data[:8])
    shorter = len(b'{"a": "b"}') - len(json.dumps(metadata))
    (tmp_path / "net").write_bytes(struct.pack("<Q", length - shorter) + data[8:])
    fails(tmp_path / "net", "its header is broken")
    with pytest.raises(CheckpointError, match="its header is broken"):
        read_info(tmp_path / "net")


@pytest.mark.parametrize("key", ["architecture", "format", "norm_momentum", "config"])
def test_messages_are_for_people(tmp_path: Path, key: str) -> None:
    for value in ("prune_dn/" + "9" * 50_000, json.dumps({"x" * 50_000: 1})):
        save(uneven(), tmp_path / "net")
        rewritten(tmp_path / "net", lambda header, v=value: header["__metadata__"].update({key: v}))
        with pytest.raises(CheckpointError) as error:
            load(tmp_path / "net")
        assert len(str(error.value)) < 3_000


def test_info_that_is_nested_too_deeply(tmp_path: Path) -> None:
    save(uneven(), tmp_path / "net")
    rewritten(tmp_path / "net", lambda h: h["__metadata__"].update(info="[" * 100_000))
    with pytest.raises(CheckpointError, match="its info cannot be read: its JSON is nested too"):
        read_info(tmp_path / "net")


def test_weights_that_no_net_can_run_with(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"

    def broken(name: str, change: Callable[[torch.Tensor], torch.Tensor], text: str) -> None:
        tensors = dict(plain().state_dict())
        tensors[name] = change(tensors[name].clone())
        torch.save(tensors, tmp_path / "net.pt")
        fails(tmp_path / "net.pt", f"no net can run with these weights: {text}")
        if tensors[name].layout == torch.strided and not tensors[name].is_meta:
            save(plain(), path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
            del metadata["digest"]
            save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata=metadata)
            fails(path, f"no net can run with these weights: {text}")

    def with_one(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda tensor: tensor.index_fill_(0, torch.tensor(1), value)

    broken("features.conv0.weight", with_one(float("nan")), "features.conv0.weight holds 27 NaN or")
    broken(
        "features.norm5.running_mean",
        with_one(float("inf")),
        "features.norm5.running_mean holds 1 NaN or",
    )
    broken(
        "features.norm5.running_var", with_one(-1e-9), "features.norm5.running_var holds 1 negative"
    )
    broken(
        "classifier.weight", torch.Tensor.half, "it mixes the dtypes torch.float32 .* and torch.f"
    )
    broken(
        "classifier.weight",
        lambda tensor: tensor.to(torch.float8_e4m3fn),
        "classifier.weight has dtype torch.float8_e4m3fn, in which nets do not run",
    )
    broken("classifier.weight", lambda t: t.to("meta"), "classifier.weight is a meta tensor")
    broken("classifier.weight", torch.Tensor.to_sparse, "classifier.weight is a sparse_coo tensor")


def test_small_files_that_ask_for_much_memory(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    tensors = dict(plain().state_dict())
    tensors["features.conv0.weight"] = torch.zeros(1).expand(1 << 33, 3, 3, 3)
    torch.save(tensors, path)
    assert path.stat().st_size < 30_000
    fails(path, "features.conv0.weight is expanded: 231,928,233,984 numbers from 4 bytes")
    one = torch.zeros(1 << 20)
    torch.save({f"features.{i}": one for i in range(100)} | dict(plain().state_dict()), path)
    fails(path, "its tensors share their data: .* bytes from")
    torch.save({"a": torch.zeros(1 << 22)}, path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    fails(path, "unpacks to more than it has: torch.save wrote no such file")


def test_a_net_with_nan_is_not_saved(tmp_path: Path) -> None:
    net = uneven()
    with torch.no_grad():
        net.features.norm5.running_var[0] = float("nan")
    with pytest.raises(
        CheckpointError, match=r"cannot save this model: .*norm5.running_var holds 1 NaN"
    ):
        save(net, tmp_path / "net")
    net = uneven()
    net.classifier.half()
    with pytest.raises(CheckpointError, match=r"cannot save this model: .* mixes the dtypes"):
        save(net, tmp_path / "net")
    assert os.listdir(tmp_path) == []


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    fails(tmp_path / ("x" * 300), "File name too long")
    os.mkfifo(tmp_path / "pipe")
    fails(tmp_path / "pipe", "it is no regular file, but a pipe or a device")
    fails(Path("/dev/zero"), "it is no regular file")
    for read in (load, read_info):
        with pytest.raises(CheckpointError, match="null byte in its name"):
            read("a\0b.safetensors")
    strange = tmp_path / os.fsdecode(b"n\xff\xfe.safetensors")
    save(plain(), strange)
    assert load(strange).config == plain().config


def test_paths_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    for name in ("a\0b", "x" * 300, "file/net", "folder"):
        with pytest.raises(CheckpointError, match=r"cannot write .*; nothing was changed"):
            save(plain(), tmp_path / name)
        with pytest.raises(CheckpointError, match=r"cannot write .*; nothing was changed"):
            save_state_dict(plain(), tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


FULL_DISK = """
import resource, sys
from prune_dn.checkpoints import checkpoint
from prune_dn.errors import CheckpointError
net = checkpoint.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
for write in (checkpoint.save, checkpoint.save_state_dict):
    try:
        write(net, sys.argv[1])
    except CheckpointError as error:
        print(str(error))
"""


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save(plain(), path)
    before = path.read_bytes()
    command = [sys.executable, "-c", FULL_DISK, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert len(lines) == 2 and all("File too large" in line for line in lines), done.stdout
    assert all(line.startswith(f"cannot write {path}") for line in lines)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net.safetensors"]


class Touch:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return eval, (f"open({str(self.path)!r}, 'w')",)


def test_pickles_that_need_code_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"state_dict": plain().state_dict(), "best": Touch(tmp_path / "ran")}, path)
    fails(path, r"holds more than tensors, .* run code \(it needs eval\). Where it was made")
    torch.save({"state_dict": plain().state_dict(), "best": print}, path)
    assert load(path).config == plain().config  # a stand-in, which is not called
    torch.save(uneven(), path)
    fails(path, r"it needs prune_dn.models.dense_net.DenseNet\). .* torch.save\(model.state_dict")
    assert not (tmp_path / "ran").exists()
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
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
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
    with pytest.raises(CheckpointError, match="is damaged: its architecture is 'Other'"):
        load(tmp_path / "net")


def test_a_published_light_cnn_checkpoint(tmp_path: Path) -> None:
    """As the published training code writes it: wrapped, with other values beside the weights."""
    net = light_cnn_29(5, image_size=32, widths=(4, 6, 6, 6, 6), embedding=8).eval()
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    torch.save({"epoch": 3, "arch": "LightCNN", "state_dict": state, "prec1": 0.5}, tmp_path / "a")
    again = load(tmp_path / "a")
    x = torch.randn(2, 1, 32, 32)
    assert again.config == net.config and torch.equal(again(x), net(x))
