"""What is installed: the wheel holds jaxmerge only, and an editable install puts nothing else on the path."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent


def pip(*args):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *args]
    subprocess.run(command, check=True, cwd=ROOT)


def test_wheel_holds_the_library_only(tmp_path):
    pip("wheel", "--no-deps", "-w", str(tmp_path), ".")
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == {"jaxmerge"}
    assert "jaxmerge/py.typed" in names and any(n.endswith("licenses/LICENSE") for n in names)


def test_editable_install_leaks_no_top_level(tmp_path):
    pip("install", "--no-deps", "--target", str(tmp_path / "site"), "editables")
    pip("install", "--no-deps", "--target", str(tmp_path / "site"), "--editable", ".")
    code = (
        f"import site, importlib.util as u; site.addsitedir({str(tmp_path / 'site')!r});"
        "print([bool(u.find_spec(n)) for n in ('jaxmerge', 'models', 'scripts', 'tests')])"
    )
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[True, False, False, False]"
