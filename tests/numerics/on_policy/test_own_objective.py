"""A merge with an objective from a Python file of one's own."""

import textwrap
from pathlib import Path

import pytest
import torch

import stages.distill
from base.errors import UserError
from base.store.checkpoint import Artifact, hash_file
from experts.domain import Domain
from stages.config.distill import DistillConfig
from stages.config.objective import PythonObjective
from stages.on_policy.own_objective import load_objective, require_unchanged

SMALL = {"max_steps": 2, "examples": 40, "prompts_per_step": 6, "max_new_tokens": 8}
REVERSE = """
student_CV, target_CV = student_CV.log_softmax(-1), target_CV.log_softmax(-1)
return scale * (student_CV.exp() * (student_CV - target_CV)).sum(-1)
"""


def own(folder: Path, body: str, **options: float) -> PythonObjective:
    # Modules are kept by their path.
    file = folder / f"own_{len(list(folder.glob('own_*.py')))}.py"
    head = "import torch\n\n\ndef loss(student_CV, target_CV, tokens_C, scale=1.0):\n"
    file.write_text(head + textwrap.indent(body, "    "))
    return PythonObjective(type="python", path=f"{file}:loss", options=options)


@pytest.fixture
def taught(checkpoint, domains: dict[str, Domain]) -> tuple[dict[str, Artifact], dict[str, Domain]]:
    parents = {"start": checkpoint("start", 0), "teacher/sort": checkpoint("one", 1)}
    return parents | {"teacher/reverse": checkpoint("two", 2), "teacher/uppercase": parents["start"]}, domains


def test_a_reverse_kl_of_ones_own_makes_the_student_that_the_built_in_one_makes(tmp_path, taught, workspace):
    students = {}
    for name, objective in {
        "built-in": "reverse_kl",
        "own": own(tmp_path, REVERSE),
        "scaled": own(tmp_path, REVERSE, scale=0.0),
    }.items():
        config = DistillConfig(**SMALL, group_size=2, objective=objective)
        student = stages.distill.train(config, workspace(name, *taught))
        students[name] = torch.cat([each.flatten() for each in student_weights(student)])
        (entry, *_) = student.manifest["teachers"]
        assert entry["objective"]["type"] == ("reverse_kl" if name == "built-in" else "python")
    start = torch.cat([each.flatten() for each in student_weights(taught[0]["start"])])
    moved = (students["built-in"] - start).norm()
    assert moved > 0 and (students["own"] - students["built-in"]).norm() < 1e-2 * moved
    assert torch.equal(students["scaled"], start)


def student_weights(student: Artifact) -> list[torch.Tensor]:
    from safetensors.torch import load_file

    found = load_file(student.path / "model.safetensors")
    return [found[name] for name in sorted(found)]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("return student_CV.no_such_thing()", r"line 5: loss: AttributeError"),
        ("return 0.5", r"loss gives 0\.5 \(float\)"),
        ("return student_CV.sum()", r"loss gives a tensor of shape \[\] for 3 tokens"),
        ("return tokens_C", r"loss gives a tensor of torch\.int64"),
        ("return target_CV.sum(-1)", r"loss gives a tensor without a gradient to the student's logits"),
        ("return student_CV.sum(-1) * float('nan')", r"loss gives a loss that is not finite"),
    ],
)
def test_what_is_no_loss_is_refused_by_file_and_function(tmp_path, body, said):
    loss = load_objective(own(tmp_path, body))
    with pytest.raises(UserError, match=rf"^merge\.objective\.path: .*own_0\.py: {said}"):
        loss(torch.randn(3, 5).requires_grad_(), torch.randn(3, 5), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("text", "function", "said"),
    [
        ("import no_such_module\n", "loss", r"line 1: import: ModuleNotFoundError"),
        ("loss = 3\n", "loss", r"no function 'loss'"),
        ("def los(): ...\n", "loss", r"no function 'loss' — did you mean 'los'"),
    ],
)
def test_a_broken_file_is_named(tmp_path, text, function, said):
    (tmp_path / "broken.py").write_text(text)
    with pytest.raises(UserError, match=rf"^merge\.objective\.path: .*broken\.py: {said}"):
        load_objective(PythonObjective(type="python", path=f"{tmp_path}/broken.py:{function}"))


def test_a_file_edited_after_the_plan_is_refused(tmp_path, taught, workspace):
    objective = own(tmp_path, REVERSE)
    require_unchanged(objective, {"objective": hash_file(Path(objective.file))})
    place = workspace("own", *taught)
    place.provenance["ingredients"] = {"objective": hash_file(Path(objective.file))}
    Path(objective.file).write_text("# Another.\n" + Path(objective.file).read_text())
    with pytest.raises(UserError, match="edited since the run was planned; start the run again"):
        stages.distill.train(DistillConfig(**SMALL, objective=objective), place)
