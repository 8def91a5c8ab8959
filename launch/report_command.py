"""`unbroken report RUN ...`: the report of a run, or several runs compared, as a file or served on this machine."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from launch.page.compare import compared
from launch.page.draw import page
from launch.page.files import PAGE, RunReader, is_run
from launch.page.serve import HOST, Drawn, PageServer
from launch.page.sheet import sheet
from launch.png import require_png, write_pngs
from launch.run_folder import write_whole
from launch.signals import stop_signals
from pipeline.settings import ConfigError, Within, check_bounds, require

_MOST_RUNS = 24
_COMPARED = "comparison.html"
_FRESH_S = 1.0


@dataclass(frozen=True)
class ReportConfig:
    """Draw the report of a run, or of several runs compared: one page that needs no network and no other file."""

    runs: str = "runs/default"
    """The run folder, or several with `:` between them; also the words before all flags: `unbroken report RUN RUN`."""
    out: Path | None = None
    """Where to write the page; unset, it is report.html in the run folder, or comparison.html here for several."""
    serve: bool = False
    """Serve the page on 127.0.0.1 instead, drawn anew while the run goes on, until Ctrl-C."""
    port: Annotated[int, Within(0, 65535)] = 0
    """The port to serve on; 0 takes a free one."""
    png: bool = False
    """Write a PNG beside every picture (SVG) of the runs, too; needs the extra `png` (resvg)."""
    json: bool = False
    """Print one JSON object."""


class _Pages:
    """The page of the runs, as new as what they have written."""

    def __init__(self, folders: list[Path], *, served: bool) -> None:
        self._readers, self._served = [RunReader(folder) for folder in folders], served
        self._drawn: Drawn | None = None
        self._looked = 0.0

    def draw(self) -> Drawn:
        """The page now."""
        if self._drawn is None or time.monotonic() - self._looked >= _FRESH_S:
            self._looked = time.monotonic()
            runs = [reader.read() for reader in self._readers]
            live = any(run.running for run in runs)
            size = sum(reader.size for reader in self._readers)
            if self._drawn is None or (f"{size}", live) != self._drawn[1:]:
                made = sheet(runs[0]) if len(runs) == 1 else compared(runs)
                self._drawn = page(made, served=self._served, version=f"{size}"), f"{size}", live
        return self._drawn


def report_command(config: ReportConfig) -> tuple[dict[str, Any], str] | int:
    """Where the page is; or, once it was served, the exit code. Raises ConfigError."""
    check_bounds(config)
    folders = [Path(each) for each in config.runs.split(os.pathsep) if each]
    require(1 <= len(folders) <= _MOST_RUNS, "runs", config.runs, f"1 to {_MOST_RUNS} run folders")
    for folder in folders:
        require(
            is_run(folder), "runs", str(folder), "the folder of a run, which has metrics.jsonl or config.toml in it"
        )
    require(not (config.serve and config.out), "out", str(config.out), "unset with --serve, which writes no file")
    require(config.serve or not config.port, "port", config.port, "0 without --serve")
    require(not (config.png and config.serve), "png", True, "unset with --serve, which writes no file")
    if config.png:
        require_png()
    pages = _Pages(folders, served=config.serve)
    if config.serve:
        return _serve(pages, config)
    out = config.out or (folders[0] / PAGE if len(folders) == 1 else Path(_COMPARED))
    try:
        write_whole(out, pages.draw()[0])
    except OSError as error:
        raise ConfigError(f"out is {str(out)!r}, which cannot be written: {error.strerror}") from error
    pngs = [str(png) for folder in folders for png in write_pngs(folder)] if config.png else []
    told = "".join(f", {png}" for png in pngs)
    return {"out": str(out), "runs": list(map(str, folders)), "png": pngs}, f"wrote {out}{told}"


def _serve(pages: _Pages, config: ReportConfig) -> int:
    """Serve until a signal asks for the end."""
    try:
        server = PageServer(pages.draw, config.port)
    except OSError as error:
        raise ConfigError(f"port is {config.port}, which cannot be had on {HOST}: {error.strerror}") from error
    over = threading.Event()
    with server, stop_signals(lambda _: over.set()):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        print(f"{server.url} shows {config.runs}; Ctrl-C ends it", flush=True)  # noqa: T201 - it is to be opened now
        while not over.wait(1.0):  # a wait without an end would not be woken by a signal
            pass
        server.shutdown()
        thread.join()
    return 0
