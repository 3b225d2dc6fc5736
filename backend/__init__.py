"""backend.cpp on a network of script.py: the same forward and backward pass, several times as fast on a CPU.

script.py calls choose_backend() where this folder lies beside it.
"""

import copy
import ctypes
import hashlib
import importlib.util
import inspect
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
# source_hash() of script.py's EagerBackend and Net, which backend.cpp computes as they stand.
SOURCE_HASH = "11a0b16598e34f37ad7e9672b42921c0c650cf808ca245a95479036c1d651f73"
MOST_IMAGES = 1024  # in a batch: backend.cpp needs 0.33 MB for each, 340 MB in all
MOST_SECONDS = 60  # for the compiler


def find_compiler() -> tuple[str, ...]:
    """The command of a C++ compiler: $CXX, one on the PATH, or the package ziglang's. Raises if there is none."""
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
    print("compiling backend.cpp ...", file=sys.stderr)
    # The folder is removed at once, except on Windows: compiled for this processor, a library may crash on another.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        file, messages = Path(folder) / "backend.so", Path(folder) / "messages"
        flags = "-std=c++20", "-O3", "-shared", "-static-libstdc++" if WINDOWS else "-fPIC", "-pthread"
        env = os.environ | {"TMPDIR": folder}  # for the temporary files of a compiler that is interrupted
        for native in (["-march=native"], ["-mcpu=native"], []):  # the first that the compiler knows
            command = [*compiler, *flags, *native, f"-D{activation.upper()}", str(source), "-o", str(file)]
            with open(messages, "w") as output:  # not a pipe, which the compiler's own children would hold open
                try:
                    done = subprocess.run(command, env=env, timeout=MOST_SECONDS, stdout=output, stderr=output)
                except subprocess.TimeoutExpired as error:
                    raise RuntimeError(f"{shlex.join(compiler)} took more than {MOST_SECONDS} s") from error
            if done.returncode == 0:
                break
        else:
            errors = [line for line in messages.read_text(errors="replace").splitlines() if "error" in line]
            raise RuntimeError(errors[0] if errors else f"{shlex.join(compiler)} failed")
        library = ctypes.CDLL(str(file))
    pointer, int32, float32, uint32 = ctypes.c_void_p, ctypes.c_int, ctypes.c_float, ctypes.c_uint32
    library.run_batch.argtypes = *[pointer] * 5, int32, float32, float32, uint32, uint32, int32, pointer
    return library


def source_hash(eager) -> str:
    """The SHA-256 of the source of the eager backend's class and its network's, in hexadecimal digits."""
    return hashlib.sha256((inspect.getsource(type(eager)) + inspect.getsource(type(eager.net))).encode()).hexdigest()


def shapes(net: nn.Module) -> list[tuple[str, torch.Size]]:
    """Names and shapes of all parameters and statistics."""
    return [(name, tensor.shape) for name, tensor in (*net.named_parameters(), *net.named_buffers())]


class CompiledBackend:
    """A script.EagerBackend's pass by backend.cpp, for a network on the CPU; raises for another network.

    It trains on multiples of `lanes` images of 28x28 pixels. Any other batch goes to the eager backend, and so do a
    forward() in training mode and a backward pass in evaluation mode.
    """

    kind = "compiled"

    def __init__(self, eager) -> None:
        self.eager, self.net = eager, eager.net
        self.parameters, buffers = list(self.net.parameters()), list(self.net.buffers())
        if source_hash(eager) != SOURCE_HASH:
            raise RuntimeError("EagerBackend or Net was changed")
        with torch.device("meta"):  # without memory or random numbers
            own = shapes(type(self.net)())
        trained_on_cpu = all(p.requires_grad and p.device.type == "cpu" for p in self.parameters)
        if shapes(self.net) != own or not trained_on_cpu:
            raise RuntimeError("backend.cpp is for script.py's own network, all of it trained, on a CPU")
        self.library = load_library(find_compiler(), SOURCE, self.net.get_extra_state())
        self.lanes = self.library.lanes()
        sizes = [parameter.numel() for parameter in self.parameters]
        self.result = torch.zeros(sum(sizes) + 2)  # all gradients, the mean loss, the number right
        parts = zip(self.parameters, self.result[:-2].split(sizes), strict=True)
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
        self.keys = torch.randint(2**32, (2,)).tolist()  # of the dropouts' masks; the check at the start reads them
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

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the parameters, on one thread: PyTorch's others, after work, spin on cores that backend.cpp needs."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        optimizer.step()
        torch.set_num_threads(threads)


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
    # <= is false for nan, so nan counts as different.
    return all((a - b).abs().max() <= 0.02 * b.abs().max() + 1e-6 for a, b in pairs)


def compiled_backend(eager, batch_size: int, timed: bool) -> tuple[CompiledBackend, str]:
    """The compiled backend for the eager one's network, and why it is taken; timed: the times of both.

    Raises, with the reason, where it is wrong or slower. Network and random generator stay as they are.
    """
    backend = CompiledBackend(eager)
    if batch_size % backend.lanes or batch_size > MOST_IMAGES:
        raise RuntimeError(f"backend.cpp takes batch sizes that are multiples of {backend.lanes}, up to {MOST_IMAGES}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        batches = [(torch.rand(batch_size, 1, 28, 28), torch.arange(batch_size) % 10) for _ in range(5)]
        # Rounding may make another pixel win a max-pool, and so change a gradient; a wrong backend differs in all.
        if not any(agrees_with_autograd(eager, *batch) for batch in batches):
            raise RuntimeError("backend.cpp and autograd differ")
        if not timed:
            return backend, "as the run began"
        eager = copy.deepcopy(eager)
        eager.net.train()
        passes = CompiledBackend(eager).forward_backward, eager.forward_backward
        # Not in turns: PyTorch's threads, after their work, spin on the cores that backend.cpp needs.
        compiled_ms, eager_ms = [1000 * min(timeit(partial(run, *b), number=1) for b in batches) for run in passes]
    if compiled_ms > eager_ms:
        raise RuntimeError(f"compiled is slower: {compiled_ms:.1f} ms a batch, eager {eager_ms:.1f}")
    return backend, f"{compiled_ms:.1f} ms a batch, eager {eager_ms:.1f}"


def choose_backend(eager, batch_size: int, kind: str | None) -> tuple[object, str]:
    """The faster backend for the eager one's network, and the reason in words.

    kind: "eager" or "compiled", as a run that is resumed began: its bits must not depend on the noise of a timing.
    """
    if kind == "eager":
        return eager, "as the run began"
    try:
        return compiled_backend(eager, batch_size, timed=kind is None)
    except Exception as error:  # whatever it or its compiler lacks, PyTorch does without it
        return eager, str(error)
