"""backend.cpp on a network of script.py: the same forward and backward pass, several times as fast on a CPU.

script.py calls compiled_backend() where this file lies beside it, and goes on without where that raises.
"""

import copy
import ctypes
import importlib.util
import math
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache, partial
from pathlib import Path
from timeit import timeit

import numpy as np
import torch
from torch import Tensor, nn

SOURCE = Path(__file__).resolve().parent / "backend.cpp"
WINDOWS = os.name == "nt"


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, one on the PATH, or the package ziglang's. Raises where there is none."""
    names = ("clang++",) if WINDOWS else ("c++", "g++", "clang++")
    if chosen := os.environ.get("CXX"):
        command = shlex.split(chosen, posix=not WINDOWS)
    elif found := next(filter(shutil.which, names), None):
        command = [found]
    elif importlib.util.find_spec("ziglang"):
        command = [sys.executable, "-m", "ziglang", "c++"]
    else:
        raise RuntimeError(f"there is no C++ compiler ({', '.join(names)} or the package ziglang)")
    # GCC's code for Windows crashes with AVX (its bug 54412) and needs DLLs that Python does not find.
    if WINDOWS and not any(name in part for part in command for name in ("clang", "zig")):
        raise RuntimeError("on Windows the C++ compiler must be clang or the package ziglang's")
    return tuple(command)


@cache
def load_library(compiler: tuple[str, ...], source: Path, activation: str) -> ctypes.CDLL:
    """backend.cpp, compiled for this processor and an activation, by its name; raises where that fails."""
    # The folder is removed at once, except on Windows: a library that is kept would crash on another machine.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file = str(Path(folder) / "backend.so")
        flags = "-std=c++20", "-O3", "-shared", "-static-libstdc++" if WINDOWS else "-fPIC", "-pthread"
        env = os.environ | {"TMPDIR": folder}  # for the temporary files of a compiler that is interrupted
        for native in (["-march=native"], ["-mcpu=native"], []):  # the first that the compiler knows
            command = [*compiler, *flags, *native, f"-D{activation.upper()}", str(source), "-o", file]
            done = subprocess.run(command, env=env, timeout=300, capture_output=True, text=True, errors="replace")
            if done.returncode == 0:
                break
        else:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else f"{shlex.join(compiler)} failed")
        library = ctypes.CDLL(file)
    pointer, int32, float32, uint32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_uint32
    library.run_batch.argtypes = *[pointer] * 5, int32, float32, float32, uint32, uint32, int32, pointer
    return library


class CompiledBackend:
    """A script.EagerBackend's pass by backend.cpp, for a network on the CPU; raises for another network.

    It trains on multiples of `lanes` images of 28x28 pixels. Any other batch goes to the eager backend, and so do a
    forward() in training mode and a backward pass in evaluation mode.
    """

    kind = "compiled"

    def __init__(self, eager) -> None:
        self.eager, self.net = eager, eager.net
        self.parameters, buffers = list(self.net.parameters()), list(self.net.buffers())
        count = sum(parameter.numel() for parameter in self.parameters if parameter.requires_grad)
        norms = [n for channels in (10, 20, 20, 20, 40) for n in (channels, channels, 1)]  # mean, variance, batches
        if self.parameters[0].device.type != "cpu" or count != 15_440 or [b.numel() for b in buffers] != norms:
            raise RuntimeError("backend.cpp is for script.py's own network, all of it trained, on a CPU")
        self.library = load_library(find_compiler(), SOURCE, self.net.get_extra_state())
        self.lanes = self.library.lanes()
        self.result = torch.zeros(count + 2)  # all gradients, the mean loss, the number right
        parts = zip(self.parameters, self.result[:-2].split([p.numel() for p in self.parameters]), strict=True)
        self.gradients = [part.as_strided(p.shape, p.stride(), part.storage_offset()) for p, part in parts]
        # Pointers, which stay valid as load_state_dict() copies into the tensors; net.to() may move them.
        self.statistics = (ctypes.c_void_p * len(buffers))(*[buffer.data_ptr() for buffer in buffers])
        self.blocks = torch.zeros(0)  # backend.cpp's memory, which grows with the batch

    @torch.no_grad()
    def call(self, images: Tensor, labels: Tensor | None, dropout: tuple, output: Tensor) -> None:
        """backend.cpp's run_batch(), which writes to `output`. dropout: both layers' rates, and keys of their masks."""
        needed = self.library.block_floats() * math.ceil(len(images) / self.lanes)
        if len(self.blocks) < needed:
            self.blocks = torch.zeros(needed)
        # Weights as (out, K, K, in), which is their order in memory.
        flat = torch.cat([p.permute(0, 2, 3, 1).flatten() if p.dim() == 4 else p for p in self.parameters])
        images = images.float().contiguous()
        network = self.blocks.data_ptr(), flat.data_ptr(), self.statistics
        batch = images.data_ptr(), None if labels is None else labels.data_ptr(), len(images)
        self.library.run_batch(*network, *batch, *dropout, torch.get_num_threads(), output.data_ptr())

    def forward_backward(self, images: Tensor, labels: Tensor) -> tuple[float, int]:
        """A batch's (mean loss, number right); the gradients in .grad are overwritten."""
        if images.shape[1:] != (1, 28, 28) or len(images) % self.lanes or not self.net.training:
            return self.eager.forward_backward(images, labels)
        self.keys = torch.randint(2**32, (2,)).tolist()  # of the dropouts' masks
        self.call(images, labels.long().contiguous(), (self.net.drop1.p, self.net.drop2.p, *self.keys), self.result)
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient  # each time, as zero_grad() and the eager backend take it away
        loss, right = self.result[-2:].tolist()
        return loss, int(right)

    def forward(self, images: Tensor) -> Tensor:
        """Log-probabilities (B, 10) of images (B, 1, 28, 28); without a graph in evaluation mode."""
        if images.shape[1:] != (1, 28, 28) or self.net.training:
            return self.eager.forward(images)
        output = torch.empty(len(images), 10)
        for part, rows in zip(images.split(64), output.split(64), strict=True):  # 64 at a time stay in the cache
            self.call(part, None, (0.0, 0.0, 0, 0), rows)
        return output


def dropout_mask(rate: float, key: int, shape: tuple[int, int, int], images: int) -> Tensor:
    """What backend.cpp's dropout multiplies values (images, *shape) with, 0 or 1 / (1 - rate), by the same hash."""
    index = np.arange(math.prod(shape) * images, dtype=np.uint32)
    hashed = (index * np.uint32(0x9E3779B9)) ^ np.uint32(key)
    hashed = (hashed ^ (hashed >> 16)) * np.uint32(0x7FEB352D)
    hashed = (hashed ^ (hashed >> 15)) * np.uint32(0x846CA68B)
    keeps = torch.tensor((hashed ^ (hashed >> 16)) >= rate * 2**32)
    return (keeps / (1 - rate)).view(*shape, images).permute(3, 0, 1, 2)


def agrees_with_autograd(eager, images: Tensor, labels: Tensor) -> bool:
    """Whether backend.cpp finds what autograd finds in double precision with the same dropout masks."""
    compiled, exact = CompiledBackend(copy.deepcopy(eager)), copy.deepcopy(eager)
    compiled.net.eval()
    exact.net.double().eval()
    pairs = [(compiled.forward(images), exact.forward(images.double()))]
    compiled.net.train()
    exact.net.train()
    found = compiled.forward_backward(images, labels)
    dropouts = (exact.net.drop1, (20, 14, 14)), (exact.net.drop2, (20, 7, 7))
    for (dropout, shape), key in zip(dropouts, compiled.keys, strict=True):
        if type(dropout) is nn.Dropout:  # any other stays as it is, and differs
            dropout.forward = dropout_mask(dropout.p, key, shape, len(images)).mul
    wanted = exact.forward_backward(images.double(), labels)
    pairs += zip(map(torch.tensor, found), map(torch.tensor, wanted), strict=True)
    pairs += [(p.grad, q.grad) for p, q in zip(compiled.parameters, exact.net.parameters(), strict=True)]
    pairs += zip(compiled.net.buffers(), exact.net.buffers(), strict=True)
    # Not >, for no comparison with nan is true.
    return all((a - b).abs().max() <= 0.02 * b.abs().max() + 1e-6 for a, b in pairs)


def compiled_backend(eager, batch_size: int, timed: bool = True) -> tuple[CompiledBackend, str]:
    """The compiled backend for the eager one's network, and the times of both in words, or "" where it is not timed.

    Raises, with the reason, where it is wrong or slower. Network and random generator stay as they are.
    """
    backend = CompiledBackend(eager)
    if batch_size % backend.lanes or batch_size > 1024:
        raise RuntimeError(f"backend.cpp takes batch sizes that are multiples of {backend.lanes}, up to 1024")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = [(torch.rand(batch_size, 1, 28, 28), torch.arange(batch_size) % 10) for _ in range(5)]
        # Rounding may make another pixel win a max-pool, and so change a gradient; a wrong backend differs in all.
        if not any(agrees_with_autograd(eager, *batch) for batch in batches):
            raise RuntimeError("backend.cpp and autograd differ")
        if not timed:
            return backend, ""
        eager = copy.deepcopy(eager)
        eager.net.train()
        passes = CompiledBackend(eager).forward_backward, eager.forward_backward
        # Not in turns: PyTorch's threads, after their work, spin on the cores that backend.cpp needs.
        compiled_ms, eager_ms = [1000 * min(timeit(partial(run, *b), number=1) for b in batches) for run in passes]
    if compiled_ms > eager_ms:
        raise RuntimeError(f"compiled is slower: {compiled_ms:.1f} ms a batch, eager {eager_ms:.1f}")
    return backend, f"{compiled_ms:.1f} ms a batch, eager {eager_ms:.1f}"
