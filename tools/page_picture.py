"""Makes docs/images/page.png: the page of ``chatpose serve`` with two questions to the toy model of the package, in Chromium.

python tools/page_picture.py            # needs the extras dev and serve, and Chromium (Debian: apt install chromium)
python tools/page_picture.py --out x.png --model out/pretrained/model --dark --width 390
"""

import argparse
import io
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = (
    "A person crouches in a squat. Both arms are held out to the sides. The head turns right. What is the pose in SMPL?",
    "And what if you raise both arms above the head?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "docs/images/page.png")
    parser.add_argument("--model", type=Path, help="a model folder; default: the toy")
    parser.add_argument("--question", action="append", help="instead of the two; may be repeated")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--width", type=int, default=1200)
    parser.add_argument("--height", type=int, default=750)
    args = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "chatpose_jax.cli",
        "serve",
        *([args.model] if args.model else []),
        "--port",
        str(port),
    ]
    server = subprocess.Popen(command)
    try:
        address = f"http://127.0.0.1:{port}/"
        wait(address)
        shot = Image.open(io.BytesIO(picture(address, args)))
    finally:
        server.terminate()
        server.wait()
    shot.convert("RGB").save(args.out, optimize=True)
    print(f"{args.out}: {args.out.stat().st_size / 1000:.0f} kB")


def wait(address: str) -> None:
    """Until the model is there."""
    while True:
        try:
            urllib.request.urlopen(address + "health", timeout=5).close()
            return
        except OSError:
            time.sleep(0.5)


def picture(address: str, args: argparse.Namespace) -> bytes:
    """PNG of the page after the questions."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as started:
        switches = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
        browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=switches)
        scheme = "dark" if args.dark else "light"
        size = {"width": args.width, "height": args.height}
        page = browser.new_page(viewport=size, color_scheme=scheme, reduced_motion="reduce")
        page.set_default_timeout(300_000)
        page.goto(address)
        page.wait_for_selector(".health[data-state=ready]")
        for count, question in enumerate(args.question or QUESTIONS, 1):
            page.fill("#question", question)
            page.keyboard.press("Enter")
            answered = page.locator(".message.assistant[aria-busy=false]")
            while answered.count() < count:
                page.wait_for_timeout(100)
        page.wait_for_timeout(3000)
        page.focus("#canvas")
        for _ in range(2):
            page.keyboard.press("ArrowLeft")
        page.focus("#question")
        page.wait_for_timeout(2000)
        shot = page.screenshot()
        browser.close()
        return shot


if __name__ == "__main__":
    main()
