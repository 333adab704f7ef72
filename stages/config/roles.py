"""The roles of a node's parents: `start`, and `teacher/DOMAIN`, or `teacher/DOMAIN/NAME` where a domain has several.

In a merge of weights the experts' roles are `teacher/NAME`. Artifacts keep these names in their manifests.
"""

from collections.abc import Iterable

_TEACHER = "teacher/"


def teacher_role(domain: str, name: str = "") -> str:
    """The role of a domain's only teacher, or of one of several by its name."""
    return f"{_TEACHER}{domain}/{name}" if name else f"{_TEACHER}{domain}"


def is_teacher(role: str) -> bool:
    """Whether a parent of this role is a teacher."""
    return role.startswith(_TEACHER)


def taught_domain(role: str) -> str:
    """The domain in a teacher's role; in a merge of weights the expert's name."""
    return role.split("/")[1]


def teachers_of_domain(roles: Iterable[str], domain: str) -> dict[str, str]:
    """role -> name of the teachers of a domain among roles; the name of an only teacher is empty."""
    only = teacher_role(domain)
    return {role: role[len(only) + 1 :] for role in roles if role == only or role.startswith(f"{only}/")}
