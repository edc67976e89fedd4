"""`fullrank doctor`: what is installed, what is fast, what is missing."""

from __future__ import annotations

import json
import platform
from typing import Annotated, Any

import typer

from fullrank.extras import EXTRAS, install, installed


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check the installation and measure this machine for two seconds.

    Example: fullrank doctor
    """
    from rich.console import Console
    from rich.table import Table

    report = examine()
    if as_json:
        print(json.dumps(report))
        return
    table = Table(show_header=False)
    for key, value in report.items():
        if key == "extras":
            for name, extra in value.items():
                missing = ", ".join(extra["missing"])
                state = f"missing {missing}: {extra['install']}" if missing else "installed"
                table.add_row(f"extra {name}", f"{extra['use']}; {state}")
        else:
            table.add_row(key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    Console(markup=False).print(table)


def examine() -> dict[str, Any]:
    """What `fullrank doctor` prints."""
    import torch

    from fullrank.training.precision import gemm_gflops

    extras = {
        name: {"use": extra.use, "missing": extra.missing(), "install": install(name)} for name, extra in EXTRAS.items()
    }
    problems = []
    if installed("fbgemm-gpu") and installed("fbgemm-gpu-cpu"):
        problems.append(
            "both fbgemm-gpu and fbgemm-gpu-cpu are installed and share one folder: pip uninstall -y fbgemm-gpu && pip "
            "install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"
        )
    try:
        import fbgemm_gpu  # noqa: F401

        fbgemm = "loads"
    except (ImportError, OSError) as error:
        fbgemm = f"does not load: {str(error).splitlines()[0]}"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "fbgemm": fbgemm,
        "float32_gflops": round(gemm_gflops(torch.float32)),
        "bfloat16_gflops": round(gemm_gflops(torch.bfloat16)),
        "memory_gb_per_s": round(memory_bandwidth(), 1),
        "extras": extras,
        "problems": problems,
    }


def memory_bandwidth() -> float:
    """Best of several copies of 128 MB, in GB read and written per second."""
    import torch

    from fullrank.training.precision import best_time

    source = torch.zeros(1 << 25)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / best_time(lambda: target.copy_(source)) / 1e9
