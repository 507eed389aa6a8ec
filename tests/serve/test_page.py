"""The page: its files and policy, and what a person does with it, in a real Chromium against a real server."""

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")

from starlette.applications import Starlette
from starlette.testclient import TestClient

import smpl_jax
from chatpose_jax.chat import DEMO, load
from chatpose_jax.engine import Engine
from chatpose_jax.serve import page
from chatpose_jax.serve.openai import ApiError
from smpl_jax.frames import turn
from smpl_jax.rotations import axis_angle_to_matrix, matrix_to_axis_angle

from .running import Running

OWN = [path for path in page.FOLDER.rglob("*") if path.is_file() and "vendor" not in path.parts]
IMPORTED = re.compile(r"""^(?:import|export)\b[^'"]*?\bfrom\s*['"]([^'"]+)['"]|\bimport\(['"]([^'"]+)""", re.MULTILINE)


# --- the files


def test_files_are_served_with_their_types_and_the_policy():
    client = TestClient(Starlette(routes=page.routes()))
    for path in page.FOLDER.rglob("*"):
        name = path.relative_to(page.FOLDER).as_posix()
        answer = client.get("/" if name == "index.html" else f"/page/{name}")
        if path.suffix not in page.TYPES:
            assert answer.status_code == 404
            continue
        assert answer.status_code == 200 and answer.content == path.read_bytes()
        assert answer.headers["content-type"] == page.TYPES[path.suffix]
        assert answer.headers["x-content-type-options"] == "nosniff"
        rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
        assert rules["default-src"] == "'none'" and "unsafe" not in str(rules)
        assert {rules[name] for name in ("style-src", "connect-src")} == {"'self'"}
        assert re.fullmatch(r"'self' 'sha256-[\w+/]{43}='", rules["script-src"])
        again = client.get(answer.request.url.path, headers={"If-None-Match": answer.headers["etag"]})
        assert again.status_code == 304 and not again.content
    for wrong in ("/page/", "/page/none.js", "/page/../__init__.py", "/page/%2e%2e/__init__.py", "/page/vendor"):
        assert client.get(wrong).status_code == 404


def test_no_file_names_an_address_outside_and_every_import_is_here():
    index = (page.FOLDER / "index.html").read_text()
    names = json.loads(re.findall(r'importmap">(.*?)</script>', index)[0])["imports"]
    for path in OWN:
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"\w+://|['\"]//\w", text), path
    for path in page.FOLDER.rglob("*.js"):
        for found in IMPORTED.findall(path.read_text()):
            name = found[0] or found[1]
            known = next((key for key in sorted(names, key=len)[::-1] if name == key or (key[-1] == "/" and name.startswith(key))), None)  # fmt: skip
            if known:
                target = page.FOLDER / names[known].removeprefix("./page/") / name.removeprefix(known)
            else:
                assert name.startswith("."), f"{path}: {name}"
                target = path.parent / name
            assert target.resolve().is_file(), f"{path}: {name}"
    for name in re.findall(r'(?:href|src)="([^"#]+)"', index):
        assert (page.FOLDER / name.removeprefix("page/")).is_file(), name


def test_vendored_files_are_those_of_their_packages():
    vendor = page.FOLDER / "vendor"
    listed = dict(
        re.findall(r"^\| `([^`]+)` \| `([0-9a-f]{64})` \|$", (vendor / "README.md").read_text(), re.MULTILINE)
    )
    files = [path for path in vendor.rglob("*") if path.is_file() and path.name != "README.md"]
    held = {path.relative_to(vendor).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert held == listed and "three/LICENSE" in listed


def test_every_id_and_label_that_the_scripts_use_is_in_the_page():
    index = (page.FOLDER / "index.html").read_text()
    ids = re.findall(r'\bid="([\w-]+)"', index)
    assert len(ids) == len(set(ids))
    used = {
        name for path in OWN if path.suffix == ".js" for name in re.findall(r"\bthe\('([\w-]+)'\)", path.read_text())
    }
    assert used <= set(ids)
    for attribute in ("for", "aria-controls", "aria-labelledby", "aria-describedby"):
        assert set(re.findall(rf'\b{attribute}="([\w-]+)"', index)) <= set(ids)


# --- in a browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SWITCHES = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
WAIT = 120_000
"""Milliseconds: a machine that runs the tests may be slow, and a body is drawn without a graphics card."""
CACHED = 'chatpose_prompt_tokens_total{source="cached"}'
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "heads.png"


def serving(**options):
    """A server of the toy model."""

    def toy():
        model = load(DEMO)
        model.engine = Engine(model.config, model.params, model.engine.tail.tolist(), slots=2, capacity=512)
        return model

    return Running(None, load=toy, grace=0, note="this one is a toy", **options)


@pytest.fixture(scope="module")
def running():
    with serving(key=None) as server:
        yield server


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright (the dev extra)")
    if CHROMIUM is None:
        pytest.skip("no Chromium here: on Debian, apt install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=SWITCHES)
        yield browser
        browser.close()


WATCHED = """
window.violations = [];
document.addEventListener('securitypolicyviolation', (event) => violations.push(`${event.violatedDirective} ${event.blockedURI}`));
localStorage.getItem('chatpose-settings') ?? localStorage.setItem('chatpose-settings', '{"force": true, "tokens": 32}');
"""


@contextlib.contextmanager
def opened(chromium, running, *, strict=True, **options):
    """A fresh page. At its end: no script failed, nothing was asked outside the server, and the policy stopped nothing."""
    options = {"viewport": {"width": 1280, "height": 800}, "reduced_motion": "reduce", **options}
    context = chromium.new_context(**options)
    context.add_init_script(WATCHED)
    shown, failed, asked = context.new_page(), [], []
    shown.set_default_timeout(WAIT)
    shown.on("pageerror", lambda error: failed.append(str(error)))
    shown.on("request", lambda request: asked.append(request.url))
    try:
        shown.goto(running.address)
        yield shown
        assert not failed
        assert {
            url for url in asked if not url.startswith((running.address + "/", "data:", "blob:" + running.address))
        } == set()
        assert not strict or shown.evaluate("violations") == []
    finally:
        context.close()


def ready(shown, state="ready"):
    shown.wait_for_selector(f".health[data-state={state}]")


def until(shown, expression, argument=None):
    """Waits until an expression holds. Playwright's own waiting evaluates a text within the page, which the policy forbids."""
    deadline = time.monotonic() + WAIT / 1000
    while not shown.evaluate(expression, argument):
        assert time.monotonic() < deadline, expression
        shown.wait_for_timeout(50)


def ask(shown, text):
    """Asks, waits for the whole answer, and gives its element."""
    answers = shown.locator(".message.assistant")
    before = answers.count()
    shown.fill("#question", text)
    shown.keyboard.press("Enter")
    until(shown, "n => document.querySelectorAll('.message.assistant[aria-busy=false]').length === n", before + 1)
    return answers.last


def drawn(shown):
    """The 3D view as it is now: (H, W, 3)."""
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(shown.locator("#canvas").screenshot())).convert("RGB"), np.int16)


def settled(shown):
    """Waits until a body stands in the view."""
    until(shown, "document.querySelector('#nothing').hidden && document.querySelector('.card[data-drawn]')")
    shown.wait_for_timeout(1500)


def stored(shown):
    """The conversation as the browser keeps it."""
    return shown.evaluate(
        """() => new Promise((resolve) => {
          const asked = indexedDB.open('chatpose', 1);
          asked.onsuccess = () => {
            const got = asked.result.transaction('talk').objectStore('talk').get('now');
            got.onsuccess = () => { asked.result.close(); resolve(got.result?.messages); };
          };
        })"""
    )


@pytest.mark.slow
def test_a_conversation_from_the_key_to_a_reload(chromium):
    with contextlib.ExitStack() as servers:
        running = servers.enter_context(serving())
        with opened(chromium, running) as shown:
            ready(shown, "locked")
            shown.fill("#key", "wrong")
            shown.keyboard.press("Enter")
            shown.wait_for_selector("#key-wrong:not([hidden])")
            shown.fill("#key", "secret")
            shown.keyboard.press("Enter")
            ready(shown)
            assert shown.evaluate("document.activeElement.id") == "question" and shown.is_hidden("#key-dialog")
            assert shown.inner_text("#about") == "This one is a toy" and shown.inner_text("#model") == "tiny"
            empty = drawn(shown)
            answer = ask(shown, "Show me someone who kneels.")
            settled(shown)
            filled = drawn(shown)
            rows = min(len(empty), len(filled))
            assert np.abs(filled[:rows] - empty[:rows]).max() > 60
            assert answer.locator(".card").count() == len(stored(shown)[1]["poses"]) > 0
            assert "body in the 3D view" in shown.inner_text("#status") or "bodies" in shown.inner_text("#status")

            # A picture is dropped; it is seen, sent, and stays with the conversation.
            data = PICTURE.read_bytes()
            dropped = shown.evaluate_handle(
                """(bytes) => {
                  const data = new DataTransfer();
                  data.items.add(new File([new Uint8Array(bytes)], 'a.png', { type: 'image/png' }));
                  return data;
                }""",
                list(data),
            )
            shown.dispatch_event("#scroll", "drop", {"dataTransfer": dropped})
            shown.wait_for_selector("#pictures img")
            read = running.metrics()[CACHED]
            with shown.expect_request("**/chat/completions") as sent:
                ask(shown, "And this one?")
            said = sent.value.post_data_json["messages"]
            assert [message["role"] for message in said] == ["user", "assistant", "user"]
            assert (
                said[0]["content"] == "Show me someone who kneels." and said[1]["content"] == stored(shown)[1]["text"]
            )
            assert said[2]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
            assert sent.value.headers["authorization"] == "Bearer secret"
            shown.wait_for_selector("#asked:not([hidden])")
            assert running.metrics()[CACHED] > read + 10  # the first turn was not read again

            # Everything is there again after a reload, the bodies too, though the server has forgotten them.
            running.server.poses._held.clear()
            before = stored(shown)
            shown.reload()
            ready(shown)
            settled(shown)
            assert stored(shown) == before and shown.locator(".message").count() == 4
            assert shown.locator(".message.user img").count() == 1 and shown.is_hidden("#reason")

            # The server goes away, and comes back.
            servers.close()
            shown.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
            ready(shown, "gone")
            assert (
                "does not answer" in shown.inner_text("#banner") and shown.get_attribute("#banner", "role") == "alert"
            )
            assert shown.is_disabled("#send") and shown.locator(".message").count() == 4
            servers.enter_context(serving(port=running.port))
            ready(shown)
            assert shown.is_hidden("#banner")

            shown.click("#new")
            shown.click("#forget")
            assert shown.locator(".message").count() == 0 and shown.is_visible("#welcome")
            shown.wait_for_timeout(500)
            assert not stored(shown)


@pytest.mark.slow
def test_a_body_moves_and_obeys_keys(chromium, running):
    with opened(chromium, running, reduced_motion="no-preference") as shown:
        ready(shown)
        ask(shown, "A person lies on the floor. What is the pose in SMPL?")
        settled(shown)
        assert shown.get_attribute("#turn", "aria-pressed") == "true"
        first = drawn(shown)
        shown.wait_for_timeout(2000)
        assert (np.abs(drawn(shown) - first).max(-1) > 30).mean() > 0.001
        shown.focus("#canvas")
        shown.keyboard.press("0")
        shown.wait_for_timeout(500)
        assert shown.get_attribute("#turn", "aria-pressed") == "false"
        front = drawn(shown)
        shown.wait_for_timeout(1000)
        np.testing.assert_allclose(drawn(shown), front, atol=2)
        for key in ("ArrowLeft", "+"):
            shown.keyboard.press(key)
        shown.wait_for_timeout(1000)
        assert (np.abs(drawn(shown) - front).max(-1) > 30).mean() > 0.001
        shown.keyboard.press("0")
        shown.click("#axes")
        shown.wait_for_timeout(500)
        assert "camera frame" in shown.inner_text("#frame")
        red = drawn(shown)[..., 0] - drawn(shown)[..., 1:].max(-1)
        assert (red > 100).any() and shown.get_attribute("#axes", "aria-pressed") == "true"


@pytest.mark.slow
def test_who_wants_no_motion_sees_none(chromium, running):
    with opened(chromium, running) as shown:
        ready(shown)
        ask(shown, "Still?")
        settled(shown)
        assert shown.get_attribute("#turn", "aria-pressed") == "false"
        first = drawn(shown)
        shown.wait_for_timeout(1500)
        np.testing.assert_allclose(drawn(shown), first, atol=2)  # gradients are dithered


@pytest.mark.slow
def test_the_browser_skins_as_the_body_model_does(chromium, running):
    """Of two answers: the surface at both ends of the slider is smpl_jax's, joints turn the shortest way between, and a skeleton has its joints."""
    with opened(chromium, running) as shown:
        ready(shown)
        for text in ("Show me someone who kneels.", "Please raise both arms above the head."):
            ask(shown, text)
        poses = [pose for message in stored(shown)[1::2] for pose in message["poses"]]
        first, second = poses[0], poses[-1]
        assert np.abs(np.subtract(first["axis_angle"], second["axis_angle"])).max() > 0.01
        found = shown.evaluate(
            """async ([first, second]) => {
              const { Figure, fromGlb, fromJson } = await import('/page/rig.js');
              const file = async ({ id }) => (await fetch(`/v1/poses/${id}.glb`)).arrayBuffer();
              const rigs = await Promise.all([first, second].map(async (pose) => fromGlb(await file(pose))));
              const figure = new Figure(rigs[0]);
              const read = (t) => {
                figure.mix(...rigs, t);
                const points = [...figure.mesh.geometry.attributes.position.array];
                return { points, body: figure.body.position.toArray(), turns: figure.bones.map((bone) => bone.quaternion.toArray()) };
              };
              const bare = fromJson(first);
              const sticks = new Figure(bare);
              sticks.updateMatrixWorld(true);
              const joints = sticks.bones.map((bone) => sticks.body.worldToLocal(bone.getWorldPosition(figure.position.clone())).toArray());
              return { first: read(0), middle: read(0.5), last: read(1), joints };
            }""",
            [first, second],
        )
        flip = turn("camera")
        for end, pose in (("first", first), ("last", second)):
            posed = running.server.poses.get(pose["id"])
            expected = posed.vertices @ flip.T
            np.testing.assert_allclose(np.reshape(found[end]["points"], (-1, 3)), expected, atol=2e-5)
            assert abs(expected[:, 1].min() + found[end]["body"][1]) < 2e-5  # it stands on the floor
        np.testing.assert_allclose(found["joints"], np.asarray(first["joints"]) @ flip.T, atol=2e-5)
        one, two = (np.asarray(axis_angle_to_matrix(np.asarray(pose["axis_angle"][1:]))) for pose in (first, second))
        half = one @ np.asarray(axis_angle_to_matrix(matrix_to_axis_angle(one.transpose(0, 2, 1) @ two) / 2))
        quaternions = np.asarray(found["middle"]["turns"])[1:]
        np.testing.assert_allclose(np.asarray(rotation_of(quaternions)), half, atol=2e-4)

        # The slider in the page.
        settled(shown)
        shown.click("#between")
        shown.wait_for_timeout(1000)
        start = drawn(shown)
        shown.fill("#amount", "100")
        shown.wait_for_timeout(1000)
        assert (np.abs(drawn(shown) - start).max(-1) > 30).any()
        assert shown.get_attribute("#amount", "aria-valuetext").startswith("100 percent from Pose")


def rotation_of(xyzw):
    from smpl_jax.rotations import quaternion_to_matrix

    return quaternion_to_matrix(xyzw[:, [3, 0, 1, 2]])


@pytest.mark.slow
def test_every_joint_of_a_vertex_counts(chromium, running, tmp_path):
    """three.js draws with four joints a vertex; SMPL-X's files have more."""
    body = smpl_jax.load_body()
    weights = np.asarray(body.weights)
    body = dataclasses.replace(body, weights=0.7 * weights + 0.3 / 6 * (np.arange(len(weights)) < 6)[:, None])
    angles = np.random.default_rng(0).normal(0, 0.5, (24, 3)).astype(np.float32)
    posed = smpl_jax.PosedBody(smpl_jax.Pose(np.asarray(axis_angle_to_matrix(angles)), "model"), body)
    data = base64.b64encode(posed.save(tmp_path / "pose.glb").read_bytes()).decode()
    with opened(chromium, running) as shown:
        points = shown.evaluate(
            """async (data) => {
              const { Figure, fromGlb } = await import('/page/rig.js');
              const figure = new Figure(await fromGlb(Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0)).buffer));
              return [...figure.mesh.geometry.attributes.position.array];
            }""",
            data,
        )
    np.testing.assert_allclose(np.reshape(points, (-1, 3)), posed.vertices, atol=2e-5)


@pytest.mark.slow
def test_poses_of_one_answer_stand_side_by_side(chromium, running):
    """The toy gives one pose an answer; here its poses come back as one answer with two, the second of which has samples."""
    with opened(chromium, running) as shown:
        ready(shown)
        for text in ("Show me someone who kneels.", "Please raise both arms above the head."):
            ask(shown, text)
        one, two = (message["poses"][0] for message in stored(shown)[1::2])
        two = {**two, "samples": [{name: pose[name] for name in ("id", "axis_angle", "joints")} for pose in (two, one)]}
        deltas = [{"content": "One: <POSE>", "poses": [one]}, {"content": ", other: <POSE>.", "poses": [two]}]
        events = [{"choices": [{"delta": delta, "finish_reason": None}]} for delta in deltas]
        events.append({"choices": [{"delta": {}, "finish_reason": "stop"}]})
        body = "".join(f"data: {event}\n\n" for event in [*map(json.dumps, events), "[DONE]"])
        shown.route("**/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))
        answer = ask(shown, "Both?")
        assert answer.locator(".text").inner_text() == "One: pose 3, other: pose 4."
        names = ["Pose 3", "Pose 4, sample 1", "Pose 4, sample 2"]
        until(shown, "document.querySelectorAll('#labels span').length === 3")
        assert (
            shown.locator("#labels span").all_inner_texts() == shown.locator("#tabs button").all_inner_texts() == names
        )
        shown.wait_for_timeout(1500)
        places = [sign.bounding_box()["x"] for sign in shown.locator("#labels span").all()]
        assert places == sorted(places) and min(np.diff(places)) > 50
        shown.click("#tabs button:first-child")
        assert shown.inner_text("#files-of") == "Save pose 3"
        shown.locator(".mention").last.click()
        assert shown.inner_text("#files-of") == "Save pose 4, sample 1"


@pytest.mark.slow
def test_files_are_saved_and_json_is_copied(chromium, running):
    with opened(chromium, running, permissions=["clipboard-read", "clipboard-write"]) as shown:
        ready(shown)
        ask(shown, "Files?")
        settled(shown)
        pose = stored(shown)[1]["poses"][-1]
        for kind, begins in (("glb", b"glTF"), ("npz", b"PK"), ("png", b"\x89PNG"), ("obj", b"# y up")):
            with shown.expect_download() as saved:
                shown.click(f"[data-save={kind}]")
            data = Path(saved.value.path()).read_bytes()
            assert data.startswith(begins) and re.fullmatch(rf"pose-\d+\.{kind}", saved.value.suggested_filename)
        shown.click("#copy")
        until(shown, "document.querySelector('#copy').textContent === 'Copied'")
        assert json.loads(shown.evaluate("navigator.clipboard.readText()"))["axis_angle"] == pose["axis_angle"]
        ask(shown, "And these?")
        settled(shown)
        # Forgotten by the server: GLB from the browser, PNG drawn by the page, NPZ with its reason.
        running.server.poses._held.clear()
        for kind in ("glb", "png"):
            with shown.expect_download() as saved:
                shown.click(f"[data-save={kind}]")
            assert Path(saved.value.path()).stat().st_size > 1000
        shown.click("[data-save=npz]")
        shown.wait_for_selector("#reason:not([hidden])")
        assert "for a while" in shown.inner_text("#reason")


@pytest.mark.slow
def test_a_licensed_body_and_a_lost_one_are_skeletons_that_say_why(chromium, running, monkeypatch):
    monkeypatch.setattr(running.server, "may_share", lambda pose: False)
    with opened(chromium, running) as shown:
        ready(shown)
        ask(shown, "Licensed?")
        settled(shown)
        shown.wait_for_selector("#reason:not([hidden])")
        assert "--share-body" in shown.inner_text("#reason")
        assert shown.is_disabled("[data-save=glb]") and shown.is_enabled("[data-save=png]")
        running.server.poses._held.clear()
        shown.reload()
        ready(shown)
        settled(shown)
        shown.wait_for_selector("#reason:not([hidden])")
        assert "this one is gone" in shown.inner_text("#reason")
        green = drawn(shown)[..., 1] - drawn(shown)[..., 0]
        assert (green > 40).sum() > 300


@pytest.mark.slow
def test_without_webgl_the_server_draws(chromium, running):
    flat = chromium.browser_type.launch(executable_path=CHROMIUM, args=["--disable-3d-apis"])
    try:
        with opened(flat, running) as shown:
            ready(shown)
            ask(shown, "Show me someone who kneels.")
            for image in ("#flat", ".card img"):
                shown.wait_for_selector(f"{image}[src^=blob]:not([hidden])")
                assert shown.evaluate(f"document.querySelector('{image}').decode().then(() => true)")
            assert "WebGL" in shown.inner_text("#nothing") and shown.is_hidden("#corner")
    finally:
        flat.close()


@pytest.mark.slow
def test_an_answer_can_be_stopped_and_a_failed_one_tried_again(chromium, running, monkeypatch):
    with opened(chromium, running) as shown:
        ready(shown)
        with running.held():
            shown.fill("#question", "Long?")
            shown.keyboard.press("Enter")
            shown.wait_for_selector("#stop:not([hidden])")
            assert shown.is_hidden("#send")
            shown.keyboard.press("Escape")
            shown.wait_for_selector(".message.assistant[aria-busy=false]")
            assert "You stopped" in shown.inner_text(".fault")
        shown.click("#new")
        shown.click("#forget")

        def full(*_):
            raise ApiError(429, "too many requests wait", "queue_full", kind="rate_limit_error", Retry_After="3")

        monkeypatch.setattr(running.server, "understood", full)
        failed = ask(shown, "Again?")
        assert "too many requests wait. It may be free in about 3 s" in failed.locator(".fault").inner_text()
        monkeypatch.undo()
        failed.locator("button", has_text="Try again").click()
        until(shown, "!document.querySelector('.fault') && !document.querySelector('[aria-busy=true]')")
        assert stored(shown)[-1]["state"] == "done"


@pytest.mark.slow
def test_the_policy_holds(chromium, running):
    with opened(chromium, running, strict=False) as shown:
        ready(shown)
        shown.evaluate("""() => {
          const script = document.createElement('script');
          try { script.textContent = 'window.broken = 1'; document.head.append(script); } catch { /* trusted types */ }
          document.body.setAttribute('style', 'color: red');
        }""")
        told = shown.evaluate("fetch('https://127.0.0.1:9/x').then(() => 'sent', () => 'refused')")
        assert told == "refused" and shown.evaluate("window.broken") is None
        names = {line.split()[0] for line in shown.evaluate("violations")}
        assert "connect-src" in names and names & {"require-trusted-types-for", "script-src-elem"}


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 1280), ("light", 390)])
def test_axe_finds_no_serious_fault(chromium, running, scheme, width):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"color_scheme": scheme, "viewport": {"width": width, "height": 844}}
    with opened(chromium, running, strict=False, **options) as shown:
        ready(shown)

        def check(state):
            found = [
                fault for fault in axe.run(shown).response["violations"] if fault["impact"] in ("serious", "critical")
            ]
            serious = [(fault["id"], [node["html"] for node in fault["nodes"]]) for fault in found]
            assert not serious, (state, serious)
            assert shown.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

        check("empty")
        ask(shown, "One?")
        ask(shown, "Two?")
        settled(shown)
        check("with bodies")
        shown.click("#between")
        check("slider")
        shown.click("#open-settings")
        check("settings")
