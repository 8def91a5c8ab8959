"""Pages of the site that lie elsewhere in the repository, where the code is that they tell of."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"measurements.md": "benchmarks/README.md", "how-to/forgetting.md": "jobs/unlearn/README.md"}
"""Where a page is in the site -> where it lies in the repository."""
PICTURES = "benchmarks/results"
"""The folder of measured pictures, which is `results` in the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add them to the files of the site."""
    found = {name: ROOT / path for name, path in PAGES.items()}
    found |= {f"results/{path.name}": path for path in sorted((ROOT / PICTURES).glob("*.svg"))}
    for name, path in found.items():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files
