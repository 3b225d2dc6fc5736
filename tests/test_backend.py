"""The suite of backend.cpp: against autograd in double precision, with its own dropout masks, and under sanitizers."""

import copy
import importlib
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import backend
import script
from script import HERE

COMPILER = next(filter(shutil.which, ("c++", "g++", "clang++")), None)
pytestmark = pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler")
# By the compiler's flags. For the widths that this processor lacks, the vectors are made of smaller ones.
LANES = {"-D__AVX512F__=1": 16, "-U__AVX512F__ -D__AVX__=1": 8, "-U__AVX512F__ -U__AVX__": 4}
WIDTHS = "", *(pytest.param(flags, marks=pytest.mark.slow) for flags in LANES)


def trained_net(activation=script.Recipe.activation):
    """The committed weights in training mode, with the activation they were trained with or another."""
    net = script.load_net(script.REFERENCE).train()
    net.set_extra_state(activation)
    return net


def compiled(net):
    """The compiled backend, without the check at the start."""
    return backend.CompiledBackend(script.EagerBackend(net))


def batch(test_set, size=32):
    """Images (size, 1, 28, 28) and labels (size,)."""
    return next(iter(script.Loader(test_set[0][:size], test_set[1][:size], size)))


@pytest.mark.parametrize("flags", WIDTHS)
@pytest.mark.parametrize("activation", script.ACTIVATIONS)
@pytest.mark.parametrize("kind", ["fresh", "ties", "trained"])
def test_gradients_and_statistics_are_autograds(test_set, monkeypatch, kind, activation, flags):
    monkeypatch.setenv("CXX", f"{COMPILER} {flags}".strip())
    net = script.Net(activation) if kind == "fresh" else trained_net(activation)
    rate = 0.1 if kind == "trained" else 0.0
    net.drop1.p = net.drop2.p = rate
    exact, tested = copy.deepcopy(net).double(), compiled(net)
    assert tested.lanes == LANES.get(flags, tested.lanes)
    for size in (96, 32, 16):  # each on what the last has left in its memory and in .grad
        images, labels = batch(test_set, size)
        if kind == "ties":  # flat images, and flat parts: the windows of the max-pools are full of equal values
            images = torch.zeros(size, 1, 28, 28)
            images[: size // 2, :, 8:20, 8:20] = 1
        torch.manual_seed(size)
        found = tested.forward_backward(images, labels)
        exact.drop1.forward = backend.dropout_mask(rate, tested.keys[0], (20, 14, 14), size).mul
        exact.drop2.forward = backend.dropout_mask(rate, tested.keys[1], (20, 7, 7), size).mul
        exact.zero_grad()
        log_probabilities = exact(images.double())
        loss = F.nll_loss(log_probabilities, labels)
        loss.backward()
        right = (log_probabilities.argmax(dim=1) == labels).sum().item()
        assert found == pytest.approx((loss.item(), right), rel=1e-5, abs=1e-6)
        for (name, parameter), wanted in zip(net.named_parameters(), exact.parameters(), strict=True):
            if name in ("conv1.bias", "conv2.bias", "conv4.bias", "conv5.bias", "conv6.bias"):
                assert not parameter.grad.any()  # batch normalisation subtracts it again; autograd finds noise
            else:  # a value that rounding moves over an activation's edge changes a gradient by some thousandths
                assert (parameter.grad - wanted.grad).norm() < 0.01 * wanted.grad.norm(), name
        for buffer, wanted in zip(net.buffers(), exact.buffers(), strict=True):
            torch.testing.assert_close(buffer.double(), wanted.double(), rtol=1e-4, atol=1e-5)


def test_any_number_of_images_is_scored_and_what_it_is_not_made_for_goes_to_the_eager_backend(test_set):
    backends, results = (compiled(trained_net()), script.EagerBackend(trained_net())), []
    for either in backends:
        either.net.eval()
        scored = [either.forward(batch(test_set, size)[0]) for size in (1, 31, 32, 100)]
        torch.manual_seed(1)
        eager = [torch.tensor(either.forward_backward(*batch(test_set)))]  # in evaluation mode
        either.net.train()
        eager.append(either.forward(batch(test_set)[0]))
        larger = nn.functional.pad(batch(test_set)[0], (2, 2, 2, 2))  # 32x32
        eager += [either.forward(larger), torch.tensor(either.forward_backward(larger, batch(test_set)[1]))]
        for _ in range(2):  # an epoch's last batch; no gradient accumulates
            eager.append(torch.tensor(either.forward_backward(*batch(test_set, 21))))
        results.append((scored, eager + [parameter.grad for parameter in either.net.parameters()]))
    (scored, eager), (scored_eagerly, wanted) = results
    torch.testing.assert_close(scored, scored_eagerly, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(eager, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("flags", WIDTHS)
def test_the_seed_alone_gives_the_bits_and_each_batch_draws_its_own_masks(test_set, monkeypatch, flags):
    monkeypatch.setenv("CXX", f"{COMPILER} {flags}".strip())
    images, labels = batch(test_set)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(1)
        tested = compiled(script.Net())
        tested.forward_backward(images, labels)
        first = tested.result.clone()
        tested.forward_backward(images, labels)  # with the same weights, but other masks
        assert not torch.equal(tested.result, first)
        tested.net.eval()
        results.append(torch.cat((first, tested.forward(images).flatten())))
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], result) for result in results)


def test_dropout_drops_a_tenth_at_random():
    first, second = ((backend.dropout_mask(0.1, key, (20, 14, 14), 256) == 0).float() for key in (1234567, 1234568))
    n = first.numel()
    for dropped in (first, second):
        assert dropped.mean().item() == pytest.approx(0.1, abs=6 * (0.09 / n) ** 0.5)
        for dim in range(4):  # every slice along every axis has its share, and neighbours are independent
            slices = dropped.transpose(0, dim).flatten(1)
            assert (slices.mean(dim=1) - 0.1).abs().max() < 6 * (0.09 / slices.shape[1]) ** 0.5
            both = slices[1:] * slices[:-1]
            assert both.mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / both.numel()) ** 0.5)
    assert (first * second).mean().item() == pytest.approx(0.01, abs=6 * (0.0099 / n) ** 0.5)  # batches and layers


def test_the_faster_backend_is_chosen_and_choosing_changes_nothing_in_a_run(monkeypatch):
    net, seconds = script.Net(), {"compiled": 1.0, "eager": 2.0}
    monkeypatch.setattr(backend, "timeit", lambda run, number: seconds[run.func.__self__.kind])
    state = copy.deepcopy([*net.parameters(), *net.buffers()]), torch.get_rng_state()
    assert script.make_backend(script.EagerBackend(net), script.Recipe())[0].kind == "compiled"
    assert script.make_backend(script.EagerBackend(net), script.Recipe(), "eager")[0].kind == "eager"  # as it began
    seconds["compiled"] = 3.0
    chosen, reason = script.make_backend(script.EagerBackend(net), script.Recipe())
    assert (chosen.kind, reason) == ("eager", "compiled is slower: 3000.0 ms a batch, eager 2000.0")
    assert script.make_backend(script.EagerBackend(net), script.Recipe(), "compiled")[0].kind == "compiled"
    torch.testing.assert_close(([*net.parameters(), *net.buffers()], torch.get_rng_state()), state, rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in net.parameters())


def test_one_batch_that_rounding_decides_does_not_cost_the_compiled_backend(monkeypatch):
    run, calls = backend.CompiledBackend.forward_backward, []

    def rounded(self, images, labels):
        calls.append(images)
        loss, right = run(self, images, labels)
        return loss * (1.1 if len(calls) == 1 else 1), right

    monkeypatch.setattr(backend.CompiledBackend, "forward_backward", rounded)
    assert script.make_backend(script.EagerBackend(script.Net()), script.Recipe(), "compiled")[0].kind == "compiled"
    assert len(calls) > 1
    assert not torch.equal(*calls[:2])


@pytest.mark.slow
def test_without_a_backend_that_can_be_trusted_it_trains_eagerly_and_says_why(tmp_path, monkeypatch):
    def said(net=None, **recipe):
        chosen, reason = script.make_backend(script.EagerBackend(net or script.Net()), script.Recipe(**recipe))
        assert chosen.kind == "eager"
        return reason

    average_pool, channel_dropout, wider, frozen, grouped = (script.Net() for _ in range(5))  # as a reader might try
    average_pool.pool1 = nn.AvgPool2d(2)
    channel_dropout.drop1 = nn.Dropout2d(0.1)
    frozen.conv1.requires_grad_(False)
    grouped.norm6 = nn.GroupNorm(5, 40)  # as many parameters, and no running statistics
    wider.conv6, wider.norm6, wider.conv7 = nn.Conv2d(20, 48, 3, padding=1), nn.BatchNorm2d(48), nn.Conv2d(48, 10, 1)
    for net in (average_pool, channel_dropout):
        assert "autograd differ" in said(net)
    for net in (wider, frozen, grouped):
        assert "own network" in said(net)
    assert "multiples of" in said(batch_size=33)
    assert "up to 1024" in said(batch_size=4096)
    reasons = {"'": "No closing quotation", "no-such": "no-such", f"{COMPILER} --no-such-flag": "no-such-flag"}
    for compiler, reason in reasons.items():
        monkeypatch.setenv("CXX", compiler)
        assert reason in said()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(backend, "SOURCE", tmp_path / "backend.cpp")
    assert "No such file" in said()
    source = (HERE / "backend" / "backend.cpp").read_text(encoding="utf-8")
    wrong = source.replace("total / area", "total / 44.0f")
    (tmp_path / "backend.cpp").write_text(wrong, encoding="utf-8")
    assert "autograd differ" in said()
    (tmp_path / "hangs").write_text("sleep 30 & wait")  # in a process of its own, as compilers work
    monkeypatch.setenv("CXX", f"sh {tmp_path / 'hangs'}")
    monkeypatch.setattr(backend, "MOST_SECONDS", 0.5)
    assert "took more than 0.5 s" in said()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    assert "there is no C++ compiler" in said()


def test_code_that_is_added_to_the_eager_backend_runs(tmp_path, monkeypatch):
    text, line = (HERE / "script.py").read_text(encoding="utf-8"), "        loss.backward()\n"
    assert text.count(line) == 1
    added = "        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)\n"
    (tmp_path / "changed.py").write_text(text.replace(line, line + added), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    changed = importlib.import_module("changed")
    backend, reason = changed.make_backend(changed.EagerBackend(changed.Net()), changed.Recipe())
    assert (backend.kind, reason) == ("eager", "EagerBackend or Net was changed")


@pytest.mark.slow
def test_the_script_alone_in_a_folder_trains(tmp_path):
    shutil.copy(HERE / "script.py", tmp_path)
    code = "import script; load = script.load_mnist; script.load_mnist = lambda *a: tuple(p[:640] for p in load(*a));"
    code += f"raise SystemExit(script.main(['--epochs', '1', '--device', 'cpu', '--data-dir', {str(HERE / 'data')!r}]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\nbackend: eager, float32, threads: \d+ \(No module named 'backend'\)\n", done.stdout)
    assert "\nno pictures: No module named 'pictures'\nno page: No module named 'page'\n" in done.stdout
    assert list(tmp_path.glob("runs/*/model.pt"))


SANITIZED = """
#include "backend.cpp"

int main() {  // every buffer is as large as it must be, and no larger
    std::vector<std::vector<float>> buffers;
    for (int size : {SIZES}) buffers.emplace_back(size, 0.1f);
    std::vector<float*> pointers;
    for (auto& buffer : buffers) pointers.push_back(buffer.data());
    const auto running = reinterpret_cast<const Statistics*>(pointers.data());
    std::vector<float> parameters(sizeof(Parameters) / 4, 0.1f), result(sizeof(Result) / 4);
    std::vector<float> pixels(48 * 784, 0.5f), output(37 * 10);
    const auto& p = reinterpret_cast<const Parameters&>(parameters[0]);
    std::vector<int64_t> labels(48, 9);
    std::vector<Block> blocks(48 / LANES);
    for (int threads : {1, 2, 6}) {
        run_batch(blocks.data(), p, running, pixels.data(), labels.data(), 48, 0.1, 0.1, 1, 2, threads, result.data());
        run_batch(blocks.data(), p, running, pixels.data(), nullptr, 37, 0, 0, 0, 0, threads, output.data());
    }
    return std::abs(result[parameters.size()] - std::log(10.0f)) > 1e-5f;  // the loss, where all weights are equal
}
"""


@pytest.mark.slow
@pytest.mark.parametrize("flags", LANES)
def test_it_is_clean_under_address_and_undefined_behaviour_sanitizers(tmp_path, flags):
    sizes = [buffer.nbytes // 4 for buffer in script.Net().buffers()]
    (tmp_path / "main.cpp").write_text(SANITIZED.replace("SIZES", str(sizes).strip("[]")))
    line = [COMPILER, "-std=c++20", "-O1", "-pthread", "-I", backend.SOURCE.parent, *flags.split(), "-DHARDSWISH"]
    line += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-o", "main", "main.cpp"]
    built = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "cannot find" in built.stderr:  # the sanitizers' libraries
        pytest.skip("this compiler has no sanitizers")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([tmp_path / "main"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
