"""The colours of a report, by role, each for a light and a dark page.

Series colours descend from the set of Okabe and Ito ("Color Universal Design", 2008), darkened or lightened until they can
also be read as text: at least 4.5 : 1 against the page. The tests hold them to that, and to staying apart under
protanopia and deuteranopia. Figures and pages refer to roles through CSS variables, so one figure serves both modes.
"""

__all__ = ["COLOURS", "SERIES", "css_variables", "placeholder", "role_of_placeholder"]

COLOURS: dict[str, tuple[str, str]] = {
    # role: (on a light page, on a dark page)
    "paper": ("#ffffff", "#15181c"),
    "panel": ("#f4f6f8", "#1e2329"),
    "ink": ("#1b2026", "#e7eaee"),
    "muted": ("#5b6570", "#a0aab5"),
    "rule": ("#d9dee3", "#343b43"),
    "accent": ("#0068a8", "#62b6f0"),
    "good": ("#00714f", "#4fcf9f"),
    "bad": ("#b3261e", "#ff9a8f"),
    "series-1": ("#0068a8", "#62b6f0"),
    "series-2": ("#bf4a00", "#ff9a52"),
    "series-3": ("#007f5f", "#45cfa4"),
    "series-4": ("#7a1f5c", "#f04cba"),
    "series-5": ("#553408", "#f0e442"),
    "series-6": ("#4a30d8", "#5a89f6"),
}
SERIES = [role for role in COLOURS if role.startswith("series-")]


def css_variables(dark: bool) -> str:
    """The declarations of one mode.

    >>> css_variables(dark=True)[:34]
    '--paper:#15181c;--panel:#1e2329;--'
    """
    return "".join(f"--{role}:{pair[dark]};" for role, pair in COLOURS.items())


def placeholder(role: str) -> str:
    """A colour that stands for `role` while matplotlib draws; it is replaced by the role's variable afterwards.

    >>> placeholder("ink"), role_of_placeholder(placeholder("ink"))
    ('#0a0b02', 'ink')
    """
    return f"#0a0b{list(COLOURS).index(role):02x}"


def role_of_placeholder(colour: str) -> str:
    """The inverse of `placeholder`."""
    return list(COLOURS)[int(colour[-2:], 16)]
