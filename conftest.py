"""The fixtures of all suites, and their order."""

import pytest
import torch

import script
from script import HERE
from tests.helpers import CPU


def pytest_collection_modifyitems(items):
    """The whole run, which takes minutes, comes last."""
    items.sort(key=lambda item: item.name.startswith("test_accuracy_above"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def train_set():
    """The 60,000 training images and labels."""
    return script.load_mnist(HERE / "data", True, CPU)


@pytest.fixture(scope="session")
def test_set():
    """The 10,000 test images and labels."""
    return script.load_mnist(HERE / "data", False, CPU)


@pytest.fixture(scope="session")
def first_images(train_set, test_set):
    """What stands in for script.load_mnist: the first 960 images of each set, without reading it anew."""
    return lambda data_dir, train, device: tuple(part[:960] for part in (train_set if train else test_set))


@pytest.fixture
def few_images(monkeypatch, first_images):
    """Let script.py see the first 960 images of each set only, so that an epoch takes a second."""
    monkeypatch.setattr(script, "load_mnist", first_images)
