"""The table of stages, against what cannot be derived from it."""

from base.store.checkpoint import MEASUREMENTS
from flows.run_file.schema import TrainMethod
from stages.config.kinds import EVALUATIONS, EXPERT_METHODS, SCORINGS, STAGES, colour_of


def test_the_stores_small_artifacts_are_the_measurements() -> None:
    assert set(MEASUREMENTS) == set(EVALUATIONS) >= set(SCORINGS)


def test_the_run_file_offers_every_method_of_an_expert() -> None:
    assert set(TrainMethod.model_fields) == set(EXPERT_METHODS)
    for name, field in TrainMethod.model_fields.items():
        assert STAGES[name].config in getattr(field.annotation, "__args__", ())


def test_every_stage_names_a_function_and_what_trains_a_metric() -> None:
    for kind in STAGES.values():
        assert kind.name == "harness" or callable(kind.function())
        assert bool(kind.metric) == (kind.trains or kind.launches), kind.name
        assert kind.measures + kind.trains + kind.launches <= 1


def test_a_stage_of_another_release_has_a_colour() -> None:
    assert (colour_of("sft"), colour_of("of another release"), colour_of("")) == ("blue", "grey", "grey")
