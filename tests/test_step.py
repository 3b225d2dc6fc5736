"""The suite of step.cpp: against autograd in double precision, with its own dropout masks, and under sanitizers."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import script
import step as fast
from conftest import HERE, fault

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
LANES = {"-D__AVX512F__=1": 16, "-U__AVX512F__": 8}  # by flag; either compiles for any processor


def trained_net(activation=script.Recipe.activation):
    """The committed weights in training mode, with the activation they were trained with or another."""
    net = script.load_net(HERE / "assets" / "model.pt").train()
    net.set_extra_state(activation)
    return net


def batch(test_set, size=32):
    """Images (size, 1, 28, 28) and labels (size,)."""
    return next(iter(script.Loader(test_set[0][:size], test_set[1][:size], size)))


@pytest.mark.parametrize("flag", ["", *(pytest.param(flag, marks=pytest.mark.slow) for flag in LANES)])
@pytest.mark.parametrize("activation", script.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["fresh", "ties", "trained"])
def test_gradients_and_statistics_are_autograds(test_set, monkeypatch, kind, activation, flag):
    monkeypatch.setenv("CXX", f"{COMPILER} {flag}".strip())
    net = script.Net(activation) if kind == "fresh" else trained_net(activation)
    rate = 0.1 if kind == "trained" else 0.0
    net.drop1.p = net.drop2.p = rate
    exact, step = copy.deepcopy(net).double(), fast.CompiledStep(script.Step(net))
    assert step.lanes == LANES.get(flag, step.lanes)
    for size in (96, 32, 16):  # on what those before have left in its memory
        images, labels = batch(test_set, size)
        if kind == "ties":  # flat images, and flat parts: the windows of the max-pools are full of equal values
            images = torch.zeros(size, 1, 28, 28)
            images[: size // 2, :, 8:20, 8:20] = 1
        torch.manual_seed(size)
        found = step.forward_backward(images, labels)
        exact.drop1.forward = fast.dropout_mask(rate, step.keys[0], (20, 14, 14), size).mul
        exact.drop2.forward = fast.dropout_mask(rate, step.keys[1], (20, 7, 7), size).mul
        exact.zero_grad()
        log_probabilities = exact(images.double())
        loss = F.nll_loss(log_probabilities, labels)
        loss.backward()
        right = (log_probabilities.argmax(dim=1) == labels).sum().item()
        assert found == pytest.approx((loss.item(), right), rel=1e-5, abs=1e-6)
        for (name, parameter), wanted in zip(net.named_parameters(), exact.parameters(), strict=True):
            if name in ("conv1.bias", "conv2.bias", "conv4.bias", "conv5.bias", "conv6.bias"):
                assert not parameter.grad.any()  # batch normalisation takes it away again; autograd finds noise
            else:  # a value that rounding puts over an activation's edge moves a gradient by some thousandths
                assert (parameter.grad - wanted.grad).norm() < 0.01 * wanted.grad.norm(), name
        for buffer, wanted in zip(net.buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_any_number_of_images_is_scored_and_an_odd_last_batch_is_stepped_by_the_eager_network(test_set):
    step, eager, results = fast.CompiledStep(script.Step(trained_net())), script.Step(trained_net()), []
    for size in (1, 31, 32, 100):
        images, _ = batch(test_set, size)
        torch.testing.assert_close(step.forward(images), eager.forward(images), rtol=1e-4, atol=1e-4)
    for either in (step, eager):
        torch.manual_seed(1)
        either.net.train()
        results.append(either.forward_backward(*batch(test_set, 21)))
    assert results[0] == results[1]


def test_the_seed_alone_gives_the_bits_and_each_step_draws_its_own_masks(test_set):
    images, labels = batch(test_set)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        step = fast.CompiledStep(script.Step(script.Net()))
        step.forward_backward(images, labels)
        first = step.result.clone()
        results.append(torch.cat((first, step.forward(images).flatten())))
        step.forward_backward(images, labels)  # with the same weights, but other masks
        assert not torch.equal(step.result, first)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_dropout_drops_a_tenth_at_random():
    first, second = ((fast.dropout_mask(0.1, key, (20, 14, 14), 256) == 0).float() for key in (1234567, 1234568))
    n = first.numel()
    for dropped in (first, second):
        assert dropped.mean().item() == pytest.approx(0.1, abs=6 * (0.09 / n) ** 0.5)
        for dim in range(4):  # every slice along every axis has its share, and neighbours are independent
            slices = dropped.transpose(0, dim).flatten(1)
            assert (slices.mean(dim=1) - 0.1).abs().max() < 6 * (0.09 / slices.shape[1]) ** 0.5
            both = slices[1:] * slices[:-1]
            assert both.mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / both.numel()) ** 0.5)
    assert (first * second).mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / n) ** 0.5)  # steps and layers


def test_ten_steps_are_those_of_the_eager_network(test_set):
    losses = {"compiled": [], "eager": []}
    for kind, found in losses.items():
        torch.manual_seed(1)
        net = script.Net()
        net.drop1.p = net.drop2.p = 0.0
        step, line = script.make_step(net, script.Recipe(compile=kind == "compiled"))
        assert line.startswith(f"step: {kind}, float32, threads: ")
        optimizer = torch.optim.SGD(net.parameters(), 0.1)  # Adam would blow up what rounding changes
        for _ in range(20):
            optimizer.zero_grad()
            found.append(step.forward_backward(*batch(test_set))[0])
            optimizer.step()
    assert losses["compiled"][:10] == pytest.approx(losses["eager"][:10], rel=0.02)
    assert losses["compiled"][-1] < 0.8 * losses["compiled"][0]


def test_one_batch_that_rounding_decides_does_not_cost_the_fast_step(monkeypatch):
    step, calls = fast.CompiledStep.forward_backward, []

    def rounded(self, images, labels):
        calls.append(images)
        loss, right = step(self, images, labels)
        return loss * (1.1 if len(calls) == 1 else 1), right

    monkeypatch.setattr(fast.CompiledStep, "forward_backward", rounded)
    assert isinstance(script.make_step(script.Net(), script.Recipe())[0], fast.CompiledStep)
    assert len(calls) > 1
    assert not torch.equal(*calls[:2])


@fault(
    "no C++ compiler, one that fails, no step.cpp, a network that was changed, a step that differs from autograd",
    "it trains with the eager step, and the log says why",
)
@pytest.mark.slow
def test_without_a_step_that_can_be_trusted_it_trains_eagerly_and_says_why(tmp_path, monkeypatch):
    def said(net=None, **recipe):
        _, line = script.make_step(net or script.Net(), script.Recipe(**recipe))
        return re.fullmatch(r"step: eager, float32, threads: \d+ \((.*)\)", line)[1]

    average_pool, channel_dropout, wider, frozen = (script.Net() for _ in range(4))  # as a reader might try
    average_pool.pool1 = nn.AvgPool2d(2)
    channel_dropout.drop1 = nn.Dropout2d(0.1)
    frozen.conv1.requires_grad_(False)
    wider.conv6, wider.norm6, wider.conv7 = nn.Conv2d(20, 48, 3, padding=1), nn.BatchNorm2d(48), nn.Conv2d(48, 10, 1)
    assert said(compile=False) == "--no-compile"
    for net in (average_pool, channel_dropout):
        assert said(net) == "step.cpp and autograd differ"
    for net in (wider, frozen):
        assert said(net) == "step.cpp is for another network"
    assert "multiples of" in said(batch_size=33)
    assert "up to 1024" in said(batch_size=4096)
    reasons = {"'": "No closing quotation", "no-such": "no-such", f"{COMPILER} --no-such-flag": "no-such-flag"}
    for compiler, reason in reasons.items():
        monkeypatch.setenv("CXX", compiler)
        assert reason in said()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(fast, "SOURCE", tmp_path / "step.cpp")
    assert said().endswith("step.cpp: No such file or directory")
    wrong = (HERE / "step.cpp").read_text(encoding="utf-8").replace("total / 49.0f", "total / 48.0f")
    (tmp_path / "step.cpp").write_text(wrong, encoding="utf-8")
    assert said() == "step.cpp and autograd differ"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said() == "there is no C++ compiler"


@pytest.mark.skipif(sys.platform != "linux", reason="where a process's memory can be limited to what it has")
def test_memory_that_runs_out_does_not_end_the_process(test_set):
    import resource  # which Windows has not

    step, (images, labels) = fast.CompiledStep(script.Step(script.Net())), batch(test_set, 1024)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**26, limits[1]))
    try:
        with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as error:
            step.forward_backward(images, labels)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    assert "out of memory" in script.device_problem(error.value, "cpu")


@pytest.mark.slow
def test_the_script_alone_in_a_folder_trains(tmp_path):
    shutil.copy(HERE / "script.py", tmp_path)
    code = "import script; load = script.load_mnist; script.load_mnist = lambda *a: tuple(p[:640] for p in load(*a));"
    code += f"raise SystemExit(script.main(['--epochs', '1', '--device', 'cpu', '--data-dir', {str(HERE / 'data')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nstep: eager, float32, threads: \d+ \(No module named 'step'\)\n", done.stdout)
    files = {path.name for path in tmp_path.glob("runs/*/*")}
    assert files == {"recipe.json", "history.csv", "train.log", "checkpoint.pt", "model.pt"}


SANITIZED = """
#include "step.cpp"

int main() {  // every buffer is as large as it must be, and no larger
    std::vector<std::vector<float>> buffers;
    for (int size : {SIZES}) buffers.emplace_back(size, 0.1f);
    std::vector<float*> pointers;
    for (auto& buffer : buffers) pointers.push_back(buffer.data());
    const auto running = reinterpret_cast<const Statistics*>(pointers.data());
    std::vector<float> parameters(15440, 0.1f), pixels(48 * 784, 0.5f), result(15442), output(37 * 10);
    const auto& network = reinterpret_cast<const Network&>(parameters[0]);
    std::vector<int64_t> labels(48, 9);
    std::vector<Block> blocks(48 / LANES);
    for (int threads : {1, 2, 5}) {
        step(blocks.data(), network, running, pixels.data(), labels.data(), 48, 0.1, 0.1, 1, 2, threads, result.data());
        step(blocks.data(), network, running, pixels.data(), nullptr, 37, 0, 0, 0, 0, threads, output.data());
    }
    return std::abs(result[15440] - std::log(10.0f)) > 1e-5f;  // the loss, where all weights are equal
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("activation", script.ACTIVATIONS)
@pytest.mark.parametrize("flag", LANES)
def test_the_step_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path, flag, activation):
    sizes = [buffer.nbytes // 4 for buffer in script.Net().buffers()]
    (tmp_path / "main.cpp").write_text(SANITIZED.replace("SIZES", str(sizes).strip("[]")))
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    flags = "-std=c++20", "-O1", "-pthread", "-I", HERE, flag, f"-D{activation.upper()}", *sanitizers
    line = [COMPILER, *flags, "-o", "main", "main.cpp"]
    built = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:  # the sanitizers' libraries
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
