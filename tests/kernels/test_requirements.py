"""What the CUDA backend needs: found or not on made-up machines, and the kernels that each GPU gets."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata, util
from pathlib import Path

import pytest
import torch

from specdec.kernels.flashinfer.requirements import DEQUANTISED, Requirement, fp8_kinds, missing, paths, requirements


class Machine:
    """A GPU machine on which everything is there until a test takes it away."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.monkeypatch, self.cuda_home = monkeypatch, folder / "cuda"
        for name in ("bin/nvcc", "include/cublasLt.h", "include/curand.h"):
            path = self.cuda_home / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o755)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        self.triton(True)
        self.gpu((9, 0))
        self.flashinfer("0.7.2.post1")

    def triton(self, there: bool) -> None:
        self.monkeypatch.setattr(util, "find_spec", lambda _: object() if there else None)

    def gpu(self, capability: tuple[int, int] | None) -> None:
        functions = {
            "is_available": lambda: capability is not None,
            "get_device_capability": lambda: capability,
            "get_device_name": lambda: "NVIDIA Test",
            "mem_get_info": lambda: (3 * 2**30, 4 * 2**30),
        }
        for name, function in functions.items():
            self.monkeypatch.setattr(torch.cuda, name, function)

    def flashinfer(self, version: str | None) -> None:
        def find(name: str) -> str:
            if version is None:
                raise metadata.PackageNotFoundError(name)
            return version

        self.monkeypatch.setattr(metadata, "version", find)

    def found(self, **environ: str) -> dict[str, Requirement]:
        return {r.name: r for r in requirements(environ or {"CUDA_HOME": str(self.cuda_home)})}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    return Machine(monkeypatch, tmp_path)


def lacking(found: dict[str, Requirement]) -> list[str]:
    return [name for name, r in found.items() if not r.ok]


def test_a_gpu_machine_lacks_nothing(machine: Machine) -> None:
    found = machine.found()
    assert list(found) == [
        "torch with CUDA", "triton", "CUDA device", "device memory", "flashinfer-python", "nvcc", "cublasLt.h",
        "curand.h",
    ]  # fmt: skip
    assert missing(list(found.values())) == ""
    assert found["CUDA device"].found == "NVIDIA Test, compute capability 9.0"
    assert found["device memory"].found == "3.0 of 4.0 GiB free"


@pytest.mark.slow
def test_looking_does_not_import_flashinfer(tmp_path: Path) -> None:
    module = "specdec.kernels.flashinfer.requirements"
    script = f"import sys, {module} as r; r.requirements(); sys.exit('flashinfer' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=tmp_path).returncode == 0


def test_this_machine_is_told_what_it_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = requirements({"CUDA_HOME": str(tmp_path)})
    text = missing(found)
    for part in (
        "without CUDA (install a CUDA build",
        "none is visible (a GPU of compute",
        "bin/nvcc (install the CUDA",
    ):
        assert part in text
    assert [r.name for r in found] == [
        "torch with CUDA",
        "triton",
        "CUDA device",
        "flashinfer-python",
        "nvcc",
        "cublasLt.h",
        "curand.h",
    ]


@pytest.mark.parametrize("name", ["bin/nvcc", "include/cublasLt.h", "include/curand.h"])
def test_each_file_of_the_toolkit_is_looked_for(machine: Machine, name: str) -> None:
    (machine.cuda_home / name).unlink()
    assert lacking(machine.found()) == [name.split("/")[1]]


def test_triton_is_needed(machine: Machine) -> None:
    machine.triton(False)
    assert lacking(machine.found()) == ["triton"]


def test_headers_may_be_where_flashinfer_is_told_to_look(machine: Machine, tmp_path: Path) -> None:
    header = machine.cuda_home / "include" / "curand.h"
    header.rename(tmp_path / "curand.h")
    flags = f"-O3 -I/none -I{tmp_path}"
    assert lacking(machine.found(CUDA_HOME=str(machine.cuda_home))) == ["curand.h"]
    assert lacking(machine.found(CUDA_HOME=str(machine.cuda_home), FLASHINFER_EXTRA_CUDAFLAGS=flags)) == []


def test_the_backend_asks_for_the_text_alone(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", str(machine.cuda_home))
    assert missing() == ""
    machine.flashinfer("0.7.1")
    assert missing() == "flashinfer-python: 0.7.1 (0.7.2 or newer is needed: pip install 'flashinfer-python>=0.7.2')"


def test_the_toolkit_is_found_by_either_variable_or_the_path(machine: Machine, tmp_path: Path) -> None:
    home = str(machine.cuda_home)
    for environ in ({"CUDA_PATH": home}, {"PATH": f"{tmp_path}:{home}/bin"}, {"CUDA_HOME": home, "CUDA_PATH": "/none"}):
        assert lacking(machine.found(**environ)) == []
    assert lacking(machine.found(CUDA_HOME="/none", PATH=f"{home}/bin")) == ["nvcc", "cublasLt.h", "curand.h"]


@pytest.mark.parametrize(
    ("version", "ok"),
    [("0.7.2", True), ("0.7.2.post1", True), ("0.10.0", True), ("1.0", True), ("0.7.2+cu130", True), ("0.7.1", False),
     ("0.7", False), ("0.7.2rc1", False), (None, False)],
)  # fmt: skip
def test_flashinfer_from_0_7_2_on(machine: Machine, version: str | None, ok: bool) -> None:
    machine.flashinfer(version)
    assert lacking(machine.found()) == ([] if ok else ["flashinfer-python"])


@pytest.mark.parametrize(("capability", "ok"), [((7, 5), False), ((8, 0), True), ((10, 0), True), ((12, 0), True)])
def test_devices_from_compute_capability_8_on(machine: Machine, capability: tuple[int, int], ok: bool) -> None:
    machine.gpu(capability)
    assert lacking(machine.found()) == ([] if ok else ["CUDA device"])


GROUPED, FUSED = "grouped matrix product", "cutlass_fused_moe"
SCALED, SCALED_GROUPED = "torch._scaled_mm", "torch._scaled_grouped_mm"


@pytest.mark.parametrize(
    ("gpu", "capability", "experts", "fp8_linear", "fp8_experts"),
    [
        ("A100", (8, 0), GROUPED, DEQUANTISED, DEQUANTISED),
        ("RTX 3090", (8, 6), GROUPED, DEQUANTISED, DEQUANTISED),
        ("RTX 4090", (8, 9), FUSED, SCALED, DEQUANTISED),
        ("H100, H200", (9, 0), FUSED, SCALED, SCALED_GROUPED),
        ("B200", (10, 0), FUSED, SCALED, DEQUANTISED),
        ("B300", (10, 3), FUSED, DEQUANTISED, DEQUANTISED),
        ("RTX 5090", (12, 0), FUSED, DEQUANTISED, DEQUANTISED),
    ],
)
def test_paths(gpu: str, capability: tuple[int, int], experts: str, fp8_linear: str, fp8_experts: str) -> None:
    chosen = paths(capability)
    assert (chosen.attention, chosen.norm_rope_silu) == ("fa2, tensor cores", "FlashInfer")
    assert (chosen.experts, chosen.fp8_linear, chosen.fp8_experts) == (experts, fp8_linear, fp8_experts)
    assert ("linear" in fp8_kinds(capability)) == (fp8_linear == SCALED)
    assert ("experts" in fp8_kinds(capability)) == (fp8_experts == SCALED_GROUPED)


def test_older_gpus_have_no_path() -> None:
    with pytest.raises(ValueError, match=r"compute capability 7.5: 8.0 or more is needed"):
        paths((7, 5))
