"""The rasteriser against geometry that can be written down, and images of the default body."""

import numpy as np
import pytest
from PIL import Image

from smpl_jax import raster, render
from smpl_jax.frames import turn
from smpl_jax.io import load_body

SQUARE = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]], np.float32)
# Counter-clockwise seen from the viewer, who looks along +z with y down.
SQUARE_FACES = np.array([[0, 2, 1], [0, 3, 2]])
UPRIGHT = np.tile(np.eye(3, dtype=np.float32), (24, 1, 1))
UPRIGHT[0] = np.diag([1, -1, -1])  # in the camera frame


@pytest.fixture(scope="module")
def body():
    return load_body()


def camera(size=64, distance=4.0):
    return raster.Camera(size, size, focal=size, center=(size / 2, size / 2), translation=(0, 0, distance))


def test_projection_is_x_right_y_down():
    pixel = camera(100, 2.0).project([[0.5, 0.25, 0.0]])
    np.testing.assert_allclose(pixel, [[75.0, 62.5]])


def test_square_covers_the_pixels_whose_centres_it_holds():
    seen = raster.rasterize(SQUARE, SQUARE_FACES, camera(64, 4.0))
    covered = seen.face >= 0
    assert covered.sum() == 32 * 32
    assert covered[16:48, 16:48].all()
    np.testing.assert_allclose(seen.depth[covered], 4.0, rtol=1e-6)
    assert np.isinf(seen.depth[~covered]).all()
    np.testing.assert_allclose(seen.barycentric[covered].sum(-1), 1, atol=1e-6)


def test_barycentric_weights_are_perspective_correct():
    slanted = SQUARE.copy()
    slanted[[1, 2], 2] = 3.0  # the right edge is further away
    view = camera(64, 4.0)
    seen = raster.rasterize(slanted, SQUARE_FACES, view)
    row, column = np.nonzero(seen.face >= 0)
    corners = slanted[SQUARE_FACES[seen.face[row, column]]]
    points = (corners * seen.barycentric[row, column][..., None]).sum(1)
    np.testing.assert_allclose(view.project(points), np.stack([column, row], 1) + 0.5, atol=1e-3)
    np.testing.assert_allclose(points[:, 2] + 4, seen.depth[row, column], rtol=1e-5)


def test_nearer_triangle_wins_whatever_the_order():
    away = np.array([0, 0, 1], np.float32)
    near, far = SQUARE * 0.5 - away, SQUARE + away
    faces = np.concatenate([SQUARE_FACES, SQUARE_FACES + 4])
    for vertices, near_faces in ((np.concatenate([near, far]), (0, 1)), (np.concatenate([far, near]), (2, 3))):
        seen = raster.rasterize(vertices, faces, camera())
        assert seen.face[32, 32] in near_faces
        assert seen.depth[32, 32] == pytest.approx(3.0)


def test_faces_turned_away_are_culled_on_request():
    reverse = SQUARE_FACES[:, ::-1]
    assert (raster.rasterize(SQUARE, reverse, camera()).face == -1).all()
    assert (raster.rasterize(SQUARE, reverse, camera(), cull=False).face >= 0).sum() == 32 * 32


def test_large_triangles_are_drawn_in_parts_that_agree(monkeypatch):
    whole = raster.rasterize(SQUARE, SQUARE_FACES, camera())
    monkeypatch.setattr(raster, "_PAIRS_AT_ONCE", 10)
    parts = raster.rasterize(SQUARE, SQUARE_FACES, camera())
    for a, b in zip(whole, parts):
        np.testing.assert_array_equal(a, b)


def test_what_lies_behind_the_camera_is_not_drawn():
    assert (raster.rasterize(SQUARE, SQUARE_FACES, camera(distance=-4.0), cull=False).face == -1).all()


def test_agrees_with_brute_force_on_a_body(body):
    """Peer: each pixel's ray against every triangle (Möller-Trumbore), in float64."""
    vertices = np.asarray(body.template).T * np.array([1, -1, -1], np.float32)
    view = raster.Camera.looking_at(vertices, 24)
    seen = raster.rasterize(vertices, body.faces, view)
    corners = (vertices.astype(np.float64) + view.translation)[np.asarray(body.faces)]
    a, u, v = corners[:, 0], corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    expected = np.full((24, 24), np.inf)
    for row in range(24):
        for column in range(24):
            ray = np.array([(column + 0.5 - view.center[0]) / view.focal, (row + 0.5 - view.center[1]) / view.focal, 1])
            p = np.cross(ray, v)
            determinant = (u * p).sum(1)
            s = (-a * p).sum(1) / determinant
            q = np.cross(-a, u)
            t = (q @ ray) / determinant
            hit = (determinant > 0) & (s >= 0) & (t >= 0) & (s + t <= 1)
            expected[row, column] = ((v * q).sum(1) / determinant)[hit].min(initial=np.inf)
    assert np.isfinite(expected).sum() > 20
    np.testing.assert_array_equal(np.isfinite(expected), np.isfinite(seen.depth))
    np.testing.assert_allclose(seen.depth, expected, rtol=1e-5)


def test_looking_at_fills_the_image_and_cuts_nothing():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(500, 3)) * [0.5, 1.0, 0.4] + [3, -2, 1]
    view = raster.Camera.looking_at(points, (96, 64), margin=0.05)
    pixel = view.project(points)
    room = np.minimum(pixel - [0.05 * 64, 0.05 * 96], [0.95 * 64, 0.95 * 96] - pixel)
    assert -0.01 < room.min() < 0.1


def test_image_keeps_its_background_and_blends_edges():
    background = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    given = background.copy()
    view = raster.Camera(64, 64, focal=64, center=(32.3, 32.3), translation=(0, 0, 4))
    image = render.render_mesh(SQUARE, SQUARE_FACES, frame="camera", camera=view, background=background, supersample=4)
    np.testing.assert_array_equal(background, given)
    np.testing.assert_array_equal(image[:10], background[:10])
    inside = image[25:40, 25:40].reshape(-1, 3)
    assert np.ptp(inside.astype(int), axis=0).max() <= 12  # a flat square has nearly one shade
    black = render.render_mesh(SQUARE, SQUARE_FACES, frame="camera", camera=view, background=(0, 0, 0), supersample=4)
    assert 0 < black[32, 16, 0] < black[32, 32, 0]


def test_vertex_colours_reach_their_pixels():
    red_left = np.array([[1, 0, 0], [0, 0, 1], [0, 0, 1], [1, 0, 0]], np.float32)
    image = render.render_mesh(
        SQUARE, SQUARE_FACES, frame="camera", camera=camera(), colors=red_left, background=(0, 0, 0)
    )
    assert image[32, 18, 0] > 2 * image[32, 18, 2]
    assert image[32, 45, 2] > 2 * image[32, 45, 0]


def test_light_comes_from_where_it_is_said_to():
    pyramid = np.array([[0, 0, -1], [-1, 0, 0], [0, -1, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    faces = np.array([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]])[:, ::-1]
    left = render.render_mesh(pyramid, faces, frame="camera", camera=camera(), light=(-1, 0, -0.5)).astype(int)
    assert left[32, 26].sum() > left[32, 38].sum() + 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vertices": np.zeros((4, 2))}, "vertices must be"),
        ({"vertices": np.full((4, 3), np.nan)}, "vertices must be finite"),
        ({"faces": np.zeros((1, 3))}, "faces must be integers"),
        ({"faces": [[0, 1, 4]]}, "faces must be vertex indices in \\[0, 4\\); found 0 to 4"),
        ({"faces": [[0, 1, -1]]}, "found -1 to 1"),
        ({"frame": "world"}, "frame must be one of 'model', 'camera', 'z-up'; found 'world'"),
        ({"colors": np.zeros((3, 3))}, "colors must have"),
        ({"background": np.zeros((5, 5, 3))}, "background must have"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"vertices": SQUARE, "faces": SQUARE_FACES, "size": 64} | change
    vertices, faces = arguments.pop("vertices"), arguments.pop("faces")
    with pytest.raises(ValueError, match=message):
        render.render_mesh(vertices, faces, **{"frame": "camera"} | arguments)


def test_upright_body_faces_the_viewer_head_up(body):
    """The convention of ChatPose's poses: root Rx(pi) in a frame with y down."""
    paint = np.zeros((body.num_vertices, 3), np.float32)
    rest = np.asarray(body.template).T
    paint[rest[:, 1] > 0.3] = [1, 0, 0]  # head
    paint[(rest[:, 0] > 0.3)] = [0, 1, 0]  # the body's left arm
    # The tip of the nose: a small patch that only a viewer in front of the body sees.
    nose = rest[body.vertex_id("nose")]
    paint[np.linalg.norm(rest - nose, axis=1) < 0.02] = [0, 0, 1]
    plain = {"size": 256, "colors": paint, "background": (1, 1, 1), "ground": False}
    image = render.render_body(body, UPRIGHT, frame="camera", **plain).astype(int)
    r, g, b = np.moveaxis(image, -1, 0)
    red, green, blue = ((r > g + 40) & (r > b + 40), (g > r + 40) & (g > b + 40), (b > r + 40) & (b > g + 40))
    rows, columns = np.nonzero(red)
    assert rows.mean() < 100  # head above the middle
    assert blue.sum() >= 4  # and it faces us
    assert np.nonzero(green)[1].mean() > columns.mean() + 40  # so its left is on our right
    back = render.render_body(body, UPRIGHT, frame="camera", views=("back",), **plain)
    r, g, b = np.moveaxis(back.astype(int), -1, 0)
    assert not ((b > r + 40) & (b > g + 40)).any()
    # The same person told as smplx does, by an identity root, needs no frame; AMASS's needs its own.
    for root, options in ((np.eye(3), {}), (turn("model", "z-up"), {"frame": "z-up"})):
        pose = UPRIGHT.copy()
        pose[0] = root
        same = render.render_body(body, pose, **options, **plain).astype(int)
        assert np.abs(same - image).max() <= 2


def test_a_mesh_is_drawn_in_the_frame_it_is_told_in(body):
    rest = np.asarray(body.template).T
    upright = render.render_mesh(rest, body.faces, frame="model", size=64)
    turned = rest @ turn("model", "camera").T.astype(np.float32)
    np.testing.assert_array_equal(upright, render.render_mesh(turned, body.faces, frame="camera", size=64))
    wide = (upright != upright[0, 0]).any(-1).sum(1)
    assert wide[:24].max() > 40 > wide[32:].max()  # the arms are in the upper half
    with pytest.raises(TypeError, match="frame"):
        render.render_mesh(rest, body.faces)


def test_views_stand_side_by_side(body):
    image = render.render_body(body, UPRIGHT, size=(96, 64), views=("front", "side"), frame="camera")
    assert image.shape == (96, 128, 3) and image.dtype == np.uint8
    front, side = image[:, :64], image[:, 64:]
    inked = [(np.abs(p.astype(int) - p[0, 0]).sum(-1) > 60).any(0).sum() for p in (front, side)]
    assert inked[0] > 1.5 * inked[1]  # arms spread: wide from the front, narrow from the side
    with pytest.raises(ValueError, match="views must be"):
        render.render_body(body, UPRIGHT, views=("above",))
    with pytest.raises(ValueError, match="frame must be"):
        render.render_body(body, UPRIGHT, frame="world")


def test_clothes_follow_the_joints(body):
    colors = render.clothing_colors(
        body, skin=(1, 0, 0), shirt=(0, 1, 0), trousers=(0, 0, 1), shoes=(0, 0, 0), hair=(1, 1, 1)
    )
    for name, color in (
        ("nose", (1, 0, 0)),
        ("left_middle_tip", (1, 0, 0)),
        ("left_kneecap", (0, 0, 1)),
        ("right_heel", (0, 0, 0)),
        ("head_top", (1, 1, 1)),
    ):
        np.testing.assert_allclose(colors[body.vertex_id(name)], color, atol=0.02, err_msg=name)
    chest = np.argmin(np.linalg.norm(np.asarray(body.template).T - np.array([0.05, 0.12, 0.12]), axis=1))
    np.testing.assert_allclose(colors[chest], (0, 1, 0), atol=0.02)


def test_shadow_lies_on_the_floor_only(body):
    plain = render.render_body(body, UPRIGHT, size=128, ground=False, frame="camera").astype(int)
    shadowed = render.render_body(body, UPRIGHT, size=128, ground=True, frame="camera").astype(int)
    darker = (plain - shadowed).sum(-1)
    assert darker.min() >= -6
    rows = np.nonzero((darker > 20).any(1))[0]
    assert len(rows) and rows.min() > 90


def test_contact_sheet_and_png(tmp_path):
    tiles = [np.full((10, 8, 3), 40 * k, np.uint8) for k in range(3)]
    sheet = render.contact_sheet(tiles, columns=2, gap=2)
    assert sheet.shape == (2 * 12 + 2, 2 * 10 + 2, 3)
    np.testing.assert_array_equal(sheet[2:12, 2:10], tiles[0])
    np.testing.assert_array_equal(sheet[2:12, 12:20], tiles[1])
    labelled = render.contact_sheet(tiles, columns=3, labels=["a", "b", "c"], gap=2)
    assert labelled.shape == (10 + 16 + 2 * 2, 3 * 10 + 2, 3)
    assert (labelled[12:28] < 128).any()  # text below the images
    path = render.save_png(tmp_path / "new" / "sheet.png", sheet)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), sheet)
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]
    with pytest.raises(ValueError, match="as many labels"):
        render.contact_sheet(tiles, 2, ["one"])


def test_normals_are_unit_where_no_face_gives_a_direction():
    """Loose vertices, a face without area, faces that cancel, edges whose squares vanish in float32."""
    points = np.zeros((12, 3), np.float32)
    points[1:3] = [[1, 0, 0], [0, 1, 0]]
    points[4:6] = [[1, 1, 1], [2, 2, 2]]  # with 3 on one line
    points[7:9] = [[1e-30, 0, 0], [0, 0, 1e-30]]
    points[10:12] = [[1e20, 0, 0], [0, 1e20, 0]]
    normals = raster.vertex_normals(points, np.array([[0, 1, 2], [3, 4, 5], [6, 8, 7], [9, 10, 11]]))
    expected = np.array([[0, 0, 1], [0, 1, 0], [0, 1, 0], [0, 0, 1]]).repeat(3, 0)
    np.testing.assert_array_equal(normals, expected)
    flat = raster.vertex_normals(points[:3], np.array([[0, 1, 2], [0, 2, 1]]))
    np.testing.assert_array_equal(flat, np.tile([0, 1, 0], (3, 1)))
