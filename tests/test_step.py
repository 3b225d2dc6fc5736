"""The suite of step.cpp: against autograd in double precision, with its own dropout masks, and under sanitizers."""

import copy
import ctypes
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import script
import step as fast
from conftest import HERE, fault

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
SIXTEEN_LANES, EIGHT_LANES = "-D__AVX512F__=1", "-U__AVX512F__"  # either way compiles for any processor


def assert_gradients_close(step, reference, log_probabilities, labels):
    """The step's loss, count, gradients and statistics are those of the reference, a copy of the net in double."""
    loss = F.nll_loss(log_probabilities, labels)
    loss.backward()
    assert step.result[-2].item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    assert step.result[-1].item() == (log_probabilities.argmax(dim=1) == labels).sum().item()
    for (name, parameter), wanted in zip(step.net.named_parameters(), reference.parameters(), strict=True):
        if name in ("conv1.bias", "conv2.bias", "conv4.bias", "conv5.bias", "conv6.bias"):
            assert not parameter.grad.any()  # batch normalisation takes it away again; autograd finds noise
            continue
        # A value that rounding puts on the other side of a ReLU's edge moves a gradient by some thousandths.
        assert (parameter.grad - wanted.grad).norm() < 0.01 * wanted.grad.norm(), name
    for (name, buffer), wanted in zip(step.net.named_buffers(), reference.named_buffers(), strict=True):
        torch.testing.assert_close(buffer.double(), wanted[1].double(), rtol=1e-4, atol=1e-5, msg=name)


def batch(test_set, kind, size=32):
    """Images (size, 1, 28, 28) and labels (size,)."""
    images, labels = next(iter(script.Loader(test_set[0][:size], test_set[1][:size], size)))
    if kind == "ties":  # flat images, and flat parts: the windows of the max-pools are full of equal values
        images = torch.zeros(size, 1, 28, 28)
        images[: size // 2, :, 8:20, 8:20] = 1
    return images, labels


@pytest.mark.parametrize(
    ("kind", "size", "flag"),
    [
        ("fresh", 32, ""),
        ("trained", 32, ""),
        ("ties", 32, ""),
        ("trained", 16, ""),
        ("trained", 96, ""),
        pytest.param("trained", 32, SIXTEEN_LANES, marks=pytest.mark.slow),
        pytest.param("trained", 48, EIGHT_LANES, marks=pytest.mark.slow),
    ],
)
def test_gradients_and_statistics_are_autograds(test_set, monkeypatch, kind, size, flag):
    monkeypatch.setenv("CXX", f"{COMPILER} {flag}")
    net = script.Net() if kind == "fresh" else script.load_net(HERE / "assets" / "model.pt").train()
    net.drop1.p = net.drop2.p = 0.0
    reference, step = copy.deepcopy(net).double(), fast.CompiledStep(script.Step(net))
    assert step.lanes == {SIXTEEN_LANES: 16, EIGHT_LANES: 8}.get(flag, step.lanes)
    images, labels = batch(test_set, kind, size)
    for _ in range(2):  # a second time, on what the first has left in its memory
        reference.zero_grad()
        step.forward_backward(images, labels)
        assert_gradients_close(step, reference, reference(images.double()), labels)


def test_evaluation_is_the_networks_for_any_number_of_images(test_set):
    net = script.load_net(HERE / "assets" / "model.pt")
    step = fast.CompiledStep(script.Step(net))
    for size in (1, 31, 32, 100):
        images, _ = batch(test_set, "trained", size)
        torch.testing.assert_close(step.forward(images), net(images), rtol=1e-4, atol=1e-4)


def test_any_number_of_threads_gives_the_same_bits(test_set):
    images, labels = batch(test_set, "trained")
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        step = fast.CompiledStep(script.Step(script.Net()))
        step.forward_backward(images, labels)
        results.append((step.result.clone(), step.forward(images)))
    torch.set_num_threads(before)
    for result, log_probabilities in results[1:]:
        assert torch.equal(result, results[0][0])
        assert torch.equal(log_probabilities, results[0][1])


@pytest.fixture(scope="module")
def masks(tmp_path_factory):
    """masks(key, (C, H, W), images): what step.cpp's dropout at rate 0.1 keeps, as 0 or 1 / 0.9, (images, C, H, W)."""
    folder = tmp_path_factory.mktemp("masks")
    (folder / "masks.cpp").write_text(
        f'#include "{HERE / "step.cpp"}"\n'
        """extern "C" void masks(float rate, uint32_t key, int size, float* values) {
            const Dropout dropout(rate, key);
            for (int place = 0; place < size; place += LANES)
                for (int lane = 0; lane < LANES; lane++)
                    values[place + lane] = dropout.keeps(place)[lane] ? dropout.scale : 0;
        }"""
    )
    flags = "-std=c++20", "-shared", "-fPIC", "-o", folder / "masks.so", folder / "masks.cpp"
    subprocess.run([COMPILER, *flags], check=True, capture_output=True)
    library = ctypes.CDLL(str(folder / "masks.so"))

    def make(key, shape, images):
        values = torch.empty(*shape, images)
        size = values.numel()
        library.masks(ctypes.c_float(0.1), ctypes.c_uint32(key), size, ctypes.c_void_p(values.data_ptr()))
        return values.permute(3, 0, 1, 2)

    return make


def test_with_dropout_the_gradients_are_autograds_under_the_same_mask(test_set, masks):
    net = script.load_net(HERE / "assets" / "model.pt").train()
    reference, step = copy.deepcopy(net).double(), fast.CompiledStep(script.Step(net))
    images, labels = batch(test_set, "trained")
    keys = torch.randint(2**32, (2,), generator=torch.Generator().manual_seed(0)).tolist()
    torch.manual_seed(0)
    step.forward_backward(images, labels)
    reference.drop1.forward = lambda x: x * masks(keys[0], (20, 14, 14), 32)
    reference.drop2.forward = lambda x: x * masks(keys[1], (20, 7, 7), 32)
    assert_gradients_close(step, reference, reference(images.double()), labels)


def test_dropout_drops_a_tenth_at_random(masks):
    shape, images = (20, 14, 14), 256
    first, second = ((masks(key, shape, images) == 0).float() for key in (1234567, 1234568))
    n = first.numel()
    for dropped in (first, second):
        assert dropped.mean().item() == pytest.approx(0.1, abs=6 * (0.09 / n) ** 0.5)
        for dim in range(4):  # every slice along every axis has its share, and neighbours are independent
            rest = [axis for axis in range(4) if axis != dim]
            assert (dropped.mean(dim=rest) - 0.1).abs().max() < 6 * (0.09 * dropped.shape[dim] / n) ** 0.5
            both = dropped.narrow(dim, 1, dropped.shape[dim] - 1) * dropped.narrow(dim, 0, dropped.shape[dim] - 1)
            assert both.mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / both.numel()) ** 0.5)
    assert (first * second).mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / n) ** 0.5)  # steps and layers


def test_keys_are_drawn_anew_for_every_step_and_by_torchs_generator(test_set):
    images, labels = batch(test_set, "trained")
    step, results = fast.CompiledStep(script.Step(script.Net())), []
    for seed in (1, None, 1):
        if seed:
            torch.manual_seed(seed)
        step.forward_backward(images, labels)
        results.append(step.result.clone())
    assert not torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_ten_steps_are_those_of_the_eager_network(test_set):
    losses = {}
    for compiled in (True, False):
        torch.manual_seed(1)
        net, recipe, said = script.Net(), script.Recipe(compile=compiled), []
        net.drop1.p = net.drop2.p = 0.0
        step = script.make_step(net, recipe, said.append)
        assert said[0].startswith(f"step: {'compiled' if compiled else 'eager'}, float32, threads: ")
        optimizer, scheduler = script.make_optimizer(net, recipe, 100)
        losses[compiled] = []
        for _ in range(10):
            optimizer.zero_grad()
            losses[compiled].append(step.forward_backward(*batch(test_set, "trained"))[0].item())
            optimizer.step()
            scheduler.step()
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
    assert losses[True][-1] < 0.8 * losses[True][0]


def test_an_odd_last_batch_is_stepped_by_the_eager_network(test_set):
    batches = []
    for step in (fast.CompiledStep(script.Step(script.Net())), script.Step(script.Net())):
        step.net.load_state_dict(torch.load(HERE / "assets" / "model.pt", weights_only=True))
        torch.manual_seed(1)
        batches.append(step.forward_backward(*batch(test_set, "trained", 21)))
    assert batches[0] == batches[1]


@fault(
    "no C++ compiler, one that fails, no step.cpp, a network that was changed, a step that differs from autograd",
    "it trains with the eager step, and the log says why",
)
def test_without_a_step_that_can_be_trusted_it_trains_eagerly_and_says_why(tmp_path, monkeypatch):
    def said(net=script.Net, **recipe):
        lines = []
        script.make_step(net(), script.Recipe(**recipe), lines.append)
        (line,) = lines
        start = f"step: eager, float32, threads: {torch.get_num_threads()} ("
        assert line.startswith(start)
        return line.removeprefix(start).removesuffix(")")

    def with_another_pool():  # as a reader might try it
        net = script.Net()
        net.pool1 = torch.nn.AvgPool2d(2)
        return net

    def wider():
        net = script.Net()
        net.conv6, net.norm6 = torch.nn.Conv2d(20, 48, 3, padding=1), torch.nn.BatchNorm2d(48)
        net.conv7 = torch.nn.Conv2d(48, 10, 1)
        return net

    assert said(compile=False) == "--no-compile"
    assert said(with_another_pool) == "step.cpp and autograd differ"
    assert said(wider) == "step.cpp is for another network"
    assert "multiples of" in said(batch_size=33)
    assert "up to 1024" in said(batch_size=4096)
    monkeypatch.setenv("CXX", "'")
    assert said() == "No closing quotation"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no-such-compiler" in said()
    monkeypatch.setenv("CXX", f"{COMPILER} --no-such-flag")
    assert "no-such-flag" in said()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(fast, "SOURCE", tmp_path / "step.cpp")
    assert said().endswith("step.cpp: No such file or directory")
    wrong = (HERE / "step.cpp").read_text(encoding="utf-8").replace("total / 49.0f", "total / 48.0f")
    (tmp_path / "step.cpp").write_text(wrong, encoding="utf-8")
    assert said() == "step.cpp and autograd differ"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert said() == "there is no C++ compiler"


@pytest.mark.slow
def test_the_script_alone_in_a_folder_trains(tmp_path):
    shutil.copy(HERE / "script.py", tmp_path)
    code = "import script; load = script.load_mnist; script.load_mnist = lambda *a: tuple(p[:640] for p in load(*a));"
    code += f"raise SystemExit(script.main(['--epochs', '1', '--device', 'cpu', '--data-dir', {str(HERE / 'data')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "\nstep: eager, float32, threads: " in done.stdout
    assert "(No module named 'step')\n" in done.stdout
    assert len(list(tmp_path.glob("runs/*/*.png"))) == 0
    assert len(list(tmp_path.glob("runs/*/model.pt"))) == 1


SANITIZED = f"""
#include "{HERE / "step.cpp"}"
#include <cstdio>

int main() {{  // every buffer is as large as it must be, and no larger
    std::vector<std::vector<float>> weights, statistics;
    for (int size : {{90, 10, 10, 10, 1800, 20, 20, 20, 200, 10, 1800, 20, 20, 20, 3600, 20, 20, 20}})
        weights.emplace_back(size, 0.1f);
    for (int size : {{7200, 40, 40, 40, 400, 10}}) weights.emplace_back(size, 0.1f);
    for (int size : {{10, 10, 20, 20, 20, 20, 20, 20, 40, 40}}) statistics.emplace_back(size, 1.0f);
    const float* pointers[24];
    for (int i = 0; i < 24; i++) pointers[i] = weights[i].data();
    const Parameters& parameters = reinterpret_cast<const Parameters&>(pointers);
    int64_t batches[5] = {{}};
    Statistics running[5];
    for (int i = 0; i < 5; i++) running[i] = {{statistics[2 * i].data(), statistics[2 * i + 1].data(), batches + i}};
    std::vector<float> pixels(48 * 784, 0.5f), result(15442), output(37 * 10);
    std::vector<int64_t> labels(48, 9);
    for (int threads : {{1, 2, 5}}) {{
        step(parameters, running, pixels.data(), labels.data(), 48, 0.1f, 0.1f, 1, 2, threads, result.data());
        step(parameters, running, pixels.data(), nullptr, 37, 0, 0, 0, 0, threads, output.data());
    }}
    std::printf("%d batches, loss %f, last %f", int(batches[4]), result[15440], output[369]);
}}
"""


@pytest.mark.slow
@pytest.mark.parametrize("flag", [SIXTEEN_LANES, EIGHT_LANES])
def test_the_step_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path, flag):
    (tmp_path / "main.cpp").write_text(SANITIZED)
    sanitizers = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"
    line = [COMPILER, "-std=c++20", "-O1", "-pthread", flag, *sanitizers, "-o", "main", "main.cpp"]
    built = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:  # the sanitizers' libraries
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    batches, loss, last = re.fullmatch(r"(\d) batches, loss (\d\.\d+), last (-\d\.\d+)", done.stdout).groups()
    assert batches == "3"
    assert (float(loss), float(last)) == pytest.approx((math.log(10), -math.log(10)), abs=1e-5)  # all weights are equal
