"""`to_toml` writes what `load_config` reads, whatever the settings are."""

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import given, settings
from hypothesis import strategies as st

from flux_trainer.config.load import load_config
from flux_trainer.config.schema import Data, JobConfig, Source, Validation
from flux_trainer.config.section import Section
from flux_trainer.config.toml import to_toml
from flux_trainer.runtime.paths import expand_home

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


def values(annotation: Any, metadata: Any = ()) -> st.SearchStrategy[Any]:
    """Valid values of a field, straight from its annotation and pydantic's constraints."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return values(args[0], args[1:] if args[0] is str else args[1].metadata)
    if origin in (Union, types.UnionType):
        return st.one_of([values(arg, metadata) for arg in args])
    if origin is Literal:
        return st.sampled_from(args)
    if origin is list:
        return st.lists(values(args[0]), max_size=3)
    if isinstance(annotation, type) and issubclass(annotation, Section):
        fields = {name: values(f.annotation, f.metadata) for name, f in annotation.model_fields.items()}
        return st.builds(annotation, **fields)
    low = next((getattr(m, "ge", getattr(m, "gt", None)) for m in metadata), None)
    high = next((m.le for m in metadata if hasattr(m, "le")), None)
    if any(getattr(m, "func", None) is expand_home for m in metadata):
        return TEXT.filter(lambda text: not text.startswith("~"))
    open_low = any(hasattr(m, "gt") for m in metadata)
    return {
        bool: st.booleans(),
        int: st.integers(low, high),
        float: st.floats(low, high, exclude_min=open_low, allow_nan=False, allow_infinity=False),
        str: TEXT,
        type(None): st.none(),
    }[annotation]


@settings(max_examples=30, deadline=None)
@given(config=values(JobConfig))
def test_any_config_survives_the_round_trip(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("toml") / "a.toml"
    path.write_bytes(to_toml(config).encode())
    assert load_config(["--job.config_file", str(path)]) == config


def test_a_written_config_reads_like_a_config_file(tmp_path: Path):
    source = Source(type="folder", path='C:\\"x"\n')
    prompts = Validation(prompts=["a cat, asleep", "überall \x7f"])
    text = to_toml(JobConfig(data=Data(sources=[source]), validation=prompts))
    assert '[[data.sources]]\ntype = "folder"\npath = "C:\\\\\\"x\\"\\n"\n' in text
    assert 'prompts = ["a cat, asleep", "überall \\u007f"]\n' in text
    assert "total_steps" not in text  # unset
    assert text.count("[validation]") == 1
