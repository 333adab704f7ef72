"""The roles of a merge's parents."""

from stages.config.roles import is_teacher, taught_domain, teacher_role, teachers_of_domain


def test_roles_of_one_and_of_several_teachers() -> None:
    roles = ["start", teacher_role("sort"), teacher_role("code", "one"), teacher_role("code", "two")]
    assert roles == ["start", "teacher/sort", "teacher/code/one", "teacher/code/two"]
    assert [is_teacher(role) for role in roles] == [False, True, True, True]
    assert [taught_domain(role) for role in roles[1:]] == ["sort", "code", "code"]
    assert teachers_of_domain(roles, "sort") == {"teacher/sort": ""}
    assert teachers_of_domain(roles, "code") == {"teacher/code/one": "one", "teacher/code/two": "two"}


def test_a_domain_whose_name_begins_another_ones_has_no_teacher_of_that() -> None:
    assert teachers_of_domain([teacher_role("sorting")], "sort") == {}
