"""Facts about parts that are not installed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from fullrank.embeddings import EmbeddingOptimizer
from fullrank.embeddings.row_buffer import RowBuffer
from fullrank.extras import EXTRAS, MissingExtra, needs
from fullrank.models.base import example_batch
from fullrank.schema import Numeric, Schema
from fullrank.training.callbacks import TensorBoard

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
DECLARED = {
    extra: {Requirement(line).name for line in lines} for extra, lines in PROJECT["optional-dependencies"].items()
}


def test_the_table_is_that_of_the_project() -> None:
    assert set(DECLARED) == {*EXTRAS, "all"}
    for extra, thing in EXTRAS.items():
        by_hand = set(re.findall(r"(\w+)==", thing.by_hand))
        assert set(thing.packages.values()) - by_hand == DECLARED[extra], extra
    everything = [Requirement(line).extras for line in PROJECT["optional-dependencies"]["all"]]
    assert set().union(*everything) == set(EXTRAS) - {"ann", "hnswlib", "onnx", "distributed", "docs", "dev"}


def test_modules_belong_to_their_distributions() -> None:
    from importlib.metadata import packages_distributions

    owners = packages_distributions()
    for thing in EXTRAS.values():
        for module, distribution in thing.packages.items():
            if module in owners:  # installed here
                names = {name.lower().replace("_", "-") for name in owners[module]}
                assert distribution in names, module


SERVE = """
import sys
for name in {missing}:
    sys.modules[name] = None
from fullrank.cli.main import main
sys.argv = {arguments}
main()
"""


def command(missing: list[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    program = SERVE.format(missing=missing, arguments=["fullrank", *arguments])
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("module", "name"), [("fastapi", "fastapi"), ("prometheus_client", "prometheus-client")])
def test_serving_without_its_extra_is_one_line(module: str, name: str) -> None:
    ran = command([module], "serve", "nowhere", "--port", "0")
    assert ran.returncode == 2
    assert ran.stderr == f"fullrank: serving needs {name}: pip install 'fullrank[serve]'\n"


def test_every_other_use_names_the_extra_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in ("tensorboard", "torch.utils.tensorboard", "fbgemm_gpu", "torchrec"):
        for loaded in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, loaded)
    for module in ("tensorboard", "fbgemm_gpu", "torchrec"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        MissingExtra, match=r"^training.tensorboard needs tensorboard: pip install 'fullrank\[report\]'$"
    ):
        TensorBoard(tmp_path)
    with pytest.raises(ValueError, match=r"pip install 'fullrank\[fbgemm\]'$"):
        RowBuffer(torch.zeros(4, 4), "fbgemm").set_optimizer(EmbeddingOptimizer(kind="adagrad"))
    batch = example_batch(Schema(features=(Numeric(name="age"),)), 1)
    with pytest.raises(MissingExtra, match=r"needs torchrec: .*--no-deps torchrec==") as caught:
        batch.keyed_jagged_tensor()
    assert isinstance(caught.value, ImportError) and len(str(caught.value).splitlines()) == 1


def test_an_error_of_the_package_itself_is_not_blamed_on_an_extra() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"fullrank\.nothing") as caught, needs("serve", "serving"):
        import fullrank.nothing  # type: ignore[import-not-found]  # noqa: F401
    assert not isinstance(caught.value, MissingExtra)


def test_doctor_lists_every_extra_and_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = command([], "doctor", "--json")
    extras = json.loads(ran.stdout)["extras"]
    assert set(extras) == set(EXTRAS)
    assert all(extra["install"].startswith(f"pip install 'fullrank[{name}]'") for name, extra in extras.items())
    monkeypatch.setattr("fullrank.extras.installed", lambda name: name != "uvicorn")
    assert [extra for extra, thing in EXTRAS.items() if thing.missing()] == ["serve"]
