"""Opens a bundle, asks it for a few answers, writes its arrays for the processes of a server to map, and ends.

python -m fullrank.serving.preparing BUNDLE IDENTITY DIRECTORY [MODULE ...]
"""

from __future__ import annotations

import ctypes
import signal
import sys
from pathlib import Path

import torch

from fullrank.funnel.bundle import load_bundle
from fullrank.funnel.canary import check_answers
from fullrank.funnel.mapped import write_arrays
from fullrank.registry import import_modules
from fullrank.training.deltas import position_of

_PR_SET_PDEATHSIG = 1


def main() -> None:
    bundle, base, directory, *imports = sys.argv[1:]
    if sys.platform == "linux":
        # Nobody waits for it once the process that does has ended.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    torch.set_num_threads(1)
    try:
        import_modules(imports, "--import")
        content = load_bundle(Path(bundle))
        if position_of(Path(bundle)).base != base:
            raise ValueError(f"{bundle} was changed while it was opened")
        check_answers(content, Path(bundle))
        write_arrays(content, Path(directory))
    except (ValueError, OSError) as error:
        print(str(error).splitlines()[0], file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
