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
    requests: set[str]
    """Addresses on a network that the page has asked for."""


class Browser:
    """Chromium with a profile of its own in `folder`."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("chromium")
        assert program, "Chromium is missing; fix: install Debian's package chromium"
        self._folder = folder
        self._command = [
            program, "--headless", "--disable-gpu", "--no-sandbox", "--no-first-run",
            # The browser itself asks its maker for updates.
            "--disable-background-networking", "--host-resolver-rules=MAP * ~NOTFOUND",
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
        started = [
            event["params"]
            for event in json.loads(requests.read_text())["events"]
            if "initiator" in event.get("params", {})
        ]
        return Opened(
            dom=done.stdout,
            console=re.findall(r":CONSOLE.*?\] (.*)", done.stderr),
            # The browser's own come from no page.
            requests={
                p["url"]
                for p in started
                if p["initiator"] != "not an origin" and re.match(r"https?:", p["url"])
            },
        )
