"""What is loaded when: times differ between machines, and depend on this."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
from pathlib import Path
before = set(sys.modules)
{statements}
loaded = {{name.split(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(*loaded, file=sys.stderr)
"""
# What a command needs only when it does its work. (Typer itself has pydantic check values.)
HEAVY = {"torch", "numpy", "polars", "pyarrow", "yaml", "safetensors"}
HEAVY |= {"fbgemm_gpu", "torchrec", "fastapi", "uvicorn", "faiss", "matplotlib", "sklearn", "scipy", "dask", "numba"}
HELP = """
from fullrank.cli.main import main
sys.argv = ["fullrank", *{arguments}]
try:
    main()
except SystemExit as ended:
    assert not ended.code
"""


def loaded(statements: str) -> set[str]:
    """Packages beside the standard library that the statements load."""
    program = PROGRAM.format(statements=statements)
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(ran.stderr.split())


def test_the_package_alone_loads_nothing_else() -> None:
    assert loaded("import fullrank") == {"fullrank"}


def test_help_loads_the_command_line_alone() -> None:
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        modules = loaded(HELP.format(arguments=arguments))
        assert modules >= {"fullrank", "typer"} and not modules & HEAVY, arguments


def test_listing_the_fields_of_a_model_loads_no_other_model() -> None:
    modules = loaded(
        HELP.format(arguments=["models", "lr", "--json"]) + "\nassert 'fullrank.models.fm' not in sys.modules"
    )
    assert "torch" in modules  # which is what the tests above would find, were it loaded


def test_an_import_of_a_log_loads_neither_torch_nor_pandas(tmp_path: Path) -> None:
    """Arrow loads pandas, where it is installed, for each array that it is to make of numbers."""
    log = tmp_path / "log.csv"
    log.write_text("user_id,tags,price,click\n1,a|b,2.5,0\n2,a,3.5,1\n1,b|a,,1\n")
    words = ["data", "import", "csv", str(log), str(tmp_path / "log"), "--split", "none", "--json"]
    modules = loaded(HELP.format(arguments=words))
    assert modules >= {"polars", "pyarrow"} and not modules & {"pandas", "torch"}
