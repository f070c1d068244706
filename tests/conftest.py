"""Fixtures that every test may use."""

import mlx.core as mx
import pytest

from metal_host import HostMetal
from mlx_adagrad.update import kernels, ops, step

MLX_METAL_KERNEL, MLX_COMPILE = mx.fast.metal_kernel, mx.compile
AVAILABLE, REQUIRE = kernels.available, kernels.require


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
def compiling():
    """For a test that is about ``mx.compile``, in a module that is else ``op_by_op``."""


@pytest.fixture
def op_by_op(request):
    """``mx.compile`` changes nothing: on a CPU every new kernel takes about a second to build."""
    if "compiling" in request.fixturenames:
        yield
        return
    mx.disable_compile()
    yield
    mx.enable_compile()


@pytest.fixture
def host(monkeypatch):
    """Kernels run on the host, from the source that MLX generates for Metal, with every access checked and counted."""
    if mx.metal.is_available():
        pytest.skip("accesses are counted where kernels run on the host; here they run on Metal")
    host = HostMetal()
    monkeypatch.setattr(kernels, "available", lambda: True)
    monkeypatch.setattr(kernels, "require", lambda: None)
    with host.patched():
        forget_compiled()
        yield host
    forget_compiled()


def forget_compiled() -> None:
    """Let kernels and compiled functions be made anew, by what stands in ``mx.fast`` and ``mx.compile`` then."""
    for made in (kernels.kernel, kernels.launches, ops.functions, step._fixed):
        made.cache_clear()


@pytest.fixture
def kernel_device(request):
    """Kernels run: on Metal where there is one, else on the host."""
    if not mx.metal.is_available():
        request.getfixturevalue("host")


@pytest.fixture
def no_host(kernel_device):
    """Kernels are MLX's own again inside a module that runs them on the host: without Metal none can run."""
    with pytest.MonkeyPatch.context() as patch:  # undone before the host is, or the host would stay for ever
        patch.setattr(mx.fast, "metal_kernel", MLX_METAL_KERNEL)
        patch.setattr(kernels, "available", AVAILABLE)
        patch.setattr(kernels, "require", REQUIRE)
        patch.setattr(mx, "compile", MLX_COMPILE)
        forget_compiled()
        yield
