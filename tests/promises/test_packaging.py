"""What is built and installed, what it depends on, and which module may import which."""

import ast
import configparser
import importlib
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

import ddpm_hf
from tests.support import ROOT

PACKAGE = ROOT / "ddpm_hf"
SCRIPTS = sorted(ROOT.glob("train_*.py"))

# distribution -> what it is imported as, where the two differ
IMPORT_NAMES = {"pillow": "PIL", "pyyaml": "yaml", "scikit-learn": "sklearn", "pytest-xdist": "xdist"}


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def distributions(text):
    """The names in a list of requirements, lower-case."""
    names = [re.split(r"[\[<>=!~; ]", line.strip())[0] for line in text.splitlines()]
    return {name.lower().replace("_", "-") for name in names if name and not name.startswith("#")}


def required(setup_cfg):
    """The distributions that the package needs, and those of its extras."""
    extras = "\n".join(setup_cfg["options.extras_require"].values())
    return distributions(setup_cfg["options"]["install_requires"]), distributions(extras)


# Modules and what they import


def module_of(path):
    """The dotted name of a file of the package, or of a script."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in [*sorted(PACKAGE.rglob("*.py")), *SCRIPTS]}


def imports_of(module):
    """All modules that a module's source imports, anywhere in it, as absolute dotted names."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in FILES)}
    return found


def own_imports(module):
    """Those of the package and the scripts; importing a package itself, such as `ddpm_hf`, says nothing."""
    return {name for name in imports_of(module) if name in FILES and name != "ddpm_hf"} - {module}


def unit(module):
    """The part of the house that a module belongs to: a file, or a folder such as `ddpm_hf.training`."""
    return ".".join(module.split(".")[:2])


# What each package imports of the others, a floor after the other
FLOORS = {
    "common": "",
    "portable": "",
    "objectives": "common portable",
    "models": "common objectives portable",
    "inference": "common models portable",
    "restoration": "common inference portable",
    "training": "common",
    "data": "common training",
    "evaluation": "common inference objectives portable training",
    "publishing": "common evaluation inference models portable restoration training",
    "latents": "common data models objectives portable training",
    "few_steps": "common evaluation models objectives portable",
    "ablation": "common evaluation training",
    "text": "common data inference latents models objectives portable training",
}
ROOTS = {"ddpm_hf", "ddpm_hf._version", "ddpm_hf.functional", "ddpm_hf.__main__"}
TOP = {"ddpm_hf.cli", "ddpm_hf.__main__", *(path.stem for path in SCRIPTS)}
DIFFUSION = {f"ddpm_hf.{name}" for name in ("portable", "objectives", "models", "inference", "evaluation", "latents")}
MATH = [
    "ddpm_hf.objectives.gaussians",
    "ddpm_hf.objectives.bound",
    "ddpm_hf.objectives.losses",
    "ddpm_hf.portable.coefficients_ddpm_hf",
    "ddpm_hf.portable.scheduling_ddpm_hf",
]


def test_the_house_is_where_it_is_looked_for():
    """Else the tests below look at nothing."""
    assert {"ddpm_hf.training.loop", "ddpm_hf.cli", "train_unconditional", *MATH} <= set(FILES)
    assert {unit(module) for module in FILES} == {f"ddpm_hf.{name}" for name in FLOORS} | ROOTS | TOP
    assert "ddpm_hf.objectives.gaussians" in own_imports("ddpm_hf.objectives.losses")
    assert "ddpm_hf.training.loop" in own_imports("train_unconditional")
    assert "torch" in imports_of("ddpm_hf.objectives.gaussians")


def test_every_package_imports_those_below_it_that_the_table_names():
    """Else two packages need each other, and neither can be read alone."""
    below = set()
    for name, imported in FLOORS.items():
        inside = [module for module in FILES if unit(module) == f"ddpm_hf.{name}"]
        found = {unit(other) for module in inside for other in own_imports(module)} - {"ddpm_hf._version"}
        assert found - {f"ddpm_hf.{name}"} == {f"ddpm_hf.{one}" for one in imported.split()}
        assert set(imported.split()) <= below
        below.add(name)


def test_contributing_shows_the_floors():
    """Else a newcomer learns another house."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d \| `(\w+)` \| (.*?) ?\|$", text, re.M)
    shown = {name: imported.replace("`", "") for name, imported in rows}
    assert shown == {**FLOORS, "cli": "any of these"}


def test_no_two_files_import_each_other():
    """Else neither can be read alone; a package's `__init__`, which hands names on, is left out."""
    below = {module: own_imports(module) for module, path in FILES.items() if path.name != "__init__.py"}
    while below:
        ground = {name for name, needs in below.items() if not needs & set(below)}
        assert ground, f"a circle among {sorted(below)}"
        below = {name: needs for name, needs in below.items() if name not in ground}


@pytest.mark.parametrize("module", [module for module in FILES if module != "ddpm_hf"])
def test_nothing_imports_the_top(module):
    """Else the command or a script becomes a library."""
    assert not {unit(name) for name in own_imports(module)} & (
        TOP - {unit(module)} if module != "ddpm_hf.__main__" else set()
    )


@pytest.mark.parametrize("module", [module for module in FILES if unit(module) == "ddpm_hf.training"])
def test_training_knows_no_diffusion(module):
    """Else the loop cannot train anything else, and the math creeps into it."""
    assert not {unit(name) for name in own_imports(module)} & DIFFUSION
    for name in imports_of(module):
        assert not name.startswith(("diffusers.schedulers", "diffusers.pipelines"))


@pytest.mark.parametrize("module", [module for module in FILES if unit(module) == "ddpm_hf.training"])
def test_training_has_no_words_of_diffusion_or_of_the_hub(module):
    """Else what the loop knows of one kind of model is in the way of the next."""
    words = r"unet|vae|text_encoder|timesteps?|prediction_type|loss_q|_q\d?|hub|hub_\w+|push_to_hub|publish\w*"
    assert not re.findall(rf"(?i)(?<![a-z])(?:{words})(?![a-z-])", FILES[module].read_text(encoding="utf-8"))


@pytest.mark.parametrize("module", MATH)
def test_the_math_knows_no_accelerate(module):
    """Else a formula cannot be used without a training run around it."""
    seen, pending = set(), {module}
    while pending:  # also what its own imports import
        name = pending.pop()
        seen.add(name)
        assert not {imported.split(".")[0] for imported in imports_of(name)} & {"accelerate", "datasets"}
        pending |= own_imports(name) - seen


def test_no_folder_is_called_as_a_pipeline_of_diffusers():
    """Diffusers takes a component below such a folder for its own, and records it wrongly."""
    folders = {path.name for path in PACKAGE.rglob("*") if path.is_dir()}
    assert not folders & {"ddpm", "ddim", "dit", "latent_diffusion", "stable_diffusion"}


DIFFUSERS_NAMES = {"_compatibles", "_execution_device", "_optional_components"}  # which its subclasses set


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def private_names(tree):
    """The private functions, classes, variables and attributes that a module defines."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def test_private_names_stay_in_their_file():
    """Else a file cannot be changed without reading all others."""
    trees = {module: ast.parse(path.read_text(encoding="utf-8")) for module, path in FILES.items()}
    defined = {module: private_names(tree) for module, tree in trees.items()}
    assert "_set_chain" in defined["ddpm_hf.portable.scheduling_ddpm_hf"]
    everywhere = set().union(*defined.values()) - DIFFUSERS_NAMES
    for module, tree in trees.items():
        foreign = everywhere - defined[module]
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                assert node.attr not in foreign, f"{module}:{node.lineno} uses {node.attr}"
            elif isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("ddpm_hf")):
                names = [alias.name for alias in node.names if is_private(alias.name) and alias.name != "_version"]
                assert not names, f"{module}:{node.lineno} imports {names}"


# Dependencies


# For machines with a GPU: the flag that wants one says how to install it
OFFERED = {"bitsandbytes"}
# A Space brings it, by the version that its README names; it wants an older Pillow than the rest is tested with
PAGES, OF_SPACES = "ddpm_hf.publishing.space.", {"gradio"}


def test_what_is_imported_is_declared(setup_cfg):
    """Else an import works only as long as some other package happens to bring it."""
    base, extras = required(setup_cfg)
    declared = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in base | extras}
    for module in FILES:
        roots = {name.split(".")[0] for name in imports_of(module)}
        undeclared = roots - set(sys.stdlib_module_names) - declared - OFFERED
        undeclared -= {"ddpm_hf", *(path.stem for path in SCRIPTS), *(OF_SPACES if module.startswith(PAGES) else ())}
        assert not undeclared, f"{module} imports {', '.join(sorted(undeclared))}"


def test_every_dependency_has_a_tested_version(setup_cfg):
    """Else an installation with the constraints gets a version that nobody has tried."""
    pinned = dict(line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().split())
    pinned = {name.replace("_", "-"): version for name, version in pinned.items()}
    base, extras = required(setup_cfg)
    assert base | extras <= set(pinned)
    text = setup_cfg["options"]["install_requires"] + "\n".join(setup_cfg["options.extras_require"].values())
    for name, least in re.findall(r"^\s*([\w-]+)(?:\[\w+\])?>=([\d.]+)$", text, re.M):
        tested = [int(part) for part in re.findall(r"\d+", pinned[name.lower().replace("_", "-")])]
        assert tested >= [int(part) for part in least.split(".")], f"{name}: tested below what is required"


# The package


def test_the_version_is_stated_once(setup_cfg):
    """Else a release has two versions."""
    assert setup_cfg["metadata"]["version"] == "attr: ddpm_hf._version.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", ddpm_hf.__version__)
    stating = [
        path
        for path in [*PACKAGE.rglob("*.py"), *SCRIPTS, ROOT / "setup.cfg", ROOT / "pyproject.toml"]
        if re.search(rf"""(?<![\d.=]){re.escape(ddpm_hf.__version__)}(?![\d.])""", path.read_text(encoding="utf-8"))
    ]
    assert stating == [PACKAGE / "_version.py"]


def test_public_names_resolve():
    """Else `from ddpm_hf import X` fails for a name that the package promises."""
    assert {"DDPMScheduler", "DDPMPipeline", "BETA_SCHEDULES", "__version__"} <= set(ddpm_hf.__all__)
    for name in ddpm_hf.__all__:
        assert getattr(ddpm_hf, name) is not None
        assert name in dir(ddpm_hf)
    assert "DDPMNothing" not in dir(ddpm_hf)
    with pytest.raises(AttributeError, match="DDPMNothing"):
        ddpm_hf.DDPMNothing  # noqa: B018
    for module in FILES:
        if module.startswith("ddpm_hf."):
            importlib.import_module(module)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in the built wheel, and its metadata."""
    pytest.importorskip("setuptools", reason="builds with this environment's setuptools")
    where = tmp_path_factory.mktemp("wheel")
    source = where / "source"  # a copy, for building leaves its traces
    source.mkdir()
    for folder in ("ddpm_hf", "tests", "benchmarks"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in [*SCRIPTS, *(ROOT / name for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"))]:
        shutil.copy(path, source)
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--quiet"]
    done = subprocess.run([*command, "--wheel-dir", str(where)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = where.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package(wheel):
    """Else an installed package lacks a module, or the code that it is to copy into published folders."""
    for path in [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed", PACKAGE / "publishing/space/requirements.txt"]:
        assert wheel[str(path.relative_to(ROOT))] == path.read_bytes()
    for path in SCRIPTS:
        assert path.name in wheel
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"ddpm_hf", *(path.name for path in SCRIPTS)}  # no tests, no stray folders


def test_the_wheel_declares_the_command_and_the_extras(wheel):
    """Else `pip install` gives no `ddpm-hf`, or `ddpm_hf[demo]` brings nothing."""
    info = {name.split("/")[1]: text.decode() for name, text in wheel.items() if ".dist-info/" in name and text}
    assert re.search(r"\[console_scripts\]\s+ddpm-hf = ddpm_hf\.cli:main", info["entry_points.txt"])
    assert f"Version: {ddpm_hf.__version__}" in info["METADATA"]
    assert re.search(r"^License(-Expression)?: Apache-2.0$", info["METADATA"], re.M)
    assert re.search(r'Requires-Dist: mlxtend.*extra == "demo"', info["METADATA"])
    assert "# " in info["METADATA"]  # the README


# Lengths


def test_no_file_is_too_long_to_be_read():
    """Else files grow by what belongs elsewhere."""
    files = [*SCRIPTS, *PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert {name: count for name, count in lines.items() if count > 600} == {}
