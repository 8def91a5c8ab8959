"""What one GPU shows, in minutes: CUDA tests and links, resident training, a lost worker, offloading; ours and peers.

    make gpu                       # 8 minutes at most, on one H100 or H200
    make gpu-dry                   # the same script on CPU workers with tiny shapes; the figures mean nothing
    python benchmarks/gpu.py --only b,d --minutes 4 --out runs/gpu

Each measurement is a part in a process of its own with a time limit; one that fails, hangs or lacks its peer says so,
and the others go on. Everything found so far stands in OUT/gpu.json at any moment, so that a run that is cut says what
it has; the tables come last. Exit code 0 where all parts of ours ran, whether or not a goal was met. What the machine
lacks is taken from wheels in build/gpu-wheels (`make gpu-wheels` where there is a network; gpu-wheels.txt lists them).
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
MINUTES = 7.5
"""Beside imports, which no part can be cut from."""
DEVICES = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia-uvm", "/dev/dxg", "/proc/driver/nvidia")
"""Any of these is there where there is an NVIDIA driver."""
WHEELS = ROOT / "build" / "gpu-wheels"
ENVIRONMENT = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # asking for devices must not touch CUDA: this process forks
    "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}  # fmt: skip


def install(wheels: Path) -> Path | None:
    """Unpack the wheels into a folder for sys.path, if there are any; raises RuntimeError where pip refuses them."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        return None
    site = wheels.with_name(wheels.name + "-site")
    stamp, names = site / "installed.txt", "\n".join(path.name for path in found)
    if not stamp.is_file() or stamp.read_text() != names:
        flags = ["--no-index", "--no-deps", "--no-compile", "--upgrade", "--quiet", "--disable-pip-version-check"]
        command = [sys.executable, "-m", "pip", "install", *flags, "--target", str(site), *map(str, found)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(f"the wheels in {wheels} cannot be installed: {done.stderr.strip()[-600:]}")
        stamp.write_text(names)
    return site


def prepare(dry: bool, scratch: Path, wheels: Path) -> None:
    """Have environment and sys.path as all processes need them, before anything heavy is imported. The packages come
    before scripts beside this one: recovery is both."""
    site = install(wheels) if sys.version_info[:2] == (3, 12) else None  # which they are for
    places = [str(ROOT), *([] if site is None else [str(site)])]
    sys.path[:0] = places
    if str(HERE) not in sys.path:
        sys.path.append(str(HERE))
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    os.environ["PYTHONPATH"] = os.pathsep.join([*places, *filter(None, [os.environ.get("PYTHONPATH")])])
    beside = str(Path(sys.executable).parent)  # where this Python's ninja is, with which a peer compiles
    os.environ["PATH"] = os.pathsep.join([*filter(None, [os.environ.get("PATH")]), beside])
    os.environ["UNBROKEN_CACHE"] = str(scratch / "cache")
    os.environ["TORCH_EXTENSIONS_DIR"] = str(ROOT / "build" / "torch-extensions")  # what a peer compiles once
    if dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="CPU workers and tiny shapes")
    parser.add_argument("--only", default="a,b,c,d", help="sections to run, by their letters")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder for gpu.json")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together")
    parser.add_argument("--wheels", type=Path, default=WHEELS, help="folder of wheels that this machine lacks")
    options = parser.parse_args()
    asked = [letter.strip() for letter in options.only.split(",")]
    if unknown := sorted(set(asked) - set("abcd")):
        parser.error(f"--only {options.only}; {', '.join(unknown)} is no section: allowed are a, b, c, d")
    if not 0 < options.minutes <= 600:
        parser.error(f"--minutes {options.minutes:g}; expected more than 0")
    if not options.dry and not any(Path(path).exists() for path in DEVICES):
        parser.error("there is no NVIDIA device here; --dry tries the script on the CPU")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is ended too
    with tempfile.TemporaryDirectory(prefix="unbroken-gpu-") as scratch:
        prepare(options.dry, Path(scratch), options.wheels)
        from gpu_driver import run  # now that the path is right

        return run(asked, options.dry, options.minutes * 60, options.out, Path(scratch))


if __name__ == "__main__":
    sys.exit(main())
