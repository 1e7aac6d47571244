"""torch against the driver and the GPUs of this machine."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

from pipeline.health.finding import ERROR, OK, WARNING, Finding
from pipeline.health.programs import INSTALL, installed


@dataclass(frozen=True)
class Cuda:
    """What torch and the driver say of GPUs."""

    torch: str
    """torch's version."""
    build: str | None
    """The CUDA version that torch was built for; None for a CPU build."""
    driver: str | None
    """The newest CUDA version that the driver knows; None without a driver."""
    devices: int
    """GPUs of this machine, by its device files."""
    usable: tuple[str, ...] = ()
    """Names of the GPUs on which torch computed something."""
    problem: str = ""
    """What torch or a GPU said when it could not."""


def check_torch() -> Finding:
    """torch against the driver, and a product on each GPU."""
    if installed("torch") is None:
        return Finding("torch", ERROR, "torch is not installed", INSTALL.format("train"))
    try:
        import torch
    except Exception as error:
        words = " ".join(str(error).split())
        return Finding("torch", ERROR, f"torch {installed('torch')} does not load: {words}", INSTALL.format("train"))
    usable, problem = [], ""
    try:
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
            properties = torch.cuda.get_device_properties(index)
            ones = torch.ones(64, 64, device=f"cuda:{index}")
            if float((ones @ ones).sum()) != 64.0**3:
                raise RuntimeError(f"GPU {index} computes wrong products")
            usable.append(f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB")
    except Exception as error:
        problem = " ".join(str(error).split())[:200]
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return judge_cuda(Cuda(torch.__version__, torch.version.cuda, driver_cuda(), devices, tuple(usable), problem))


def driver_cuda() -> str | None:
    """The newest CUDA version of the NVIDIA driver that is installed, such as `13.0`; None without one."""
    try:
        library, number = ctypes.CDLL("libcuda.so.1"), ctypes.c_int()
        status = library.cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return None
    return f"{number.value // 1000}.{number.value % 1000 // 10}" if status == 0 and number.value else None


def judge_cuda(cuda: Cuda) -> Finding:
    """The finding for what torch and the driver say.

    A driver runs what was built for its own major version of CUDA and for older ones (NVIDIA's minor version
    compatibility), never for newer ones.
    """
    build = f"torch {cuda.torch} built for CUDA {cuda.build}" if cuda.build else f"torch {cuda.torch} built for CPUs"
    gpus = f"{cuda.devices} GPU{'s' if cuda.devices != 1 else ''}"
    if cuda.build is None and (cuda.devices or cuda.driver):
        remedy = "install the CUDA build: leave PyTorch's index of CPU builds out, or name its CUDA index"
        return Finding("torch", WARNING, f"{build}, so the {gpus} of this machine are not used", remedy)
    if cuda.build is None:
        return Finding("torch", OK, f"{build}; no GPU here")
    if cuda.driver is None:
        if cuda.devices:
            remedy = "install NVIDIA's driver (nvidia-smi must answer), in containers the NVIDIA container toolkit"
            return Finding("torch", ERROR, f"{build}, but the driver of the {gpus} does not load", remedy)
        return Finding("torch", OK, f"{build}; no GPU here, so the CPU computes")
    if int(cuda.build.split(".")[0]) > int(cuda.driver.split(".")[0]):
        remedy = f"update the driver, or install torch built for CUDA {cuda.driver.split('.')[0]}"
        return Finding("torch", ERROR, f"{build}, but the driver knows CUDA up to {cuda.driver}", remedy)
    if cuda.problem or not cuda.usable:
        words = cuda.problem or "torch sees no GPU (CUDA_VISIBLE_DEVICES may hide them)"
        remedy = "compare nvidia-smi and CUDA_VISIBLE_DEVICES; restart the driver or the container"
        return Finding("torch", ERROR, f"{build}, driver for CUDA {cuda.driver}, but {words}", remedy)
    return Finding("torch", OK, f"{build}, driver for CUDA {cuda.driver}: {', '.join(cuda.usable)}")
