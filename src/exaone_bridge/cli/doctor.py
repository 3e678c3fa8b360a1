"""The command `doctor`: installed versions, GPUs, and what each use of exaone_bridge still needs.

It runs where exaone_bridge is the only package that is installed. Of other packages it imports
torch alone, to ask it for GPUs.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import exaone_bridge
from exaone_bridge.errors import ParityFailure
from exaone_bridge.patches.fingerprints import fingerprint, known_fingerprints
from exaone_bridge.patches.tested_versions import TESTED, newer_than_tested, release

__all__ = ["Package", "Use", "doctor", "install_command", "package_of", "packages", "uses"]

REQUIREMENTS = Path(exaone_bridge.__file__).with_name("requirements-cpu.txt")
_EXPORT = ("torch", "safetensors", "pyyaml", "rich")
_ALL = ("megatron-bridge", "megatron-core", "transformers", *_EXPORT)
_IMAGES = ("pillow", "torchvision")
_ABSENT = "-"
_COMPARISONS = {
    "<": lambda left, right: left < right,
    "<=": lambda left, right: left <= right,
    ">": lambda left, right: left > right,
    ">=": lambda left, right: left >= right,
}


@dataclass(frozen=True, slots=True)
class Package:
    """One package that exaone_bridge uses.

    Attributes:
        name: its name in the package index.
        wanted: its version specifier, such as ">=2.6,<3"; empty: any version.
        installed: its version; None: it is not installed.
    """

    name: str
    wanted: str
    installed: str | None

    @property
    def fits(self) -> bool:
        """Whether it is installed in a wanted version."""
        return self.installed is not None and _fits(self.installed, self.wanted)


@dataclass(frozen=True, slots=True)
class Use:
    """One use of exaone_bridge, what it lacks here, and the commands that install that.

    Attributes:
        name: what a user does.
        faults: what is missing; empty: nothing.
        remedies: commands of a shell.
    """

    name: str
    faults: tuple[str, ...]
    remedies: tuple[str, ...] = ()


def doctor() -> None:
    """Print the environment, for a reader and for a bug report.

    Raises:
        ParityFailure: `export`, `import` or `verify` cannot run, or a patch changes code that it
            was not written for; everything has been printed.
    """
    found = packages()
    gpu_count, torch_line = _of_torch()
    print(f"exaone-bridge {exaone_bridge.__version__}, Python {platform.python_version()}")
    print(f"{platform.platform()}, {sys.executable}\n")
    print(f"{'package':20}{'installed':18}wanted")
    for package in found.values():
        remark = "" if package.installed is None or package.fits else "  DOES NOT FIT"
        print(
            f"{package.name:20}{package.installed or _ABSENT:18}{package.wanted or 'any'}{remark}"
        )
    print(f"\nGPUs: {'; '.join(_of_driver()) or 'nvidia-smi finds none'}")
    print(f"torch: {torch_line}\n")
    answers = uses(found, has_gpu=gpu_count > 0)
    for use in answers:
        print(f"{use.name}: {'; '.join(use.faults) or 'ready'}")
        for remedy in use.remedies:
            print(f"    {remedy}")
    is_proved = _print_patches(found)
    if any(use.faults for use in answers[:2]) or not is_proved:
        raise ParityFailure(
            "exaone-bridge: this environment is not one that exaone-bridge was made for; "
            "the lines above have the reasons and the remedies."
        )


def _print_patches(found: Mapping[str, Package]) -> bool:
    """Print newer versions than those that were tested, and the patches whose code has changed."""
    for name, version in newer_than_tested().items():
        print(f"{name} {version} is newer than {TESTED[name]}, which was tested.")
    known = {
        target: fingerprints
        for target, fingerprints in known_fingerprints().items()
        if found[package_of(target)].installed is not None
    }
    changed = [target for target in known if fingerprint(target) not in known[target]]
    print(f"\npatches: {len(known) - len(changed)} of {len(known)} change the code that they know")
    for target in changed:
        print(f"    {target} is different, or absent")
    if changed:
        print(f"    {_install([found[name] for name in sorted(set(map(package_of, changed)))])}")
    return not changed


def package_of(module: str) -> str:
    """Return the name in the package index of what a module is in."""
    root, _, rest = module.partition(".")
    if root == "megatron":
        return "megatron-core" if rest.startswith("core") else "megatron-bridge"
    return {"yaml": "pyyaml", "PIL": "pillow"}.get(root, root)


def packages() -> dict[str, Package]:
    """Look up the versions of the packages that exaone_bridge requires or can use."""
    wanted = dict.fromkeys((*_ALL, "transformer-engine", *_IMAGES), "")
    try:
        requirements = importlib.metadata.requires("exaone-bridge") or []
    except importlib.metadata.PackageNotFoundError:  # its source is on the import path
        requirements = []
    for requirement in requirements:
        name, specifier = re.match(r"([\w.-]+)\s*([^;]*)", requirement).groups()  # type: ignore[union-attr]
        wanted[name] = ",".join(sorted(specifier.strip().split(","), reverse=True))
    return {name: Package(name, text, _installed(name)) for name, text in wanted.items()}


def uses(found: Mapping[str, Package], *, has_gpu: bool) -> list[Use]:
    """List the uses; the first two are the command line."""
    return [
        _use("export", [found[name] for name in _EXPORT], pip_resolves=True),
        _use("import, verify", [found[name] for name in _ALL], pip_resolves=has_gpu),
        _training(found, has_gpu),
        _use(
            "images and videos of EXAONE 4.5",
            [found[name] for name in _IMAGES],
            pip_resolves=has_gpu,
        ),
    ]


def _use(name: str, needed: list[Package], *, pip_resolves: bool) -> Use:
    """Find what is missing.

    Args:
        pip_resolves: whether pip can install what the needed packages require. Megatron-Bridge
            requires packages that a machine without a GPU cannot install.
    """
    missing = [package for package in needed if package.installed is None]
    unfit = [package for package in needed if package.installed is not None and not package.fits]
    faults = [f"{package.name} {package.installed} does not fit" for package in unfit]
    remedies = [_install(unfit)] if unfit else []
    if missing:
        faults.append(f"missing: {', '.join(package.name for package in missing)}")
        all_of_them = f"{_pip()} install --no-deps -r {REQUIREMENTS}"
        remedies.append(_install(missing) if pip_resolves else all_of_them)
    return Use(name, tuple(faults), tuple(remedies))


def _install(wanted: list[Package]) -> str:
    specifiers = " ".join(f'"{package.name}{package.wanted}"' for package in wanted)
    return f"{_pip()} install {specifiers}"


def install_command(name: str) -> str:
    """Return the command that installs a package that cannot be imported, and what goes with it."""
    found = packages()
    needed = dict.fromkeys(_EXPORT if name in _EXPORT else (name, *_ALL))
    missing = [
        dataclasses.replace(found.get(each, Package(each, "", None)), installed=None)
        for each in needed
        if each == name or found[each].installed is None
    ]
    # A package that only Megatron-Bridge needs is in the list of requirements, as all of them are.
    return _use("", missing, pip_resolves=name in _EXPORT or _of_torch()[0] > 0).remedies[0]


def _training(found: Mapping[str, Package], has_gpu: bool) -> Use:
    name = "training on GPUs"
    if not has_gpu:
        return Use(name, ("torch sees no GPU",))
    if found["transformer-engine"].fits:
        return Use(name, ())
    remedy = f'{_pip()} install --no-build-isolation "transformer-engine[pytorch]"'
    return Use(name, ("missing: transformer-engine (models use the torch backend)",), (remedy,))


def _pip() -> str:
    return "pip" if importlib.util.find_spec("pip") else "uv pip"


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fits(version: str, specifier: str) -> bool:
    """Whether a version is in the range; `packaging` may not be installed yet."""
    for one in filter(None, specifier.split(",")):
        operator, bound = re.match(r"([<>=]+)(.*)", one).groups()  # type: ignore[union-attr]
        pair = tuple(release(text) for text in (version, bound))
        if not _COMPARISONS[operator](*pair):
            return False
    return True


def _of_driver() -> Iterator[str]:
    if not (program := shutil.which("nvidia-smi")):
        return
    query = ["--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run([program, *query], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        yield from done.stdout.strip().splitlines()


def _of_torch() -> tuple[int, str]:
    """Ask torch for GPUs: their number, and a line about torch."""
    if importlib.util.find_spec("torch") is None:
        return 0, "not installed"
    try:
        import torch
    except Exception as error:  # a library of CUDA is missing or damaged
        return 0, f"cannot be imported: {' '.join(str(error).split())}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return count, f"{torch.__version__}, CUDA {torch.version.cuda or _ABSENT}, sees {count} GPUs"
