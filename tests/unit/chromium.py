"""A headless Chromium that is told what to do through a pipe: nothing but the standard library."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time

PROGRAM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60
LAUNCHER = """
import os, sys
import fcntl
into, out = (fcntl.fcntl(int(one), fcntl.F_DUPFD, 10) for one in sys.argv[1:3])
os.dup2(into, 3)
os.dup2(out, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Chromium:
    """One page."""

    def __init__(self, dark=False):
        self.profile = tempfile.mkdtemp(prefix="millstream-chromium-")
        into, self.commands = os.pipe()
        self.answers, out = os.pipe()
        command = [
            *(PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars"),
            *("--disable-background-networking", f"--user-data-dir={self.profile}", "about:blank"),
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(into), str(out), *command],
            pass_fds=(into, out), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(into)
        os.close(out)
        os.set_blocking(self.answers, False)
        self.number, self.pending, self.events, self.session = 0, b"", [], None
        target = self.tell("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.tell("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Log"):
            self.tell(f"{domain}.enable")
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.tell("Emulation.setEmulatedMedia", features=[feature])

    def tell(self, method, **parameters):
        """Do one thing; what came of it."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        deadline = time.monotonic() + SECONDS
        while True:
            for said in self.heard():
                if said.get("id") == self.number:
                    assert "error" not in said, said
                    return said["result"]
                self.events.append(said)
                if said.get("method") == "Page.javascriptDialogOpening":
                    self.on_dialog(said["params"])
            assert time.monotonic() < deadline, f"no answer to {method}"
            select.select([self.answers], [], [], 1.0)

    def heard(self):
        """What it has said since."""
        try:
            self.pending += os.read(self.answers, 1 << 20)
        except BlockingIOError:
            return []
        *whole, self.pending = self.pending.split(b"\0")
        return [json.loads(one) for one in whole]

    def on_dialog(self, said):
        """Say yes to a question, and the token to who asks for it."""
        answer = {"accept": True, "promptText": self.answer if said["type"] == "prompt" else ""}
        message = {"id": 0, "method": "Page.handleJavaScriptDialog", "params": answer}
        message["sessionId"] = self.session
        os.write(self.commands, json.dumps(message).encode() + b"\0")

    answer = ""

    def size(self, width, height=900):
        """How large the window is."""
        self.tell(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
            mobile=width < 600,
        )  # fmt: skip

    def go(self, url):
        """Load a page."""
        self.tell("Page.navigate", url=url)

    def run(self, script):
        """The value of an expression, awaited."""
        found = self.tell(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def until(self, script):
        """Wait until an expression is true."""
        look = f"const look = () => ({script}) ? resolve(true) : setTimeout(look, 20); look();"
        return self.run(f"new Promise((resolve) => {{ {look} }})")

    def picture(self, path):
        """Keep what is seen as a PNG."""
        data = self.tell("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(base64.b64decode(data))

    def complaints(self):
        """What the page has logged as an error, or raised."""
        wrong = [one for one in self.events if one.get("method") == "Runtime.exceptionThrown"]
        logged = [one for one in self.events if one.get("method") == "Log.entryAdded"]
        return wrong + [one for one in logged if one["params"]["entry"]["level"] == "error"]

    def close(self):
        """End it."""
        self.process.kill()
        self.process.wait()
        os.close(self.commands)
        os.close(self.answers)
        shutil.rmtree(self.profile, ignore_errors=True)
