"""Make the virtual environment that the make targets run in; `scripts/setup.sh` is the way in.

Needs the standard library alone and runs under the Python that the environment is built on.
Three kinds of machine are told apart, see `choose_stack`. An environment that is up to date
costs a fraction of a second: a marker file in it holds one fingerprint for each set of extras.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import importlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CPU_CONSTRAINTS = ROOT / "constraints-cpu.txt"
MARKER = "longgen-setup.json"
BUILD_REQUIREMENTS = ["setuptools>=77"]
MINIMUM_TORCH = (2, 11)
# What a GPU host's own stack is made of. Whichever of these it has stays at its version.
HOST_STACK = {"torch", "triton", "transformers", "numpy", "tokenizers", "huggingface-hub"}


class SetupError(Exception):
    """Report, in a sentence, why the environment cannot be made."""


def run(command: Sequence[str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a command, keep what it prints, and give back its result whatever the exit status."""
    try:
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def say(message: str) -> None:
    """Print one line of progress at once."""
    print(f"setup: {message}", flush=True)


def ask(python: Path, code: str) -> Any:
    """Run code that prints one JSON value in another interpreter; None where it fails.

    It runs in the root directory of the file system, so that a folder of this project that is
    called like a package is not taken for that package.
    """
    result = run([str(python), "-c", code], cwd=Path("/"))
    try:
        return json.loads(result.stdout.strip().splitlines()[-1]) if not result.returncode else None
    except (IndexError, ValueError):
        return None


def cuda_torch(python: Path) -> str | None:
    """Give the version of the torch that an interpreter has and that sees a CUDA GPU, or None."""
    code = (
        "import json, torch; "
        "print(json.dumps(str(torch.__version__) if torch.cuda.is_available() else None))"
    )
    version = ask(python, code)
    return version if isinstance(version, str) else None


def has_nvidia_gpu() -> bool:
    """Say whether nvidia-smi lists a GPU; a driver tool without a GPU behind it doesn't count."""
    result = run(["nvidia-smi", "-L"])
    return result.returncode == 0 and re.search(r"^GPU \d+:", result.stdout, re.M) is not None


def choose_stack(python: Path) -> str:
    """Decide where torch comes from on this machine.

    Returns:
        "host": the interpreter has a torch of at least 2.11 that sees a GPU; it is kept in use.
        "cuda": there is an NVIDIA GPU but no such torch; pip's default build is installed.
        "cpu": there is no GPU; the release that constraints-cpu.txt names is installed.
    """
    version = cuda_torch(python)
    if version and tuple(int(part) for part in re.findall(r"\d+", version)[:2]) >= MINIMUM_TORCH:
        return "host"
    return "cuda" if has_nvidia_gpu() else "cpu"


def requirements(project: dict[str, Any], extras: Sequence[str]) -> list[str]:
    """List what the project needs with some extras, extras of extras included."""
    optional = project["optional-dependencies"]
    found: list[str] = list(project["dependencies"])
    seen: set[str] = set()
    waiting = list(extras)
    while waiting:
        extra = waiting.pop()
        if extra in seen:
            continue
        if extra not in optional:
            raise SetupError(f"there is no extra {extra!r}; there are: {', '.join(optional)}.")
        seen.add(extra)
        for requirement in optional[extra]:
            own = re.fullmatch(rf"{project['name']}\[(.+)\]", requirement)
            waiting += re.split(r"\s*,\s*", own[1]) if own else []
            found += [] if own else [requirement]
    return list(dict.fromkeys(found))


def canonical(name: str) -> str:
    """Spell a distribution's name as the packaging standards compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def installed(python: Path) -> dict[str, str]:
    """Map the distributions that an interpreter sees to their versions, first on its path first."""
    code = (
        "import json, importlib.metadata as m; "
        "print(json.dumps([(d.metadata['Name'], d.version) for d in m.distributions()]))"
    )
    versions: dict[str, str] = {}
    for name, version in ask(python, code) or []:
        if name and version:
            versions.setdefault(canonical(name), version)
    return versions


def missing(wanted: Sequence[str], have: dict[str, str]) -> list[str]:
    """Give the requirements that no installed distribution meets."""
    for module in ("packaging.requirements", "pip._vendor.packaging.requirements"):
        with contextlib.suppress(ImportError):
            parse = importlib.import_module(module).Requirement
            break
    else:
        return list(wanted)
    lacking = []
    for text in wanted:
        requirement = parse(text)
        version = have.get(canonical(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            lacking.append(text)
    return lacking


def make_venv(python: Path, venv: Path, stack: str) -> None:
    """Create the environment, replacing a half-made one.

    On a host with its own stack the environment sees the packages of the interpreter it is built
    on. Where that interpreter is itself a virtual environment's, an ordinary venv would see those
    of the base interpreter instead, so the packages are then linked by a .pth file.
    """
    facts = ask(
        python,
        "import json, sys, sysconfig as s; print(json.dumps({'nested': sys.prefix != "
        "sys.base_prefix, 'sites': [s.get_path('purelib'), s.get_path('platlib')]}))",
    )
    if facts is None:
        raise SetupError(f"{python} cannot say where its packages are; choose another with PYTHON.")
    plain = [str(python), "-m", "venv"]
    tries = [plain, [*plain, "--without-pip"], [str(python), "-m", "virtualenv"]]
    if stack == "host":
        # The host's pip serves; a second one would take seconds to set up.
        share = [] if facts["nested"] else ["--system-site-packages"]
        tries = [[*command, *share] for command in tries[1:]]
    reasons = []
    for command in tries:
        shutil.rmtree(venv, ignore_errors=True)
        # The marker comes first: what an interruption leaves behind is known as this script's.
        save_state(venv, {"stack": stack, "python": str(python), "made": False, "done": {}})
        result = run([*command, str(venv)])
        if result.returncode == 0 and venv_python(venv).exists():
            break
        reasons.append((result.stderr.strip() or result.stdout.strip())[-300:])
    else:
        raise SetupError(
            f"{python} cannot make a virtual environment in {venv} ({reasons[0]}). Install the "
            "venv module (python3-venv on Debian and Ubuntu) or choose another Python with PYTHON."
        )
    if stack == "host" and facts["nested"]:
        # addsitedir, unlike a bare path, also reads the .pth files that lie there.
        sites = dict.fromkeys(facts["sites"])
        lines = "".join(f"import site; site.addsitedir({site!r})\n" for site in sites)
        (site_packages(venv) / "longgen_host_stack.pth").write_text(lines)


def load_state(venv: Path) -> dict[str, Any] | None:
    """Read what this script has noted of an environment; None where it did not make it."""
    marker = venv / MARKER
    return json.loads(marker.read_text()) if marker.exists() else None


def save_state(venv: Path, state: dict[str, Any]) -> None:
    """Note in an environment what it is made of, in one step that cannot be cut in half."""
    venv.mkdir(parents=True, exist_ok=True)
    draft = venv / f"{MARKER}.new"
    draft.write_text(json.dumps(state))
    draft.replace(venv / MARKER)


def venv_python(venv: Path) -> Path:
    """Give the path of an environment's interpreter."""
    return venv / "bin" / "python"


def site_packages(venv: Path) -> Path:
    """Give the folder that an environment keeps its pure Python packages in."""
    code = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
    path = ask(venv_python(venv), code)
    if path is None:
        raise SetupError(f"{venv_python(venv)} does not run; remove {venv} and try again.")
    return Path(path)


def pip_command(python: Path, venv: Path) -> list[str]:
    """Find a pip that installs into the environment: its own, or that of the base interpreter."""
    own = str(venv_python(venv))
    choices = [[own, "-m", "pip"], [str(python), "-m", "pip", "--python", own]]
    for command in choices:
        if run([*command, "--version"]).returncode == 0:
            return command
    # Python carries a pip of its own, unless a Linux distribution has split it off.
    if run([own, "-m", "ensurepip"]).returncode == 0:
        return choices[0]
    raise SetupError(
        f"{python} has no pip of 22.3 or newer. Install one (python3-pip on Debian and Ubuntu)."
    )


def install(pip: list[str], venv: Path, wanted: list[str], constraints: Path | None) -> None:
    """Install requirements quietly; on failure show the end of what pip said."""
    options = ["install", "--quiet", "--no-input", "--disable-pip-version-check"]
    options += ["--constraint", str(constraints)] if constraints else []
    result = run([*pip, *options, *wanted])
    if result.returncode == 0:
        return
    log = venv / "longgen-pip.log"
    log.write_text(result.stdout + result.stderr)
    print("\n".join((result.stdout + result.stderr).strip().splitlines()[-20:]), file=sys.stderr)
    raise SetupError(
        f"pip could not install {' '.join(wanted)} (all of its output: {log}). If this machine "
        "has no network, put the wheels into a folder and set PIP_NO_INDEX=1 and "
        "PIP_FIND_LINKS=/that/folder."
    )


def install_requirements(python: Path, venv: Path, stack: str, extras: Sequence[str]) -> None:
    """Bring the environment up to what the project needs, calling pip only if something lacks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = requirements(project, extras)
    constraints = CPU_CONSTRAINTS if stack == "cpu" else None
    have = installed(venv_python(venv))
    if stack == "host":
        lacking = missing(wanted, have)
        unmet = {canonical(re.split(r"[^\w.-]", text)[0]) for text in lacking}
        # If the host's transformers is too old, a newer one goes into the environment alone, and
        # brings the tokenizers and hub client that fit it.
        free = unmet | ({"tokenizers", "huggingface-hub"} if "transformers" in unmet else set())
        pins = [f"{name}=={have[name]}" for name in sorted(HOST_STACK - free) if name in have]
        constraints = venv / "host-constraints.txt"
        constraints.write_text("\n".join(pins) + "\n")
    else:
        lacking = missing(BUILD_REQUIREMENTS + wanted, have)
    if not lacking:
        return
    large = any(text.startswith("torch") for text in lacking)
    time = "torch is large: 1 to 10 minutes" if large else "seconds to a minute"
    say(f"installing {len(lacking)} packages into {venv} ({time}): {' '.join(lacking)}")
    install(pip_command(python, venv), venv, lacking, constraints)


def link_project(python: Path, venv: Path) -> None:
    """Make `import longgen` and the `longgen` command work in the environment, off the network."""
    with contextlib.suppress(SetupError):
        editable = ["--no-index", "--no-deps", "--no-build-isolation", "--editable", str(ROOT)]
        if run([*pip_command(python, venv), "install", "--quiet", *editable]).returncode == 0:
            return
    # The setuptools there is too old or missing: a path file and a script do the same.
    (site_packages(venv) / "longgen_project.pth").write_text(f"{ROOT}\n")
    script = venv / "bin" / "longgen"
    script.write_text(
        f"#!{venv_python(venv)}\nimport sys\n\nfrom longgen.cli import main\n\nsys.exit(main())\n"
    )
    script.chmod(0o755)


def check(venv: Path, stack: str) -> None:
    """Make sure that the environment finds the project and torch, and torch the GPU."""
    names = ["longgen", "torch", "transformers"]
    code = (
        "import json, importlib.util as u; "
        f"print(json.dumps([n for n in {names!r} if u.find_spec(n) is None]))"
    )
    lost = ask(venv_python(venv), code)
    if lost is None or lost:
        raise SetupError(f"{venv} lacks {', '.join(lost or names)}; run make clean, then again.")
    if stack == "host" and cuda_torch(venv_python(venv)) is None:
        raise SetupError(f"torch sees the GPU outside of {venv} but not in it.")
    if stack == "cuda" and cuda_torch(venv_python(venv)) is None:
        say("torch sees no GPU although nvidia-smi does; its driver may be too old. Going on.")


def fingerprint(extras: Sequence[str]) -> str:
    """Hash what an environment is made from; it changes when the environment must be refreshed."""
    parts = [ROOT / "pyproject.toml", CPU_CONSTRAINTS, Path(__file__)]
    content = [str(ROOT).encode(), ",".join(sorted(extras)).encode()]
    content += [part.read_bytes() for part in parts]
    return hashlib.sha256(b"\0".join(content)).hexdigest()


@contextlib.contextmanager
def locked(venv: Path) -> Iterator[None]:
    """Let one set-up of an environment run at a time, as `make -j lint test` starts two."""
    venv.parent.mkdir(parents=True, exist_ok=True)
    with open(venv.with_name(venv.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def set_up(python: Path, venv: Path, extras: Sequence[str]) -> None:
    """Make or refresh an environment with some extras; do nothing where it is up to date."""
    key = ",".join(sorted(extras))
    state = load_state(venv)
    if venv_python(venv).exists() and state and state["done"].get(key) == fingerprint(extras):
        return
    if venv.exists() and state is None and any(venv.iterdir()):
        raise SetupError(f"{venv} was not made by this script; name another folder with VENV.")
    if state is None or not state["made"] or not venv_python(venv).exists():
        stack = choose_stack(python)
        reason = {"host": "keeps its torch", "cuda": "NVIDIA GPU", "cpu": "no GPU"}[stack]
        say(f"making {venv} with {python} ({reason})")
        make_venv(python, venv, stack)
        state = {"stack": stack, "python": str(python), "made": True, "done": {}}
        save_state(venv, state)
    builder = Path(state["python"])
    install_requirements(builder, venv, state["stack"], extras)
    link_project(builder, venv)
    check(venv, state["stack"])
    state["done"][key] = fingerprint(extras)
    save_state(venv, state)


def remove(venv: Path) -> None:
    """Remove an environment that this script made; leave any other."""
    if (venv / MARKER).exists():
        shutil.rmtree(venv)
    elif venv.exists():
        raise SetupError(f"{venv} was not made by this script, so it is left alone.")
    venv.with_name(venv.name + ".lock").unlink(missing_ok=True)


def base_python(venv: Path) -> Path:
    """Give this interpreter, or its base where it is the environment's own."""
    if Path(sys.prefix).resolve() == venv.resolve():
        return Path(getattr(sys, "_base_executable", sys.executable))
    return Path(sys.executable)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; exit status 2 with a sentence where the set-up is impossible."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("extras", nargs="?", default="dev", help="comma-separated, default: dev")
    parser.add_argument("--venv", type=Path, default=Path(".venv"))
    parser.add_argument("--remove", action="store_true", help="remove the environment instead")
    options = parser.parse_args(arguments)
    venv = (ROOT / options.venv).absolute()
    try:
        with locked(venv):
            if options.remove:
                remove(venv)
            else:
                set_up(base_python(venv), venv, options.extras.split(","))
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
