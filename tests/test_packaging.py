"""The package as users get it: every way of installing it finds the Metal sources, and importing it is cheap."""

import ast
import json
import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mlx_adagrad"
SETUPTOOLS = ("setuptools", "setuptools-*.dist-info", "_distutils_hack")
# One worker builds what these tests share.
pytestmark = pytest.mark.xdist_group("packaging")

# Runs in the fresh environment: reports what is installed, and takes one step with the kernel in it
# (recorded by an export where there is no GPU), for which the library reads its Metal sources itself.
PROBE = """
import json, sys
from importlib.metadata import version
from importlib.resources import files
import mlx.core as mx
import mlx_adagrad

w = {"w": mx.ones((16,))}
optimizer = mlx_adagrad.Adagrad(0.5, fused=True)
optimizer.init(w)
step = lambda g: optimizer.apply_gradients({"w": g}, w)["w"]
if mx.metal.is_available():
    mx.eval(step(mx.ones((16,))))
else:
    mx.export_function(sys.argv[1], step, mx.ones((16,)))
metal = files("mlx_adagrad") / "metal"
print(json.dumps({
    "file": mlx_adagrad.__file__,
    "version": mlx_adagrad.__version__,
    "metal": {f.name: f.read_text() for f in metal.iterdir() if f.name.endswith(".metal")},
    "typed": (files("mlx_adagrad") / "py.typed").is_file(),
    "numpy": "numpy" in sys.modules,
}))
"""


class Environment:
    """A fresh environment that sees nothing but itself and the packages borrowed from this one."""

    def __init__(self, folder: Path, *borrowed: str) -> None:
        venv.create(folder)
        self.python = folder / "bin" / "python"
        self.elsewhere = folder / "elsewhere"
        self.elsewhere.mkdir()
        lent = folder / "lent"
        lent.mkdir()
        for found in (path for pattern in borrowed for path in installed(pattern)):
            (lent / found.name).symlink_to(found)
        (purelib(self.python) / "lent.pth").write_text(f"{lent}\n")

    def pip(self, *arguments: object) -> None:
        run(sys.executable, "-m", "pip", "--python", self.python, *arguments, cwd=self.elsewhere)

    def probe(self, path: Path | None = None) -> dict:
        """What PROBE reports, run in another directory; `path` is put on the Python path."""
        extra = {} if path is None else {"PYTHONPATH": str(path)}
        out = run(self.python, "-c", PROBE, self.elsewhere / "step.mlxfn", cwd=self.elsewhere, **extra)
        return json.loads(out.splitlines()[-1])


def run(*command: object, cwd: Path, **extra: str) -> str:
    """Standard output of a command that succeeds, without the Python settings of this process."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")} | extra
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def purelib(python: Path) -> Path:
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=ROOT).strip())


def installed(pattern: str) -> list[Path]:
    """What this environment has of a package."""
    return [path for folder in site.getsitepackages() for path in Path(folder).glob(pattern)]


def metal_sources() -> dict[str, str]:
    return {f.name: f.read_text() for f in (ROOT / "metal").glob("*.metal")}


def declared_version() -> str:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assignments = (n for n in tree.body if isinstance(n, ast.Assign))
    return next(ast.literal_eval(n.value) for n in assignments if ast.unparse(n.targets[0]) == "__version__")


def check(report: dict, home: Path) -> None:
    """The installation is the one under `home`, complete, and its kernel could be built."""
    assert Path(report["file"]).resolve().is_relative_to(home.resolve())
    assert report["metal"] == metal_sources() and report["metal"]
    assert report["version"] == declared_version()
    assert report["typed"]
    assert not report["numpy"], "mlx is the only dependency"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the build reads, so that building leaves the real one clean."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("mlx_adagrad", "metal"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignore)
    return folder


@pytest.fixture(scope="module")
def builder(tmp_path_factory) -> Environment:
    """An environment with setuptools and nothing else, MLX included."""
    return Environment(tmp_path_factory.mktemp("builder"), *SETUPTOOLS)


@pytest.fixture(scope="module")
def wheel(builder, checkout, tmp_path_factory) -> Path:
    return build_wheel(builder, checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(builder, checkout, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    build = "import sys, setuptools.build_meta as build; build.build_sdist(sys.argv[1])"
    run(builder.python, "-c", build, folder, cwd=checkout)
    return next(folder.glob("*.tar.gz"))


def build_wheel(builder: Environment, source: Path, folder: Path) -> Path:
    builder.pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    return next(folder.glob("*.whl"))


def install_and_check(wheel: Path, folder: Path) -> None:
    environment = Environment(folder, "mlx")
    environment.pip("install", "--no-deps", "--no-index", wheel)
    check(environment.probe(), folder)


def test_wheel(wheel, tmp_path):
    install_and_check(wheel, tmp_path)


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    python = {p.relative_to(ROOT).as_posix() for p in PACKAGE.rglob("*.py")}
    metal = {f"mlx_adagrad/metal/{name}" for name in metal_sources()}
    assert names == python | metal | {"mlx_adagrad/py.typed"}


def test_wheel_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    always = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    assert (metadata["Name"], metadata["Version"]) == ("mlx-adagrad", declared_version())
    assert always == ["mlx>=0.32.1"]
    assert metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "MIT"
    assert {"cpu", "examples", "dev", "benchmarks", "lm"} <= set(metadata.get_all("Provides-Extra", []))
    scripts = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert "mlx-adagrad = mlx_adagrad.lm.__main__:main" in scripts


def test_sdist(builder, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        assert not [m.name for m in archive.getmembers() if m.issym() or m.islnk()]
    install_and_check(build_wheel(builder, sdist, tmp_path / "wheel"), tmp_path / "environment")


def test_wheel_from_an_archive_without_links(builder, checkout, tmp_path):
    """A .zip of a repository, which pip unpacks with links turned into text files."""
    source = tmp_path / "repository.zip"
    with zipfile.ZipFile(source, "w") as archive:
        for path in (p for p in checkout.rglob("*") if p.is_file() and "mlx_adagrad/metal" not in p.as_posix()):
            archive.write(path, Path("repository", path.relative_to(checkout)))
        archive.writestr("repository/mlx_adagrad/metal", "../metal")
    install_and_check(build_wheel(builder, source, tmp_path / "wheel"), tmp_path / "environment")


def test_editable(checkout, tmp_path):
    environment = Environment(tmp_path, "mlx")
    environment.pip("install", "--no-deps", "--editable", checkout)
    check(environment.probe(), checkout)


def test_editable_without_build_isolation(checkout, tmp_path):
    environment = Environment(tmp_path, "mlx", *SETUPTOOLS)
    environment.pip("install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", checkout)
    check(environment.probe(), checkout)


def test_bare_checkout_on_the_path(checkout, tmp_path):
    check(Environment(tmp_path, "mlx").probe(checkout), checkout)


def test_import_costs_little_over_mlx(tmp_path):
    """Processor time, so that a busy machine does not count; the first of the runs writes the bytecode."""
    code = """
import time, mlx.optimizers
start = time.process_time()
import mlx_adagrad
print(1000 * (time.process_time() - start))
"""
    bytecode = {"PYTHONPATH": str(ROOT), "PYTHONPYCACHEPREFIX": str(tmp_path)}
    milliseconds = [float(run(sys.executable, "-c", code, cwd=tmp_path, **bytecode)) for _ in range(8)]
    assert min(milliseconds) <= 30


def test_import_never_touches_metal_or_other_frameworks():
    """Every module of the package is imported while MLX refuses all work."""
    code = """
import pkgutil, sys
import mlx.core as mx, mlx.nn, mlx.optimizers

def refuse(*args, **kwargs):
    raise RuntimeError("work done on import")

mx.fast.metal_kernel = mx.metal.is_available = mx.default_device = mx.eval = refuse
import mlx_adagrad
for module in pkgutil.walk_packages(mlx_adagrad.__path__, "mlx_adagrad."):
    __import__(module.name)
print(sorted(sys.modules))
"""
    modules = set(ast.literal_eval(run(sys.executable, "-c", code, cwd=ROOT, PYTHONPATH=str(ROOT))))
    assert "mlx_adagrad.update.kernels" in modules
    assert not modules & {"mlx_lm", "numpy", "torch", "keras", "tensorflow", "mindspore", "jax", "optax"}
