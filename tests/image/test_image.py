"""The Dockerfile's lines, run in a Debian of the test's own, which debootstrap makes: for root, on a machine without a
container engine. Packages come from where debootstrap and this machine's pip take them.

Downloads some 400 MB and torch, and takes three to ten minutes.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kit.dockerfile import copied, instructions

ROOT = Path(__file__).parents[2]
RELEASE = "bookworm"  # whose Python is 3.11
# What the image that the Dockerfile begins with has, and Debian's smallest has not.
PYTHON = ["ca-certificates", "python3-distutils", "python3.11", "python3.11-venv"]


def settings_of_pip() -> dict[str, str]:
    """This machine's, as the variables that pip reads, but for indexes that are folders of its disk."""
    lines = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    found = re.findall(r"^(?:\w+|:env:)\.([\w-]+)='(.*)'$", lines.stdout, re.MULTILINE)
    return {f"PIP_{name.upper().replace('-', '_')}": value for name, value in found if "file:" not in value}


def why_no_debian(folder: Path) -> str:
    """Why none can be made in a folder; "" if one can."""
    if shutil.which("debootstrap") is None:
        return "debootstrap not found; on Debian: apt-get install debootstrap"
    probe = subprocess.run(["mknod", folder / "null", "c", "1", "3"], capture_output=True, text=True)
    return probe.stderr.strip() and f"this user may make no devices, which takes root ({probe.stderr.strip()})"


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """The root folder of a Debian with Python, and folders that pip's settings name."""
    folder = tmp_path_factory.mktemp("debian")
    if reason := why_no_debian(folder):
        pytest.skip(reason)
    root = folder / "root"
    call = ["debootstrap", "--variant=minbase", f"--include={','.join(PYTHON)}", RELEASE, root]
    subprocess.run(call, check=True)
    for name in ("resolv.conf", "hosts", "ssl/certs/ca-certificates.crt"):  # with whatever this machine trusts
        shutil.copy(f"/etc/{name}", root / "etc" / name)
    for path in {each for value in settings_of_pip().values() for each in re.findall(r"(?:^| )(/\S+)", value)}:
        if Path(path).is_dir():
            shutil.copytree(path, root / path[1:], dirs_exist_ok=True)
        elif Path(path).is_file():
            (root / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, root / path[1:])
    yield root
    shutil.rmtree(root)


def test_the_image_is_set_up_line_by_line_and_knows_itself(debian):
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/home/kit", **settings_of_pip()}
    user, folder = "root", "/"
    for name, rest in instructions(ROOT / "Dockerfile"):
        if name == "USER":
            user = rest
        elif name == "WORKDIR":
            folder = rest
        elif name == "ENV":
            environment.update(word.split("=", 1) for word in rest.split())
        elif name == "RUN":
            in_debian(debian, user, folder, rest, environment)
        elif name == "COPY":
            copy(debian, user, folder, rest)
    said = in_debian(debian, user, folder, "id --user && .venv/bin/python -m epsdpo doctor", environment)
    assert said.splitlines()[0] == "1000"
    assert re.search(r"^  demo +yes: `make demo`", said, re.MULTILINE), said


def in_debian(root, user, folder, line, environment):
    script = f"cd {folder} && {line}"
    call = ["chroot", f"--userspec={user}", root, "bash", "-c", script]
    done = subprocess.run(call, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def copy(root, user, folder, rest):
    sources, destination = copied(rest)
    place = root / folder[1:] / destination
    for source in sources:
        if source == ".":
            tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
            files = {name: place / name for name in tracked.stdout.split("\0") if name}
        else:
            files = {source: place / Path(source).name}
        for name, target in files.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target)
    subprocess.run(["chroot", root, "chown", "--recursive", user, folder], check=True)
