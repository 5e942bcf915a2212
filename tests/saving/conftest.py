"""Base checkpoints of each family as users have them, and what fastllm tells while it saves."""

import pytest

from ..gguf.conftest import judge as judge
from .checkpoints import make_base
from .vision_checkpoints import make_vision_base


@pytest.fixture(scope="session")
def base_of(tmp_path_factory):
    """`base_of(family)`: the folder of its bf16 checkpoint with a tokenizer, made once."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = make_base(tmp_path_factory.mktemp("bases") / family, family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def vision_base_of(tmp_path_factory):
    """The same of a vision-language family."""
    made = {}

    def get(family: str):
        if family not in made:
            made[family] = make_vision_base(tmp_path_factory.mktemp("vision") / family, family)
        return made[family]

    return get


@pytest.fixture
def messages(capsys):
    """What fastllm has told since the last call."""
    from fastllm._notices import forget_notices

    forget_notices()
    return lambda: capsys.readouterr().out
