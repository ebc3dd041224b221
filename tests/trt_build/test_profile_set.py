"""Several profiles of one engine: what each is made of, and which are refused."""

from __future__ import annotations

from typing import Any

import pytest

import fp4trt
from fp4trt.errors import BadOption, BadProfileError
from trt_build.profile_set import make_profiles
from trt_build.profiles import Profile, make_profile

INPUTS = {"hidden_states": ("B", "L", 64), "encoder_hidden_states": ("B", "T", 4096), "img_ids": ("L", 3)}
PICTURE = {"pixels_per_token": 16, "min_resolution": 256, "default_resolution": 1024, "max_resolution": 1360}
SYMBOLS: dict[str, dict[str, Any]] = {
    "B": {"kind": "batch", "min": 1, "max": 4, "default": 1},
    "L": {"kind": "image_tokens", **PICTURE, "references": True},
    "T": {"kind": "text_tokens", "min": 1, "max": 512, "default": 512},
}


def profiles(*asked: Any, fp8_attention: bool = False, **plain: Any) -> tuple[Profile, ...]:
    return make_profiles(
        INPUTS, SYMBOLS, {"resolution": None, "shapes": (), **plain}, asked, fp8_attention=fp8_attention
    )


def test_without_any_the_one_profile_is_that_of_the_plain_options() -> None:
    assert profiles(resolution="512", batch=2) == (make_profile(INPUTS, SYMBOLS, resolution="512", batch=2),)


def test_what_a_profile_does_not_say_is_plain_and_then_the_models() -> None:
    first, second = profiles("resolution=1024 batch=1", "resolution=512:768x512:1024", batch="2", text=77)
    assert first.symbols == {"B": (1, 1, 1), "L": (4096, 4096, 4096), "T": (77, 77, 77)}
    assert second.symbols == {"B": (2, 2, 2), "L": (1024, 1536, 4096), "T": (77, 77, 77)}
    (open_,) = profiles("batch=1")
    assert open_.symbols == {"B": (1, 1, 1), "L": (256, 4096, 7225), "T": (1, 512, 512)}


def test_a_mapping_says_the_same_as_a_text() -> None:
    text = profiles("resolution=512:768x1024:1360 batch=1 reference-images=0:1:1 shape=T=8:16:32", "batch=4")
    mapping = profiles(
        {"resolution": [512, (768, 1024), 1360], "batch": 1, "reference_images": (0, 1, 1), "shapes": "T=8:16:32"},
        {"batch": 4, "text": None},
    )
    assert [each.symbols for each in text] == [each.symbols for each in mapping]
    assert text == mapping
    assert text[0].symbols == {"B": (1, 1, 1), "L": (1024, 6144, 14450), "T": (8, 16, 32)}
    assert profiles({"batch": 1}) == make_profiles(INPUTS, SYMBOLS, {"resolution": None, "shapes": ()}, {"batch": 1})


def test_a_profiles_own_option_counts_against_a_plain_shape() -> None:
    first, second = profiles("resolution=512 text=8", "shape=L=300", shapes=["L=4096", "T=64", "B=2"])
    assert first.symbols == {"B": (2, 2, 2), "L": (1024, 1024, 1024), "T": (8, 8, 8)}
    assert second.symbols == {"B": (2, 2, 2), "L": (300, 300, 300), "T": (64, 64, 64)}
    (third,) = profiles("resolution=512", shapes=["img_ids=4096x3", "T=64"])
    assert third.inputs["img_ids"] == ((1024, 3),) * 3
    assert third.symbols["T"] == (64, 64, 64)
    (fourth,) = profiles("reference-images=1", resolution="512", shapes=["L=4096"])
    assert fourth.symbols["L"] == (2048, 2048, 2048)


@pytest.mark.parametrize(("wide", "tall"), [("768x1360", "1360x768"), ("512x1024", "1024x512"), ("512", "256x1024")])
def test_pictures_of_as_many_tokens_are_one_profile_with_a_note(wide: str, tall: str) -> None:
    kept, other = profiles(f"resolution={wide} batch=1", f"resolution={tall} batch=1", f"resolution={tall} batch=2")
    assert (kept.symbols["B"], other.symbols["B"]) == ((1, 1, 1), (2, 2, 2))
    (note,) = kept.notes
    assert note == (
        f"--profile 'resolution={tall} batch=1': pictures of as many tokens as those of --profile "
        f"'resolution={wide} batch=1', whose profile serves them too"
    )
    assert other.notes == ()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["batch=1", "batch=1"], "--profile 'batch=1' is equal to --profile 'batch=1'; leave one of them out"),
        (["batch=1", "batch=2", "batch=1:1:1"], "--profile 'batch=1:1:1' is equal to --profile 'batch=1'"),
        (["resolution=512", "resolution=512x512"], "'resolution=512x512' is equal to --profile 'resolution=512'"),
        (["resolution=512", "resolution=512:512:512"], "is equal to"),
        (["batch=1", "batch=1 resolution=256:1024:1360"], "is equal to"),
        (["resolution=512x768", "resolution=768x512", "resolution=768x512"], "is equal to"),
    ],
)
def test_equal_profiles_are_refused_in_one_line(asked: list[str], said: str) -> None:
    with pytest.raises(BadProfileError) as caught:
        profiles(*asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


EXPECTED = 'expected KEY=VALUE, such as "resolution=1024 batch=1 text=512"'


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("", f"--profile '': found nothing; {EXPECTED}"),
        ("resolution 1024", f"--profile 'resolution 1024': found 'resolution'; {EXPECTED}"),
        ("resolution= batch=1", f"--profile 'resolution= batch=1': found 'resolution='; {EXPECTED}"),
        ("=1024", f"--profile '=1024': found '=1024'; {EXPECTED}"),
        (
            "batches=1",
            "--profile 'batches=1': there is no key 'batches'; expected one of: resolution, batch, text, fra",
        ),
        ({"batches": 1}, "--profile 'batches=1': there is no key 'batches'; expected one of: resolution"),
        ("batch=1 batch=2", "--profile 'batch=1 batch=2': batch is given twice; expected it once"),
        ("batch=1,text=8", "--profile 'batch=1,text=8': --batch 1,text=8: expected a number or MIN:OPT:MAX"),
        ("batch=9", "--profile 'batch=9': --batch 9: outside the model's range 1 to 4"),
        ("resolution=1000", "--profile 'resolution=1000': --resolution 1000: 1000 is not a multiple of 16 pixels"),
        ("frames=81", "--profile 'frames=81': --frames 81: the model declares no such dimension"),
        ("shape=Q=1", "--profile 'shape=Q=1': --shape Q=1: the graph has no input or symbol 'Q'"),
        ({1: 2}, "--profile '1=2': there is no key '1'; expected one of"),
        ({"shapes": 5}, "--profile 'shape=5': --shape 5: the graph has no input or symbol '5'"),
        ({"batch": True}, "--profile 'batch=True': --batch True: expected a number or MIN:OPT:MAX"),
    ],
)
def test_a_malformed_profile_is_refused_in_one_line(asked: Any, said: str) -> None:
    with pytest.raises(BadProfileError) as caught:
        profiles("batch=1", asked)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [None, 5, ["batch=1", 5], [["batch=1"]]])
def test_what_is_no_profile_is_refused_before_any_work(value: Any) -> None:
    with pytest.raises(BadOption, match=r"^profiles is .*; expected \"resolution=1024 batch=1 text=512\", a mapping"):
        fp4trt.build("m.onnx", profiles=value)


def test_each_profile_begins_at_32_tokens_where_attention_is_in_fp8() -> None:
    small = {**SYMBOLS, "L": {**SYMBOLS["L"], "pixels_per_token": 4, "min_resolution": 8, "default_resolution": 16}}
    asked = ["resolution=32", "batch=1"]
    plain = {"resolution": None, "text": 8, "shapes": ()}
    first, second = make_profiles(INPUTS, small, plain, asked, fp8_attention=True)
    assert (first.symbols["L"][0], first.notes) == (64, ())
    assert second.symbols["L"][0] == 25
    (note,) = second.notes
    assert note.startswith("--profile 'batch=1': attention in FP8 needs 32 tokens or more")
    with pytest.raises(BadProfileError, match=r"^--profile 'resolution=8': attention in FP8 needs 32 tokens"):
        make_profiles(INPUTS, small, plain, ["resolution=32", "resolution=8"], fp8_attention=True)
