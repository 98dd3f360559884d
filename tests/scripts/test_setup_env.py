"""The environment's set-up: which torch it takes, what it installs, what it leaves alone."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from scripts import setup_env

GPU_LINE = "GPU 0: NVIDIA H200 (UUID: GPU-0)"


def program(path: Path, body: str) -> Path:
    """Write an executable shell script."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def package(site: Path, name: str, version: str, code: str = "") -> None:
    """Put an importable package and its metadata into a folder."""
    (site / name).mkdir(parents=True)
    (site / name / "__init__.py").write_text(f"__version__ = {version!r}\n{code}")
    metadata = site / f"{name}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def wheel(folder: Path, name: str, version: str, needs: str = "") -> None:
    """Write the smallest wheel that pip installs."""
    info = f"{name}-{version}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def gpu_host(tmp_path: Path) -> Path:
    """The Python of a virtual environment with a torch of its own that says it sees a GPU."""
    parent = tmp_path / "host"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", parent], check=True)
    site = setup_env.site_packages(parent)
    see = "class cuda:\n    is_available = staticmethod(lambda: True)\n"
    package(site, "torch", "2.11.0+cu130", see)
    package(site, "transformers", "5.17.0")
    package(tmp_path / "linked", "numpy", "2.1.0")
    (site / "linked.pth").write_text(f"{tmp_path / 'linked'}\n")
    return parent / "bin" / "python"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with the real one's name, few needs, and nothing that can be built off-line."""
    root = tmp_path / "project"
    (root / "longgen").mkdir(parents=True)
    (root / "longgen" / "__init__.py").write_text("")
    (root / "longgen" / "cli.py").write_text("def main() -> None:\n    print('the command')\n")
    (root / "constraints-cpu.txt").write_text("")
    (root / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["setuptools"]\nbuild-backend = "no.such.backend"\n'
        '[project]\nname = "longgen"\nversion = "0"\n'
        'dependencies = ["torch>=2.11", "transformers>=5.16,<6", "numpy>=1.26"]\n'
        '[project.optional-dependencies]\ndemo = ["smallneed>=1.0"]\n'
    )
    monkeypatch.setattr(setup_env, "ROOT", root)
    monkeypatch.setattr(setup_env, "CPU_CONSTRAINTS", root / "constraints-cpu.txt")
    for name in ("PYTHONPATH", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    return root


@pytest.mark.parametrize(
    ("torch_says", "nvidia_smi", "stack"),
    [
        ("echo '\"2.11.0+cu130\"'", None, "host"),
        ("echo a warning; echo '\"2.13.0\"'", f"echo '{GPU_LINE}'", "host"),
        ("echo '\"2.9.1+cu126\"'", f"echo '{GPU_LINE}'", "cuda"),
        ("echo null", f"echo '{GPU_LINE}'", "cuda"),
        ("exit 1", f"echo '{GPU_LINE}'", "cuda"),
        ("exit 1", "echo 'NVIDIA-SMI has failed: no driver'; exit 9", "cpu"),
        ("exit 1", "echo 'No devices were found'", "cpu"),
        ("echo null", None, "cpu"),
    ],
)
def test_the_stack_follows_torch_and_the_gpu(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    torch_says: str,
    nvidia_smi: str | None,
    stack: str,
) -> None:
    python = program(tmp_path / "python", torch_says)
    (tmp_path / "bin").mkdir()
    if nvidia_smi:
        program(tmp_path / "bin" / "nvidia-smi", nvidia_smi)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert setup_env.choose_stack(python) == stack


def test_every_extra_of_the_project_expands_to_plain_requirements() -> None:
    project = tomllib.loads((setup_env.ROOT / "pyproject.toml").read_text())["project"]
    for extra in project["optional-dependencies"]:
        wanted = setup_env.requirements(project, [extra])
        assert set(project["dependencies"]) <= set(wanted)
        assert not any(text.startswith("longgen") for text in wanted)
    names = {text.partition(">")[0] for text in setup_env.requirements(project, ["dev"])}
    assert {"gguf", "accelerate", "datasets", "matplotlib", "pytest", "ruff", "mypy"} <= names
    with pytest.raises(setup_env.SetupError, match="no extra 'docs'"):
        setup_env.requirements(project, ["docs"])


def test_only_unmet_requirements_are_missing() -> None:
    have = {"torch": "2.11.0+cu130", "huggingface-hub": "1.0", "transformers": "5.15.2"}
    wanted = ["torch>=2.11", "Huggingface_Hub>=0.9", "transformers>=5.16,<6", "rich>=13"]
    assert setup_env.missing(wanted, have) == ["transformers>=5.16,<6", "rich>=13"]


def test_a_gpu_host_keeps_its_stack_and_pip_adds_the_rest(
    tmp_path: Path, gpu_host: Path, project: Path
) -> None:
    wheel(tmp_path, "smallneed", "1.2", "Requires-Dist: numpy>=2")
    wheel(tmp_path, "smallneed", "1.3", "Requires-Dist: numpy>=9")
    wheel(tmp_path, "numpy", "9.9")
    venv = tmp_path / "made" / "venv"
    setup_env.set_up(gpu_host, venv, ["demo"])
    have = setup_env.installed(setup_env.venv_python(venv))
    assert have["torch"] == "2.11.0+cu130"
    assert have["numpy"] == "2.1.0"
    assert have["smallneed"] == "1.2"
    assert "torch==2.11.0+cu130" in (venv / "host-constraints.txt").read_text()
    # setuptools is not there to install the project: the path file and the script stand in.
    command = subprocess.run([venv / "bin" / "longgen"], capture_output=True, text=True, check=True)
    assert command.stdout == "the command\n"


def test_a_gpu_host_that_lacks_nothing_needs_no_pip(
    tmp_path: Path, gpu_host: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package(setup_env.site_packages(gpu_host.parent.parent), "smallneed", "1.0")

    def no_pip(python: Path, venv: Path) -> list[str]:
        raise setup_env.SetupError("pip was asked for")

    monkeypatch.setattr(setup_env, "pip_command", no_pip)
    setup_env.set_up(gpu_host, tmp_path / "venv", ["demo"])
    assert setup_env.cuda_torch(tmp_path / "venv" / "bin" / "python") == "2.11.0+cu130"


def test_what_pip_cannot_get_is_named_with_the_way_out(
    tmp_path: Path, gpu_host: Path, project: Path
) -> None:
    with pytest.raises(setup_env.SetupError, match=r"smallneed>=1\.0 .*PIP_FIND_LINKS"):
        setup_env.set_up(gpu_host, tmp_path / "venv", ["demo"])
    state = setup_env.load_state(tmp_path / "venv")
    assert state is not None
    assert state["done"] == {}


@pytest.mark.parametrize("stack", ["cpu", "host"])
def test_a_python_without_ensurepip_serves_with_its_own_pip(tmp_path: Path, stack: str) -> None:
    refusal = 'echo "ensurepip is not available" >&2; exit 1'
    cases = f'*--without-pip*) ;; "-m venv "*|*ensurepip*) {refusal} ;;'
    python = program(
        tmp_path / "python", f'case "$*" in {cases} esac\nexec "{sys.executable}" "$@"'
    )
    setup_env.make_venv(python, tmp_path / "venv", stack)
    own = str(tmp_path / "venv" / "bin" / "python")
    assert setup_env.pip_command(python, tmp_path / "venv") == (
        [str(python), "-m", "pip", "--python", own] if stack == "cpu" else [own, "-m", "pip"]
    )


def test_a_python_without_venv_is_told_what_to_install(tmp_path: Path) -> None:
    python = program(
        tmp_path / "python",
        f'[ "$1" = -m ] && echo "No module named $2" >&2 && exit 1\nexec "{sys.executable}" "$@"',
    )
    with pytest.raises(setup_env.SetupError, match=r"No module named venv.*python3-venv"):
        setup_env.make_venv(python, tmp_path / "venv", "cpu")


def test_an_environment_is_made_once_and_refreshed_when_its_inputs_change(
    tmp_path: Path, gpu_host: Path, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(setup_env, "install_requirements", lambda *given: calls.append("install"))
    monkeypatch.setattr(setup_env, "link_project", lambda *given: calls.append("link"))
    monkeypatch.setattr(setup_env, "check", lambda *given: calls.append("check"))
    venv = tmp_path / "venv"
    setup_env.set_up(gpu_host, venv, ["demo"])
    made = (venv / "pyvenv.cfg").stat().st_mtime_ns
    setup_env.set_up(gpu_host, venv, ["demo"])
    assert calls == ["install", "link", "check"]

    with (project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    setup_env.set_up(gpu_host, venv, ["demo"])
    assert calls == ["install", "link", "check"] * 2
    assert (venv / "pyvenv.cfg").stat().st_mtime_ns == made

    setup_env.save_state(venv, {**(setup_env.load_state(venv) or {}), "made": False})
    (venv / "leftover").touch()
    setup_env.set_up(gpu_host, venv, ["another"])
    assert not (venv / "leftover").exists()


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "thesis.txt").touch()
    for change in (
        lambda: setup_env.set_up(Path(sys.executable), tmp_path / "venv", ["dev"]),
        lambda: setup_env.remove(tmp_path / "venv"),
    ):
        with pytest.raises(setup_env.SetupError, match="not made by this script"):
            change()
    assert (tmp_path / "venv" / "thesis.txt").exists()


def test_a_python_that_is_too_old_is_refused(tmp_path: Path) -> None:
    old = program(tmp_path / "python2", "exit 1")
    script = Path(setup_env.__file__).with_name("setup.sh")
    result = subprocess.run(
        [script, "--venv", tmp_path / "venv"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert f"no Python of at least 3.11 among: {old}" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_state_survives_a_round_trip(tmp_path: Path) -> None:
    assert setup_env.load_state(tmp_path) is None
    setup_env.save_state(tmp_path, {"made": True})
    assert setup_env.load_state(tmp_path) == {"made": True}
    assert json.loads((tmp_path / setup_env.MARKER).read_text()) == {"made": True}
