"""Fixtures that every test may use."""

import mlx.core as mx
import pytest

from metal_host import HostMetal
from mlx_adagrad import kernels


@pytest.fixture(autouse=True)
def _seeded():
    mx.random.seed(0)


@pytest.fixture
def cpu():
    """The CPU as the default device: fp64 lives only there."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def host(monkeypatch):
    """Kernels run on the host, from the source that MLX generates for Metal, with every access checked and counted."""
    if mx.metal.is_available():
        pytest.skip("accesses are counted where kernels run on the host; here they run on Metal")
    host = HostMetal()
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "require", lambda: None)
    with host.patched():
        kernels._kernel.cache_clear()
        yield host
    kernels._kernel.cache_clear()


@pytest.fixture
def kernel_device(request):
    """Kernels run: on Metal where there is one, else on the host."""
    if not mx.metal.is_available():
        request.getfixturevalue("host")
