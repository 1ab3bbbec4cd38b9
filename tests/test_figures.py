"""Sheets of episodes: colours at known pixels, columns, notes, files, refusals."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from untrained import small_config, untrained_run

from qpenet_jax import InputError
from qpenet_jax.core.types import Episode
from qpenet_jax.evaluation import pictures
from qpenet_jax.evaluation.pictures import PREDICTION, SUPPORT, TILE, TRUTH, Scene
from qpenet_jax.models.layers import ConvReLU, Convs, unit_rms
from qpenet_jax.paper import figures
from qpenet_jax.paper.sheets import (
    AUX,
    BACKGROUND,
    DARK,
    MAIN,
    SHEETS,
    ShownEpisode,
    at_input_size,
    background_note,
    draw_sheet,
)
from qpenet_jax.runs.build import build_backbone, build_predictor, complete
from qpenet_jax.runs.datasets import build_dataset, build_eval_samplers, build_protocol
from qpenet_jax.runs.folder import TrainedRun, claim, inputs_of, open_run
from qpenet_jax.training.step import episode_features

SIDE, GRID = 65, 9


# Hand-made: pictures as wide as a tile, whose content fills the upper half of the
# network's input, so that column j of the feature grid is centred on 3.5 * 8 j.

SCALE = TILE / (SIDE - 1)
MIDDLE = 36 * SCALE  # between the last column of "left" and the first of "right"
MARGIN = np.tile(np.where(np.arange(SIDE) < 32, -1.0, 1.0), (SIDE, 1)).astype("f4")
BLACK = (0, 0, 0)


def half(where):
    """A margin that is positive in the grid's left or right half."""
    left = np.arange(GRID) <= GRID // 2
    wins = np.tile(left if where == "left" else ~left, (GRID, 1))
    return at_input_size(np.where(wins, 5.0, -5.0).astype(np.float32))


def scene():
    black = np.zeros((TILE // 2, TILE, 3), np.uint8)
    mask = np.zeros(black.shape[:2], np.uint8)
    mask[14:98, 28:196] = 1
    return Scene("dog\n#3", black, mask, black + 40, mask)


def maps_of(*without, **changes):
    ramp = np.tile(np.linspace(0.2, 0.9, GRID, dtype=np.float32), (GRID, 1))
    maps = {
        "prediction": MARGIN,
        "y_pre": half("left"),
        "y_rev": half("left"),
        "A_main": at_input_size(ramp),
        "A_aux": np.zeros((SIDE, SIDE), np.float32),
        "y_bg_q": half("right"),
        "y_bg_clean": half("left"),
    }
    return {k: v for k, v in (maps | changes).items() if k not in without}


def shown_episodes(**runs):
    return [ShownEpisode(scene(), margin, runs) for margin in (MARGIN, -MARGIN)]


def tile_of(column, maps, shown=None, resize="pad", sheet="evolution"):
    """Return the pixels of a tile, of one run called "run"."""
    episode = ShownEpisode(shown or scene(), MARGIN, {"run": maps})
    columns, ((_, tiles),), *_ = draw_sheet(SHEETS[sheet], [episode], resize)
    assert len(tiles) == len(columns)
    return np.asarray(tiles[columns.index(column)])


def pixel(tile, x, y=80):
    return tuple(np.asarray(tile)[y, x].tolist())


def tint(colour, grey=0):
    return tuple(c // 2 + grey // 2 for c in colour)


LEFT = {60: tint(PREDICTION), 160: BLACK}
RIGHT = {60: BLACK, 160: tint(PREDICTION)}
CONTOUR = {28: TRUTH, 195: TRUTH}
REGIONS = "support: main, aux (y_rev)"


@pytest.mark.parametrize(
    ("sheet", "column", "colours"),
    [
        ("evolution", "query by P_pre (y_pre)", LEFT | CONTOUR),
        (
            "evolution",
            REGIONS,
            {60: tint(MAIN, 40), 160: tint(AUX, 40), 210: (40,) * 3},
        ),
        ("evolution", "A_aux", {100: BLACK}),
        ("evolution", "prediction", RIGHT | CONTOUR),
        ("background", "run: P_global", {60: BLACK, 160: tint(BACKGROUND)}),
        ("background", "run: P_bg", {60: tint(BACKGROUND), 160: BLACK, 28: TRUTH}),
        ("predictions", "cosine", RIGHT),
        ("predictions", "run", RIGHT),
    ],
)
def test_colours_at_known_pixels(sheet, column, colours):
    drawn = tile_of(column, maps_of(), sheet=sheet)
    assert {x: pixel(drawn, x) for x in colours} == colours


def regions(maps, shown=None, resize="pad"):
    """Return where main and aux are drawn, below the tile's note."""
    drawn = tile_of(REGIONS, maps, shown, resize)[40 : TILE // 2]
    return [
        (drawn == colour).all(-1) | (drawn == tint(colour, 40)).all(-1)
        for colour in (MAIN, AUX)
    ]


def test_regions_of_the_support():
    shown = scene()
    main, aux = regions(maps_of())
    np.testing.assert_array_equal(main ^ aux, shown.support_mask[40:] == 1)
    columns = [np.flatnonzero(region.any(axis=0))[[0, -1]] for region in (main, aux)]
    np.testing.assert_allclose(columns, [[28, MIDDLE], [MIDDLE, 195]], atol=2)
    shown.support_mask[14:98, 28:60] = 255
    main, aux = regions(maps_of(), shown)
    assert not (main | aux)[:, :60].any()  # ignored pixels are in none
    assert main[:50, 60:100].all()
    below = maps_of(y_rev=half("right").T)
    assert not regions(below)[0].any()  # in the padding
    # Squashed, the picture's 112 rows fill the square.
    main, _ = regions(below, resize="squash")
    first = 40 + np.flatnonzero(main.any(axis=1))[0]
    assert first == pytest.approx(36 / SIDE * 112, abs=2)


def test_heat_of_similarities():
    """Black at the lowest, white at the highest, the colour itself in between."""
    drawn = tile_of("A_main", maps_of())
    assert max(pixel(drawn, 0)) < 10
    assert min(pixel(drawn, 223)) > 240
    assert np.abs(drawn[80].astype(int) - MAIN).sum(1).min() < 10
    grey = scene()._replace(query=np.full((TILE // 2, TILE, 3), 200, np.uint8))
    drawn = tile_of("A_aux", maps_of(), grey)  # darkened, not black
    assert pixel(drawn, 100) == (int(200 * DARK),) * 3
    # A map that the variant lacks is empty.
    assert pixel(tile_of("A_aux", maps_of("A_aux")), 100) == pictures.PAPER


def test_notes_of_the_background():
    truth = scene().truth
    nothing = np.zeros_like(truth)
    # All is called background: the truth is what the object leaves of the picture.
    share = round(100 * (1 - 84 * 168 / (112 * 224)))
    assert background_note(nothing, truth) == "IoU 0, lost 0 %"
    assert background_note(nothing + 1, truth) == f"IoU {share}, lost 100 %"


def test_shapes_tints_and_notes_of_pictures():
    wide = np.asarray(pictures.tile(np.zeros((30, 60, 3), np.uint8)))
    assert wide.shape == (TILE, TILE, 3)
    assert (wide[: TILE // 2] == 0).all()
    assert (wide[TILE // 2 :] == 255).all()
    tall = np.asarray(pictures.tile(np.zeros((60, 30, 3), np.uint8)))
    assert (tall[:, TILE // 4 : -TILE // 4] == 0).all()
    assert (tall[:, : TILE // 4] == 255).all()
    assert (tall[:, -TILE // 4 :] == 255).all()
    # The tint doesn't depend on the picture's colours.
    mask = np.ones((20, 20), np.uint8)
    for grey in (0, 90, 255):
        picture = pictures.overlay(np.full((20, 20, 3), grey, np.uint8), mask, SUPPORT)
        assert tuple(picture[10, 10]) == tint(SUPPORT, grey)
    red = np.zeros((20, 20, 3), np.uint8)
    red[..., 0] = 255
    *_, blue = pictures.overlay(red, mask, SUPPORT)[10, 10]
    assert blue == tint(SUPPORT, 76)[2]  # 0.299 * 255
    # Ignored pixels don't count in the IoU.
    truth = np.array([[1, 1, 0, 255]], np.uint8)
    assert pictures.iou_note(np.array([[1, 0, 1, 1]], np.uint8), truth) == "IoU 33"
    assert pictures.iou_note(np.zeros((1, 4), np.uint8), truth * 0) == "IoU 0"
    # A sheet needs a tile for every column; a title fits into it.
    tiles = [pictures.tile(np.zeros((5, 5, 3), np.uint8))]
    with pytest.raises(ValueError, match=r"shorter|longer"):
        pictures.sheet(["a", "b"], [("row", tiles)], {})
    page = pictures.sheet(["a very long name of a run, " * 2], [("", tiles)], {})
    assert (page[: pictures.HEADER] != 255).any()
    assert (page[: pictures.HEADER, :10] == 255).all()
    assert (page[: pictures.HEADER, -2:] == 255).all()


def test_columns_labels_and_notes_of_two_runs():
    baseline = maps_of("y_pre", "y_rev", "A_main", "A_aux", "y_bg_clean")
    both = shown_episodes(baseline=baseline, full=maps_of())
    content = draw_sheet(SHEETS["predictions"], both)
    columns, rows, legend, _ = content
    assert columns == ["support", "query", "truth", "cosine", "baseline", "full"]
    assert [(label, len(tiles)) for label, tiles in rows] == [("dog\n#3", 6)] * 2
    found = [pixel(tiles[3], 160) for _, tiles in rows]
    assert found == [tint(PREDICTION), BLACK]
    page, step = pictures.sheet(*content), TILE + pictures.GAP
    assert page.shape[1] > 6 * step
    assert page.shape[0] > 2 * step
    colours = {tuple(c) for c in page[2 * step + pictures.HEADER :].reshape(-1, 3)}
    assert colours >= set(legend.values()) == {SUPPORT, TRUTH, PREDICTION}  # swatches
    # Runs without evolution are left out, with a note.
    columns, rows, _, notes = draw_sheet(SHEETS["evolution"], both, notes=["first"])
    assert [(label, len(tiles)) for label, tiles in rows] == [("dog\n#3\nfull", 5)] * 2
    assert notes[0] == "first"
    assert notes[-1] == "baseline: no evolution of the foreground"
    columns, rows, _, notes = draw_sheet(SHEETS["background"], both)
    assert columns == ["support", "truth", "full: P_global", "full: P_bg"]
    assert [len(tiles) for _, tiles in rows] == [4, 4]
    assert notes[-1] == "baseline: no cleaner, P_bg is P_global"
    # A sheet that no run can fill is drawn.
    for name, count in (("evolution", 5), ("background", 2)):
        content = draw_sheet(SHEETS[name], shown_episodes(baseline=baseline))
        assert len(content[0]) == count
        assert pictures.sheet(*content).shape[1] > 500


# On runs with random parameters.


def shrunk(**changes):
    config = small_config().unlock().copy_and_resolve_references()
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in changes.items()}
    )
    return complete(config)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The workdirs of a full network and of a baseline."""
    folder = tmp_path_factory.mktemp("runs")
    return [
        untrained_run(folder / f"run_{name}", shrunk(variant=name))
        for name in ("full", "baseline")
    ]


def test_three_sheets_of_two_runs(runs, tmp_path):
    out = tmp_path / "new" / "figures"
    paths = figures.draw_figures(runs, out, episodes=[4, 0], shots=2)
    names = ["predictions.jpg", "evolution.jpg", "background.jpg"]
    assert paths == [out / name for name in names]
    assert sorted(p.name for p in out.iterdir()) == sorted(names)
    for path in paths:
        with Image.open(path) as image:
            assert image.format == "JPEG"
            assert image.size[1] > 2 * TILE
    run = open_run(runs[0])
    protocol, val = (
        build_protocol(run.config, shots=2),
        build_dataset(run.config, "val"),
    )
    notes = figures.protocol_notes(protocol)
    assert "2-shot" in notes[0]
    assert notes[1] == "of 2 supports the first is shown"
    # An episode's label is its index.
    sampler = build_eval_samplers(run.config, val, protocol)[0]
    shown = figures.show({"a": run}, val, sampler(4), protocol)
    assert shown.scene.label.split("\n")[1] == "#4"
    assert {"y_bg_clean", "y_rev", "prediction"} <= shown.runs["a"].keys()
    # The figure of an evaluation, all of whose prediction is tinted.
    everywhere = {"all": lambda *_, **__: jnp.ones((1, SIDE, SIDE))}
    page = pictures.episode_figure(val, [sampler(4), sampler(0)], everywhere, SIDE)
    assert page.shape[1] > 4 * (TILE + pictures.GAP)
    last = page[60 : pictures.HEADER + TILE - 60, -TILE // 2]
    assert (np.abs(last - np.array(PREDICTION) // 2 - 64) <= 64).all()


def test_the_background_by_p_bg_is_the_heads_output_for_it(runs):
    run = open_run(runs[0])
    backbone, params = build_backbone(run.config), run.params
    rng = np.random.default_rng(0)
    episode = Episode(
        rng.integers(0, 256, (1, SIDE, SIDE, 3), np.uint8),
        rng.integers(0, 2, (1, SIDE, SIDE), np.uint8),
        rng.integers(0, 256, (1, 2, SIDE, SIDE, 3), np.uint8),
        rng.integers(0, 2, (1, 2, SIDE, SIDE), np.uint8),
    )
    maps = figures.network_maps(run, episode)
    predict = build_predictor(run.config, params, run.weights)
    _, out = jax.tree.map(np.asarray, predict(episode, named=True))

    @jax.jit
    def expected():
        _, query = episode_features(backbone, run.weights, episode)
        reducer = {"params": params["reduce_query"]}
        F_q = ConvReLU(16).apply(reducer, unit_rms(query))
        head = {"params": params["gbc"]["convs"]}
        prototypes = {"y_bg_q": params["gbc"]["P_global"], "y_bg_clean": out["P_bg"][0]}
        return {
            name: Convs().apply(head, F_q, prototype[None], train=False)
            for name, prototype in prototypes.items()
        }

    logits = expected() | {"y_pre": out["y_pre"], "prediction": out["y_final"]}
    logits["y_rev"] = out["y_rev"][:, 0]  # the first support is shown
    for name, values in logits.items():
        on_grid = values[0, ..., 1] - values[0, ..., 0]
        np.testing.assert_allclose(maps[name][::8, ::8], on_grid, rtol=1e-4, atol=1e-5)
    for name in ("A_main", "A_aux"):
        np.testing.assert_allclose(maps[name][::8, ::8], out[name][0], atol=1e-5)
    assert np.abs(maps["y_bg_clean"] - maps["y_bg_q"]).max() > 1e-3


def test_nothing_is_written_if_a_sheet_fails(tmp_path):
    files = {name: tmp_path / "out" / f"{name}.jpg" for name in SHEETS}
    shown = shown_episodes(run=maps_of("y_bg_q"))
    with pytest.raises(KeyError, match="y_bg_q"):
        figures.write_sheets(shown, build_protocol(shrunk()), files)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"episodes": [2, 6]}, "episode 6: the protocol has episodes 0 to 5"),
        ({"episodes": [-1]}, "episode -1"),
        ({"count": 7}, "7 episodes"),
        ({"count": 0}, "0 episodes"),
        ({"seed": -1}, "seed -1"),
        ({"episodes": [1] * 201}, "more than 200 rows"),
        ({"shots": 50}, "50-shot episodes need"),
    ],
)
def test_choices_that_cannot_be_shown(runs, tmp_path, choice, words):
    with pytest.raises(InputError, match=words):
        figures.draw_figures(runs[:1], tmp_path / "out", **choice)
    assert not (tmp_path / "out").exists()


def test_no_run_and_no_folder_for_figures(runs, tmp_path):
    with pytest.raises(InputError, match="is no run"):
        figures.draw_figures([tmp_path], tmp_path / "out")
    with pytest.raises(InputError, match=r"test_figures.py.*can't be written"):
        figures.draw_figures(runs[:1], Path(__file__), count=1)


def test_random_episodes_follow_the_seed():
    protocol = build_protocol(shrunk(eval__episodes=1000))
    first, again, other = (figures.random_episodes(protocol, 6, s) for s in (0, 0, 1))
    assert first == again == sorted(set(first)) != other
    assert len(first) == 6


def pair_of(folder, **changes):
    """Two runs, of which only the config and the inputs are there."""
    for name, config in (("one", shrunk()), ("two", shrunk(**changes))):
        data = build_dataset(config, "val")
        (folder / name).mkdir()
        claim(folder / name, config, inputs_of(data, data, {}))
        yield TrainedRun(folder / name, config, {}, 0)


def test_names_of_runs(tmp_path):
    one, two = pair_of(tmp_path)
    assert list(figures.by_name([one, two])) == [str(one.folder), str(two.folder)]
    (tmp_path / "more").mkdir()
    others = pair_of(tmp_path / "more", variant="baseline")
    assert list(figures.by_name(list(others))) == ["full", "baseline"]
    assert len(figures.by_name([one, one])) == 1  # it is drawn once


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset__fold": 1}, "other novel classes"),
        ({"side": 73}, "other input size"),
        ({"seed": 1}, "two has other validation images"),  # the shapes' seed too
    ],
)
def test_runs_that_do_not_compare(tmp_path, changes, words):
    first, other = pair_of(tmp_path, **changes)
    protocol = build_protocol(first.config)
    figures.check_choices([first, first], protocol, [0])
    with pytest.raises(InputError, match=words):
        figures.check_choices([first, other], protocol, [0])
