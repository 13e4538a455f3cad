"""Capture settings: defaults, choice of layers and heads, and errors that are sentences."""

import pytest

from pivottrace_verl.attention.config import CaptureConfig
from pivottrace_verl.errors import PivotTraceError


@pytest.mark.parametrize(
    ("n_layers", "chosen"), [(1, (0,)), (2, (0, 1)), (4, (1, 2)), (12, (5, 7)), (30, (12, 17))]
)
def test_two_layers_of_the_middle_third_are_the_default(n_layers, chosen):
    assert CaptureConfig().choose_layers(range(n_layers)) == chosen


def test_a_config_survives_json():
    config = CaptureConfig(layers=(3, 1), head_groups=((0, 1), (2,)), window=16, sink=0)
    assert CaptureConfig.from_json(config.to_json()) == config


def test_each_layer_can_have_heads_of_its_own():
    config = CaptureConfig(layers=(3, 1), heads=((0, 2), (1,)))
    assert CaptureConfig.from_json(config.to_json()) == config
    assert [config.choose_heads(4, i) for i in range(2)] == [((0, 2),), ((1,),)]
    with pytest.raises(PivotTraceError, match=r"capture.heads asks for head 2, .* 2 query heads"):
        config.choose_heads(2, 0)


def test_settings_without_chosen_heads_are_those_of_runs_before_there_was_a_choice():
    assert "heads" not in CaptureConfig().to_dict()


def test_lists_are_taken_as_tuples():
    config = CaptureConfig.from_dict({"layers": [1, 2], "head_groups": [[0], [1, 2]]})
    assert config == CaptureConfig(layers=(1, 2), head_groups=((0,), (1, 2)))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"layer": [1]}, "Unknown capture setting layer"),
        ({"layers": []}, "distinct whole numbers"),
        ({"layers": [1, 1]}, "distinct whole numbers"),
        ({"layers": "12"}, "list of numbers"),
        ({"layers": [-1]}, "distinct whole numbers"),
        ({"head_groups": []}, "at least one group"),
        ({"head_groups": 3}, "list of lists"),
        ({"heads": [[0]]}, "names heads of 1 layers, but capture.layers names 0"),
        ({"heads": [[0]], "layers": [1, 2]}, "names heads of 1 layers, but capture.layers names 2"),
        ({"heads": 3, "layers": [1]}, "list of lists"),
        ({"heads": [[]], "layers": [1]}, "distinct whole numbers"),
        ({"heads": [[0]], "layers": [1], "head_groups": [[0]]}, "exclude each other"),
        ({"window": 0}, "1 to 1024"),
        ({"sink": -1}, "0 or more"),
        ({"wire": "int8"}, "float32, float16"),
    ],
)
def test_bad_settings_are_told_in_a_sentence(values, says):
    with pytest.raises(PivotTraceError, match=says):
        CaptureConfig.from_dict(values)


def test_text_that_is_no_configuration_is_told():
    with pytest.raises(PivotTraceError, match="not JSON"):
        CaptureConfig.from_json("{")
    with pytest.raises(PivotTraceError, match="JSON object"):
        CaptureConfig.from_json("[1]")


def test_layers_and_heads_the_model_does_not_have_are_named():
    with pytest.raises(PivotTraceError, match="layer 9"):
        CaptureConfig(layers=(1, 9)).choose_layers(range(4))
    with pytest.raises(PivotTraceError, match="head 4"):
        CaptureConfig(head_groups=((0, 4),)).choose_heads(4)
    with pytest.raises(PivotTraceError, match="no full attention layer"):
        CaptureConfig().choose_layers([])
