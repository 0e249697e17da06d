"""Checkpoints made once per session."""

import pytest

from tests.e2e.reference import VARIANTS, Reference, make_reference


@pytest.fixture(scope="session")
def references(tmp_path_factory) -> dict[str, Reference]:
    """transformers' answers for every variant, by its name."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        variant.name: make_reference(root / variant.name, variant, seed)
        for seed, variant in enumerate(VARIANTS)
    }
