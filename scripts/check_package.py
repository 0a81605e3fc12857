"""Build sdist and wheel, and try them as a user would: each in an environment that has what it declares, and nothing else.

    python scripts/check_package.py            the environment's packages are links to those installed here: a minute
    python scripts/check_package.py --release  they are installed by pip (some minutes, and what PyTorch weighs), and version, changelog
                                               and git are those of a release

What must hold: the sdist is what git has, and its tests can be run; the wheel has no tests; with the core alone a page's example, a run
and `verify` work, and `report` says which extra it needs; with the extras `tasks` and `report` the demo works.
"""

import argparse
import importlib.metadata as metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
HIDDEN = (".ci/", ".dockerignore", ".gitignore")  # of git's files those that no sdist needs


def call(*command, cwd=None, path="", fails=False):
    """What a command prints; that it succeeds, or fails if it should."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment = {**bare, "PYTHONPATH": path} if path else bare
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if bool(done.returncode) != fails:
        sys.exit(f"{' '.join(map(str, command))} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout + done.stderr


def build(folder):
    """The sdist, and the wheel that is made from it."""
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True, stdout=subprocess.DEVNULL)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def check_sdist(sdist, folder):
    """It has every file of the working tree, and its own tests can be collected and read what they need beside the source."""
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    packed = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()} - {"PKG-INFO", *HIDDEN}
    kept = call("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    kept = {name for name in kept if name and not name.startswith(HIDDEN) and (ROOT / name).is_file()}
    assert packed == kept, f"in the sdist or in git alone: {sorted(packed ^ kept)[:10]}"
    path = f"{root / 'src'}{os.pathsep}{root}"
    assert str(root) in call(sys.executable, "-c", "import fedex_lora; print(fedex_lora.__file__)", path=path)
    test = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider")
    call(*test, "--collect-only", cwd=root, path=path)
    call(
        *test,
        "tests/test_config.py",
        "tests/test_budget.py",
        "tests/test_documentation.py",
        "-k",
        "not runs and not real_data",
        cwd=root,
        path=path,
    )


def check_wheel(wheel, version):
    """It holds the package and its metadata, with what is read at run time, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    homes = ("fedex_lora/", f"fedex_lora-{version}.dist-info/")
    assert [name for name in names if not name.startswith(homes) or "tests" in Path(name).parts] == []
    for name in ("py.typed", "report/page.html", "data/demo_base/model.safetensors", "recipes/table3.toml"):
        assert f"fedex_lora/{name}" in names, name


def needed(requirement):
    """The installed distributions that a requirement brings, all the way down."""
    found, done, waiting = {}, set(), [Requirement(requirement)]
    while waiting:
        need = waiting.pop()
        extras = need.extras or {""}
        if (key := (canonicalize_name(need.name), frozenset(extras))) in done:
            continue
        done.add(key)
        found[key[0]] = metadata.distribution(need.name)
        more = map(Requirement, found[key[0]].requires or ())
        waiting += [one for one in more if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in {"", *extras})]
    return found.values()


def environment(folder, wheel, extras, install):
    """A new environment with the wheel and what it requires with these extras; where its commands are."""
    venv.create(folder)
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python")
    wanted = f"{wheel}[{','.join(extras)}]" if extras else str(wheel)
    if install:
        call(*pip, "install", "--constraint", ROOT / "constraints.txt", wanted)
    else:
        call(*pip, "install", "--no-deps", wheel)
        site = next(folder.glob("lib/python*/site-packages"))
        own = metadata.Distribution.at(next(site.glob("fedex_lora-*.dist-info")))
        for requirement in map(Requirement, own.requires or ()):
            if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                link(site, needed(str(requirement).partition(";")[0]))
    assert "No broken requirements" in call(*pip, "check")
    return folder / "bin"


def link(site, distributions):
    """Give an environment what is installed here, by links."""
    for found in distributions:
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(found.locate_file(top))))


def try_core(commands, folder, version):
    """The core alone: the example of docs/exactness.md, a run, `verify`; `report` names its extra."""
    cli = commands / "fedex-lora"
    assert call(cli, "--version").strip() == version
    example = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "exactness.md").read_text(), flags=re.S)[0]
    averaged, exact = call(commands / "python", "-c", example, cwd=folder).split()[-2:]
    assert float(exact) < 1e-6 < float(averaged.rstrip("%")) / 100, (averaged, exact)
    call(cli, "run", ROOT / "examples" / "quickstart.toml", "--set", "rounds=1", "--out", "run", cwd=folder)
    assert "exact" in call(cli, "verify", "run", cwd=folder)
    assert "pip install" in call(cli, "report", "run", cwd=folder, fails=True)


def try_demo(commands, folder):
    """With its extras: one round of the demo, and its page."""
    call(commands / "fedex-lora", "demo", "--rounds", "1", "--out", "demo", cwd=folder)
    methods = json.loads((folder / "demo" / "demo.json").read_text())["methods"]
    assert methods["fedex"]["exactness_error"] < 1e-6 < methods["fedit"]["exactness_error"]
    assert (folder / "demo" / "report.html").stat().st_size > 100_000


def check_release(version):
    """All is committed and has no tag yet; the changelog is cut: nothing is unreleased, and this version comes next, with a date."""
    assert call("git", "status", "--porcelain", cwd=ROOT) == "", "commit first"
    assert f"v{version}" not in call("git", "tag", cwd=ROOT).split(), (
        f"v{version} is tagged: raise __version__ in src/fedex_lora/__init__.py"
    )
    top = (ROOT / "CHANGELOG.md").read_text().partition("## Unreleased")[2]
    assert re.match(rf"\s+## {re.escape(version)}, \d{{4}}-\d\d-\d\d\n", top), (
        f"CHANGELOG.md: `## {version}, DATE` below an empty `## Unreleased`"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--release", action="store_true", help="install all dependencies anew; check version, changelog and git")
    release = parser.parse_args().release
    with tempfile.TemporaryDirectory(prefix="fedex-lora-package-") as made:
        folder = Path(made)
        sdist, wheel = build(folder / "dist")
        version = wheel.name.split("-")[1]
        print(f"{sdist.name}: {sdist.stat().st_size / 1e6:.1f} MB, {wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB")
        if release:
            check_release(version)
        check_wheel(wheel, version)
        check_sdist(sdist, folder / "sdist")
        print("the sdist is what git has, and its tests can be run; the wheel has the package alone")
        try_core(environment(folder / "core", wheel, (), release), folder, version)
        print("the core alone: aggregate, run, verify")
        try_demo(environment(folder / "more", wheel, ("tasks", "report"), release), folder)
        print("with tasks and report: the demo")


if __name__ == "__main__":
    main()
