"""A real browser without a window: Debian's Chromium opens a page, and tells what became of it."""

import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Opened:
    """A page after its scripts have run."""

    dom: str
    console: list[str]
    """What was written to the console: errors, warnings, and what scripts log."""
    addresses: set[str]
    """All that was asked for, by scheme and host."""


class Browser:
    """Chromium with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium")
        assert program, "Chromium is missing; fix: install Debian's package chromium"
        self._folder = folder
        self._command = [
            program, "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run",
            "--disable-background-networking", "--disable-component-update",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--v=0",
        ]  # fmt: skip

    def open(self, page: Path, *, width: int = 1200, dark: bool = False) -> Opened:
        """Open a local page in a window of a width."""
        requests = self._folder / "requests.json"
        done = subprocess.run(
            [
                *self._command, f"--window-size={width},900", f"--log-net-log={requests}",
                f"--blink-settings=preferredColorScheme={0 if dark else 1}",
                "--virtual-time-budget=2000", "--dump-dom", page.as_uri(),
            ],
            check=True, capture_output=True, text=True, timeout=PATIENCE_SECONDS,
        )  # fmt: skip
        events = json.loads(requests.read_text())["events"]
        urls = {str(event.get("params", {}).get("url", "")) for event in events}
        return Opened(
            dom=done.stdout,
            console=re.findall(r":CONSOLE.*?\] (.*)", done.stderr),
            addresses={found[0] for url in urls if (found := re.match(r"\w+:(//[^/]*)?", url))},
        )
