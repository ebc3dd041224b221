from __future__ import annotations

from typing import Any

import pytest

from fp4trt.errors import BadModelError, BadProfileError
from fp4trt.families import FAMILIES, Family
from trt_build.least_tokens import require_tokens
from trt_build.profiles import Profile, make_profile

INPUTS = {
    "hidden_states": ("B", "L", 64),
    "encoder_hidden_states": ("B", "T", 4096),
    "timestep": ("B",),
    "img_ids": ("L", 3),
}
SYMBOLS: dict[str, dict[str, Any]] = {
    "B": {"kind": "batch", "min": 1, "max": 4, "default": 1},
    "L": {
        "kind": "image_tokens",
        "pixels_per_token": 16,
        "min_resolution": 256,
        "max_resolution": 1360,
        "default_resolution": 1024,
    },
    "T": {"kind": "text_tokens", "min": 1, "max": 512, "default": 512},
}


def profile(**options: Any) -> Profile:
    return make_profile(INPUTS, SYMBOLS, **options)


def test_without_options_the_profile_covers_all_that_the_model_declares() -> None:
    assert profile().symbols == {"B": (1, 1, 4), "L": (256, 4096, 7225), "T": (1, 512, 512)}


def test_one_value_fixes_a_dimension() -> None:
    assert profile(resolution="1024", batch="2", text="77").symbols == {
        "B": (2, 2, 2),
        "L": (4096, 4096, 4096),
        "T": (77, 77, 77),
    }


def test_every_input_gets_the_extent_of_its_symbols() -> None:
    shapes = profile(resolution="512:1024:1360", batch="1:1:4", text="512").inputs
    assert shapes["hidden_states"] == ((1, 1024, 64), (1, 4096, 64), (4, 7225, 64))
    assert shapes["encoder_hidden_states"] == ((1, 512, 4096), (1, 512, 4096), (4, 512, 4096))
    assert shapes["timestep"] == ((1,), (1,), (4,))
    assert shapes["img_ids"] == ((1024, 3), (4096, 3), (7225, 3))


@pytest.mark.parametrize(
    ("resolution", "tokens"),
    [
        ("768x1360", (48 * 85,) * 3),
        ("1360x768", (48 * 85,) * 3),
        ("512:768x512:1024", (1024, 1536, 4096)),
    ],
)
def test_width_and_height_multiply(resolution: str, tokens: tuple[int, int, int]) -> None:
    assert profile(resolution=resolution).symbols["L"] == tokens


def test_the_built_in_models_pixels_per_token_are_read_from_its_metadata() -> None:
    digits = {
        "kind": "image_tokens",
        "pixels_per_token": 4,
        "min_resolution": 8,
        "max_resolution": 32,
        "default_resolution": 16,
    }
    made = make_profile({"hidden_states": (1, "L", 16)}, {"L": digits})
    assert made.symbols["L"] == (4, 16, 64)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolution": "2048"}, "--resolution 2048: 2048 is outside the model's 256 to 1360 pixels"),
        ({"resolution": "768x1376"}, "1376 is outside"),
        ({"resolution": "1000"}, "1000 is not a multiple of 16"),
        ({"resolution": "big"}, "expected 1024, 768x1360 or MIN:OPT:MAX"),
        ({"resolution": "1x2x3"}, "expected 1024, 768x1360 or MIN:OPT:MAX"),
        ({"resolution": "512:1024"}, "found 2 values"),
        ({"resolution": "1024:512:1360"}, "minimum <= optimum <= maximum, found 1024, 512, 1360"),
        ({"batch": "8"}, "outside the model's range 1 to 4"),
        ({"batch": "0"}, "expected 1 or more"),
        ({"batch": "-1"}, "expected a number"),
        ({"text": "1:2:1024"}, "outside the model's range 1 to 512"),
        ({"shapes": ["Q=1"]}, "no input or symbol 'Q'; it has B, L, T, hidden_states"),
        ({"shapes": ["L=1:1:2"]}, "below the model's least, 256"),
        ({"reference_images": "two"}, "--reference-images two: expected a number or MIN:OPT:MAX"),
        ({"reference_images": "2:1:0"}, "expected minimum <= optimum <= maximum, found 2, 1, 0"),
        ({"shapes": ["timestep=1x1"]}, "expected 1 numbers"),
        ({"shapes": ["img_ids=64x4"]}, "4 where the graph has 3"),
    ],
)
def test_a_profile_outside_the_model_is_refused_in_one_line(options: dict[str, Any], said: str) -> None:
    with pytest.raises(BadProfileError) as caught:
        profile(**options)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_video_has_the_tokens_of_its_frames() -> None:
    picture = {"pixels_per_token": 16, "min_resolution": 256, "default_resolution": 640, "max_resolution": 960}
    length = {"frames_per_token": 4, "min_frames": 1, "default_frames": 81, "max_frames": 121}
    symbols: dict[str, Any] = {
        "L": {"kind": "video_tokens", **picture, **length},
        "A": {"kind": "audio_tokens", "min": 1, "default": 126, "max": 512},
    }
    inputs = {"video": ("L", 16), "audio": ("A", 16)}
    assert make_profile(inputs, symbols).symbols == {"L": (256, 1600 * 21, 3600 * 31), "A": (1, 126, 512)}
    made = make_profile(inputs, symbols, resolution="1280x720", frames="33:81:121", audio=(32, 126, 200))
    assert made.symbols == {"L": (3600 * 9, 3600 * 21, 3600 * 31), "A": (32, 126, 200)}
    for options, said in (
        ({"frames": 80}, "--frames 80: 80 is not 1 more than a multiple of 4"),
        ({"frames": "1:81:125"}, "--frames 1:81:125: outside the model's range 1 to 121"),
        ({"resolution": "1280x1280"}, "1280x1280 is outside the model's 256x256 to 960x960 pixels of a frame"),
        ({"resolution": "648x640"}, "--resolution 648x640: 648 is not a multiple of 16 pixels"),
        ({"text": 1}, "--text 1: the model declares no such dimension"),
    ):
        with pytest.raises(BadProfileError, match=said):
            make_profile(inputs, symbols, **options)
    with pytest.raises(BadProfileError, match="--frames 81: the model declares no such dimension"):
        profile(frames=81)


def test_reference_images_are_further_image_tokens() -> None:
    made = profile(resolution="1024", reference_images="2")
    assert made.symbols["L"] == (12288, 12288, 12288)
    assert made.inputs["img_ids"] == ((12288, 3), (12288, 3), (12288, 3))
    note, only = made.notes
    assert only.startswith("L is 12288 image tokens and no other number")
    assert note.startswith("L goes to 12288 image tokens, beyond the 7225 of the model's largest picture")
    assert profile(resolution="512:1024:1360", reference_images="0:1:2").symbols["L"] == (1024, 8192, 21675)
    assert profile(resolution="512:512:1024", reference_images=0) == profile(resolution="512:512:1024")
    assert profile(shapes=["L=256:8192:8192"]).symbols["L"] == (256, 8192, 8192)
    with pytest.raises(BadProfileError, match="--reference-images 1: the model declares no image tokens"):
        make_profile({"x": ("B", 64)}, {}, reference_images=1)


def test_a_graph_without_metadata_takes_its_ranges_from_shapes() -> None:
    made = make_profile(
        {"x": ("batch", None, 64), "mask": ("batch", 77)},
        {},
        shapes=["batch=1:2:4", "x=1x16x64:2x32x64:4x64x64"],
    )
    assert made.inputs == {
        "x": ((1, 16, 64), (2, 32, 64), (4, 64, 64)),
        "mask": ((1, 77), (2, 77), (4, 77)),
    }


@pytest.mark.parametrize("symbol", [{"kind": "voxels"}, {}, {"kind": "batch"}, {**SYMBOLS["L"], "pixels_per_token": 0}])
def test_a_symbol_that_is_not_as_fp4trt_declares_it_is_refused(symbol: dict[str, Any]) -> None:
    with pytest.raises(BadModelError, match=r"the graph's symbol 'L' .* export it again"):
        make_profile(INPUTS, {"L": symbol})


def test_an_open_dimension_is_named() -> None:
    with pytest.raises(BadProfileError, match=r"input 'x': axis 0 is dynamic and has no range; give --shape batch="):
        make_profile({"x": ("batch", 64)}, {})
    with pytest.raises(BadProfileError, match=r"input 'x': axis 0 .* give --shape x=SHAPE"):
        make_profile({"x": (None, 64)}, {})


def test_resolution_needs_a_model_that_says_what_a_token_is() -> None:
    with pytest.raises(BadProfileError, match="--resolution 1024: the model declares no such dimension"):
        make_profile({"x": ("B", 64)}, {}, resolution="1024")


def test_a_static_graph_needs_no_option() -> None:
    assert make_profile({"x": (2, 64)}, {}).inputs == {"x": ((2, 64), (2, 64), (2, 64))}


DIGITS = {**SYMBOLS, "L": {**SYMBOLS["L"], "pixels_per_token": 4, "min_resolution": 8, "max_resolution": 32}}
DIGITS["L"]["default_resolution"] = 16


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"L": (36, 36, 64), "T": (1, 512, 512)}),
        ({"resolution": "16:16:32"}, {"L": (16, 16, 64), "T": (16, 512, 512)}),
        ({"text": "8"}, {"L": (25, 25, 64), "T": (8, 8, 8)}),
        ({"resolution": "16", "text": "16:20:32"}, {"L": (16, 16, 16), "T": (16, 20, 32)}),
        ({"shapes": ["L=20:30:40"]}, {"L": (20, 30, 40), "T": (12, 512, 512)}),
    ],
)
def test_fp8_attention_raises_only_a_minimum_that_nobody_gave(
    options: dict[str, Any], expected: dict[str, Any]
) -> None:
    found = make_profile(INPUTS, DIGITS, **options, fp8_attention=True)
    assert {name: found.symbols[name] for name in "LT"} == expected
    assert found.inputs["hidden_states"][0] == (1, expected["L"][0], 64)
    assert bool(found.notes) == (options.keys() != {"resolution", "text"})


@pytest.mark.parametrize(
    "options",
    [
        {"resolution": "16", "text": "15"},
        {"resolution": "8:16:32", "text": "27:64:64"},
        {"shapes": ["L=4:16:64", "T=1:8:32"]},
        {"text": "8", "shapes": ["hidden_states=1x16x64"]},
    ],
)
def test_fp8_attention_refuses_a_given_minimum_below_32_tokens(options: dict[str, Any]) -> None:
    found = make_profile(INPUTS, DIGITS, **options, fp8_attention=True)
    minima = {name: low for name, (low, _, _) in found.inputs.items()}
    with pytest.raises(BadProfileError, match=r"attention in FP8 needs 32 tokens.*at least --resolution \d+ or --text"):
        require_tokens(minima, INPUTS, DIGITS)


VIDEO = {
    **SYMBOLS,
    "L": {**SYMBOLS["L"], "kind": "video_tokens", "min_frames": 1, "default_frames": 5, "max_frames": 9}
    | {"frames_per_token": 4},
    "A": {"kind": "audio_tokens", "min": 1, "max": 512, "default": 126},
}


def test_each_attention_in_fp8_has_32_keys_of_its_own() -> None:
    inputs = {**INPUTS, "sound": ("B", "A", 64)}
    keys = (("A",), ("L",), ("T",), ("L", "T"))
    found = make_profile(inputs, VIDEO, fp8_attention=True, keys=keys)
    assert {name: found.symbols[name][0] for name in "LAT"} == {"L": 256, "A": 32, "T": 32}
    assert [note.rpartition(" at ")[2] for note in found.notes] == ["--audio 32", "--text 32"]
    queries_alone = make_profile(inputs, VIDEO, fp8_attention=True, keys=(("L",),))
    assert {name: queries_alone.symbols[name][0] for name in "LAT"} == {"L": 256, "A": 1, "T": 1}
    short = make_profile(inputs, VIDEO, audio="31:126:126", fp8_attention=True, keys=keys)
    minima = {name: low for name, (low, _, _) in short.inputs.items()}
    with pytest.raises(
        BadProfileError, match=r"needs 32 tokens of sound, .* at 31 \(A 31\); give at least --audio 32$"
    ):
        require_tokens(minima, inputs, VIDEO, keys)


def test_flux_needs_no_raise_for_fp8_attention() -> None:
    found = make_profile(INPUTS, SYMBOLS, fp8_attention=True)
    assert found == profile()


def test_lists_and_one_shape_are_taken_as_tuples_and_several_are() -> None:
    lists = profile(resolution=[512, (768, 1024), 1360], batch=[1, 1, 4], text=[512], shapes="B=1:1:2")
    assert lists == profile(resolution="512:768x1024:1360", batch="1:1:4", text="512", shapes=("B=1:1:2",))


def test_two_counts_are_not_said_as_a_width_and_a_height() -> None:
    with pytest.raises(BadProfileError, match="--batch 1:2: expected one value or MIN:OPT:MAX, found 2 values"):
        profile(batch=(1, 2))


READS_REFERENCES = {"flux", "flux2", "qwen-image"}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_a_family_says_whether_pictures_to_refer_to_are_tokens_too(family: Family) -> None:
    symbols = {name: dim.as_dict() for name, dim in family.dims.items()}
    inputs = {"x": tuple(symbols)}
    if family.name not in READS_REFERENCES:
        with pytest.raises(BadProfileError, match="--reference-images 1: the model reads no pictures beside the one"):
            make_profile(inputs, symbols, reference_images=1)
        return
    alone = make_profile(inputs, symbols, resolution=512).symbols["L"]
    assert make_profile(inputs, symbols, resolution=512, reference_images="0:1:2").symbols["L"] == (
        alone[0],
        2 * alone[0],
        3 * alone[0],
    )


def test_only_a_dimension_of_pictures_says_whether_it_holds_references() -> None:
    dims = [dim.as_dict() for family in FAMILIES for dim in family.dims.values()]
    assert {dim["kind"] for dim in dims if "references" in dim} <= {"image_tokens", "video_tokens"}
    assert {dim["kind"] for dim in dims if "references" not in dim} == {"batch", "text_tokens", "audio_tokens"}
