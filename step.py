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

import torch
from torch import Tensor

SOURCE = Path(__file__).resolve().parent / "step.cpp"


@functools.cache
def load_library(compiler: str, source: Path, activation: str) -> ctypes.CDLL:
    """step.cpp, compiled for this processor and an activation; raises where that fails."""
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


def parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """Views of a flat tensor, one behind the other, each in the shape and order of axes of one of the tensors."""
    split = flat.split([tensor.numel() for tensor in tensors])
    return [
        part.as_strided(tensor.shape, tensor.stride(), part.storage_offset())
        for part, tensor in zip(split, tensors, strict=True)
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
        count = sum(parameter.numel() for parameter in self.parameters)
        if count != 15_440:
            raise RuntimeError("step.cpp is for another network")
        self.library = load_library(compiler, SOURCE, self.net.activation)
        self.lanes = self.library.lanes()
        self.result = torch.zeros(count + 2)  # all gradients, the mean loss, the number right
        self.weights = torch.zeros(count)  # all parameters
        self.gradients, self.copies = parts(self.result[:-2], self.parameters), parts(self.weights, self.parameters)
        # Into the tensors as they lie: load_state_dict() copies into them, but net.to() may move them.
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
        network = self.blocks.data_ptr(), self.weights.data_ptr(), self.statistics
        batch = images.data_ptr(), None if labels is None else labels.data_ptr(), len(images)
        self.library.step(*network, *batch, *dropout, torch.get_num_threads(), output.data_ptr())

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """A batch's (mean loss, number right), in training mode; leaves the gradients in .grad, which must be None."""
        if len(images) % self.lanes:  # an epoch's last batch may be smaller
            return self.eager.forward_backward(images, labels)
        keys = torch.randint(2**32, (2,)).tolist()  # of the dropout masks
        self.call(images, labels.long().contiguous(), (self.net.drop1.p, self.net.drop2.p, *keys), self.result)
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


def agrees_with_autograd(eager, batch_size: int, seed: int) -> bool:
    """Whether step.cpp finds, in a batch of noise without dropout, what autograd finds in double precision."""
    single = copy.deepcopy(eager)
    single.net.train()
    single.net.drop1.p = single.net.drop2.p = 0.0
    double = copy.deepcopy(single)
    double.net.double()
    images = torch.rand(batch_size, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    results = []
    for step, pixels in ((CompiledStep(single), images), (double, images.double())):
        loss, _ = step.forward_backward(pixels, torch.arange(batch_size) % 10)
        gradients = [parameter.grad for parameter in step.net.parameters()]
        results.append([torch.tensor(loss), *gradients, *step.net.buffers(), step.forward(pixels)])
    # Not >, for no comparison with nan is true.
    return all((a - b).abs().max() <= 0.02 * b.abs().max() + 1e-6 for a, b in zip(*results, strict=True))


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
