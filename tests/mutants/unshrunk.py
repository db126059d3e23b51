"""A pytest plugin: property tests stop at the first counterexample, the same one every time."""

import hypothesis
from hypothesis import Phase

hypothesis.settings.register_profile(
    "mutants",
    deadline=None,
    derandomize=True,
    database=None,
    phases=(Phase.explicit, Phase.generate),
)
