"""step.cpp on a network of script.py: the same forward and backward pass, several times as fast on a processor.

script.py calls compiled_step() where this file lies beside it, and does without where that raises.
"""

import copy
import ctypes
import functools
import importlib
import math
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = Path(__file__).resolve().parent / "step.cpp"


@functools.cache
def load_library(compiler: str, source: Path, activation: str) -> ctypes.CDLL:
    """step.cpp, compiled for this processor and an activation, by its name; raises where that fails."""
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    # The folder goes at once: a library that is kept would crash on another machine that shares the disk.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = str(Path(folder) / "step.so")
        flags = "-std=c++20", "-O3", native, "-shared", "-fPIC", "-pthread", f"-D{activation.upper()}", str(source)
        command = [*shlex.split(compiler), *flags, "-o", file]
        with ThreadPoolExecutor() as pool:
            pool.submit(importlib.import_module, "torch._dynamo")  # seconds, which the optimizer would wait for later
            # A compiler that is interrupted leaves its temporary files in that folder, too.
            environment = os.environ | {"TMPDIR": folder}
            done = subprocess.run(
                command, env=environment, timeout=300, capture_output=True, text=True, errors="replace"
            )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else f"{compiler} failed")
        library = ctypes.CDLL(file)
    pointer, int32, float32, uint32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_uint32
    library.step.argtypes = *[pointer] * 5, int32, float32, float32, uint32, uint32, int32, pointer  # as in step.cpp
    return library


def views_like(tensors: list[Tensor], flat: Tensor) -> list[Tensor]:
    """Views of a flat tensor, one behind the other, each in the shape and order of axes of one of the tensors."""
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
        for part, tensor in zip(parts, tensors, strict=True)
    ]


class CompiledStep:
    """A script.Step by step.cpp, for a network on the CPU. Raises where there is no compiler, or another network.

    It trains on batches of whole vectors, `lanes` images each; others go to the eager step.
    """

    def __init__(self, eager) -> None:
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
        if not compiler:
            raise RuntimeError("there is no C++ compiler")
        self.eager, self.net = eager, eager.net
        self.parameters, buffers = list(self.net.parameters()), list(self.net.buffers())
        # Those to be trained, and no fewer: step.cpp leaves a gradient for each.
        count = sum(parameter.numel() for parameter in self.parameters if parameter.requires_grad)
        if count != 15_440:
            raise RuntimeError("step.cpp is for another network")
        self.library = load_library(compiler, SOURCE, self.net.get_extra_state())
        self.lanes = self.library.lanes()
        self.result = torch.zeros(count + 2)  # all gradients, the mean loss, the number right
        self.gradients = views_like(self.parameters, self.result[:-2])
        self.flat = torch.zeros(count)  # a copy of all parameters
        self.copies = views_like(self.parameters, self.flat)
        # Pointers, which stay good as load_state_dict() copies into the tensors; net.to() may move them.
        self.statistics = (ctypes.c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
        self.blocks = torch.zeros(0)  # step.cpp's memory, which grows with the batch

    @torch.no_grad()
    def call(self, images: Tensor, labels: Tensor | None, dropout: tuple, output: Tensor) -> None:
        """step.cpp's step(), which says what it leaves in `output`; dropout: both layers' rates, and keys of masks."""
        needed = self.library.block_floats() * math.ceil(len(images) / self.lanes)
        if len(self.blocks) < needed:
            self.blocks = torch.zeros(needed)
        for copied, parameter in zip(self.copies, self.parameters, strict=True):
            copied.copy_(parameter)
        images = images.float().contiguous()
        network = self.blocks.data_ptr(), self.flat.data_ptr(), self.statistics
        batch = images.data_ptr(), None if labels is None else labels.data_ptr(), len(images)
        self.library.step(*network, *batch, *dropout, torch.get_num_threads(), output.data_ptr())

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """A batch's (mean loss, number right), in training mode; leaves the gradients in .grad, which must be None."""
        if len(images) % self.lanes:  # an epoch's last batch may be smaller
            return self.eager.forward_backward(images, labels)
        self.keys = torch.randint(2**32, (2,)).tolist()  # of the dropouts' masks
        self.call(images, labels.long().contiguous(), (self.net.drop1.p, self.net.drop2.p, *self.keys), self.result)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # anew each time, as zero_grad() takes them away
        loss, right = self.result[-2:].tolist()
        return loss, int(right)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 10) of images (B, 1, 28, 28), in evaluation mode."""
        output = torch.empty(len(images), 10)
        for part, rows in zip(images.split(64), output.split(64), strict=True):  # 64 at a time stay in the cache
            self.call(part, None, (0.0, 0.0, 0, 0), rows)
        return output


def dropout_mask(rate: float, key: int, shape: tuple[int, int, int], images: int) -> Tensor:
    """What step.cpp's dropout multiplies values (images, *shape) with, 0 or 1 / (1 - rate), by the same hash."""
    index = np.arange(math.prod(shape) * images, dtype=np.uint32)
    hashed = (index * np.uint32(0x9E3779B9)) ^ np.uint32(key)
    hashed = (hashed ^ (hashed >> 16)) * np.uint32(0x7FEB352D)
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(0x846CA68B)
    keeps = torch.tensor((hashed ^ (hashed >> 16)) >= rate * 2**32)
    return (keeps / (1 - rate)).view(*shape, images).permute(3, 0, 1, 2)


def agrees_with_autograd(eager, batch_size: int, seed: int) -> bool:
    """Whether step.cpp finds, in a batch of noise, what autograd finds in double precision with the same masks."""
    step, exact = CompiledStep(copy.deepcopy(eager)), copy.deepcopy(eager)
    exact.net.double().train()
    images = torch.rand(batch_size, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(batch_size) % 10
    found = step.forward_backward(images, labels)
    dropouts = (exact.net.drop1, (20, 14, 14)), (exact.net.drop2, (20, 7, 7))
    for (dropout, shape), key in zip(dropouts, step.keys, strict=True):
        if type(dropout) is nn.Dropout:  # any other stays as it is, and differs
            mask = dropout_mask(dropout.p, key, shape, batch_size)
            dropout.register_forward_hook(lambda module, x, _, mask=mask: x[0] * mask if module.training else None)
    wanted = exact.forward_backward(images.double(), labels)
    pairs = list(zip(map(torch.tensor, found), map(torch.tensor, wanted), strict=True))
    pairs += [(ours.grad, theirs.grad) for ours, theirs in zip(step.parameters, exact.net.parameters(), strict=True)]
    pairs += zip(step.net.buffers(), exact.net.buffers(), strict=True)
    pairs.append((step.forward(images), exact.forward(images.double())))
    # Not >, for no comparison with nan is true.
    return all((a - b).abs().max() <= 0.02 * b.abs().max() + 1e-6 for a, b in pairs)


def compiled_step(eager, batch_size: int) -> CompiledStep:
    """The eager step by step.cpp; raises where it cannot be trusted with these batches."""
    step = CompiledStep(eager)
    if batch_size % step.lanes or batch_size > 1024:
        raise RuntimeError(f"step.cpp takes batch sizes that are multiples of {step.lanes}, up to 1024")
    # Rounding may make another pixel win a max-pool, or cross an edge of the activation: in one batch of a hundred a
    # gradient then differs by some per cent, as PyTorch's own in single precision does. A wrong step differs in all.
    if not any(agrees_with_autograd(eager, batch_size, seed) for seed in range(5)):
        raise RuntimeError("step.cpp and autograd differ")
    return step
